"""What several ranks can do together: refused before anything starts, or settled and why."""

from dataclasses import replace

import pytest
import torch

from engine import micro_batch, recipe, sharing, train, zero
from engine.precision import Precision
from engine.settings import Recipe
from engine.steps.adversarial import Adversarial
from engine.world import Ranks

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
FP32, FP16 = (Precision(name, "test", "cpu") for name in ("fp32", "fp16"))


def shared(way: str, name: str = "vae_mnist", **changes: object) -> Recipe:
    return replace(recipe.load(name), parallel=way, **changes)


def penalised(way: str) -> Recipe:
    given = shared(way, "dcgan_digits")
    assert isinstance(given.step, Adversarial)
    return replace(given, step=replace(given.step, r1=1.0))


def test_zero3_refuses_a_penalty_and_names_what_serves():
    for ranks in (1, 2):  # tried on one rank, it shall not fail on many
        with pytest.raises(ValueError, match="use --parallel deepspeed-zero2 or fsdp2"):
            sharing.check(penalised("deepspeed-zero3"), FP32, ranks)
    for way in ("ddp", "fsdp2", "deepspeed-zero1", "deepspeed-zero2"):
        sharing.check(penalised(way), FP32, 2)
    sharing.check(shared("deepspeed-zero3"), FP32, 2)


@pytest.mark.parametrize("way", ["fsdp2", "deepspeed-zero1"])
def test_loss_scaling_is_for_ddp(way):
    with pytest.raises(ValueError, match="--precision bf16, or --parallel ddp"):
        sharing.check(shared(way), FP16, 2)
    sharing.check(shared("ddp"), FP16, 2)


def test_deepspeed_that_is_not_there_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(zero, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"pip install 'saddle\[deepspeed\]', or use --parallel"):
        sharing.check(shared("deepspeed-zero1"), FP32, 2)


def test_a_refusal_ends_with_code_2_before_anything_starts(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    left = []
    monkeypatch.setattr("engine.world.leave", left.append)
    monkeypatch.setattr(
        "engine.start.world.leave", lambda code: (_ for _ in ()).throw(SystemExit(code))
    )
    flags = ["--parallel", "deepspeed-zero3", "--r1", "1", "--runs", str(tmp_path)]
    with pytest.raises(SystemExit) as caught:
        train.main(["dcgan_digits", *flags])
    assert caught.value.code == 2
    assert "--parallel deepspeed-zero2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "batch", "ranks", "accumulate", "synchronised"),
    [
        ("auto", 64, 1, 1, False),
        ("auto", 64, 4, 1, False),
        ("auto", 60, 4, 1, True),
        ("auto", 64, 2, 4, True),
        ("on", 4096, 2, 1, True),
        ("on", 64, 1, 1, False),
        ("off", 8, 4, 1, False),
    ],
)
def test_norms_are_synchronised_where_a_rank_has_few_images(
    setting, batch, ranks, accumulate, synchronised
):
    given = shared("ddp", "dcgan_digits", sync_bn=setting, accumulate=accumulate)
    given = replace(given, data=replace(given.data, batch=batch))
    assert sharing.choose_sync_bn(given, ranks)[0] == synchronised
    assert bool(sharing.compile_obstacle(given, ranks)) == synchronised


def test_zero3_runs_eager_and_says_so():
    assert "ZeRO-3" in sharing.compile_obstacle(shared("deepspeed-zero3"), 2)
    assert not sharing.compile_obstacle(shared("deepspeed-zero2"), 2)


# micro-batches


def test_micro_batches_fill_the_free_memory(monkeypatch):
    given = replace(recipe.load("vae_mnist"), batch_per_rank="auto")
    state = sum(s.held for s in micro_batch.state_bytes(given).values())
    each = micro_batch.activation_bytes(given)
    for images, parts in ((100, 1), (99, 2), (50, 2), (49, 4), (26, 4), (1, 100)):
        room = (images + 0.5) * each / micro_batch.SHARE
        monkeypatch.setattr(micro_batch, "free_memory", lambda room=room: state + room)
        resolved, reason = micro_batch.resolve(given, 10, ALONE)
        assert resolved.accumulate == parts, (images, reason)
        assert f"{100 // parts} images" in reason
    monkeypatch.setattr(micro_batch, "free_memory", lambda: state)
    with pytest.raises(ValueError, match=r"one image takes .* there are 0 MiB"):
        micro_batch.resolve(given, 10, ALONE)


def test_micro_batches_are_not_chosen_where_a_norm_sees_them():
    given = replace(recipe.load("dcgan_digits"), batch_per_rank="auto")
    with pytest.raises(ValueError, match="the BatchNorm of the generator sees the micro-batch"):
        micro_batch.resolve(given, 10, ALONE)


def test_a_number_of_images_per_rank_gives_the_micro_batches():
    given = replace(recipe.load("vae_mnist"), batch_per_rank=25)
    recipe.check(given, 2)
    assert micro_batch.resolve(given, 10, ALONE)[0].accumulate == 4
    with pytest.raises(ValueError, match=r"--batch-per-rank 30 on 2 .* try 25, or auto"):
        recipe.check(replace(given, batch_per_rank=30), 2)
    with pytest.raises(ValueError, match="not both"):
        recipe.check(replace(given, accumulate=2), 2)
