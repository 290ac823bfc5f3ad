"""A checkpoint of one way of sharing goes on in every other, on as many ranks or fewer."""

import json

import pytest
import safetensors.torch
import torch

from engine import checkpoint
from engine.export.__main__ import main as export
from engine.stored import Loaded
from tests.forked import train
from tests.runs import QUICK, differences, final_state, newest_picture, toy

BATCH, HALF, WHOLE = 8, 6, 12
WAYS = ("ddp", "fsdp2", "deepspeed-zero1", "deepspeed-zero2", "deepspeed-zero3")
NAME = "vae_mnist"  # without BatchNorm, whose statistics are each rank's own


def run(runs, way, steps, ranks=2):
    flags = [*toy(NAME, BATCH)[1], *QUICK, "--compile", "off", "--precision", "fp32"]
    flags += ["--autoencoder.ema-kimg", "0.05", "--run-name", "it", "--runs", str(runs)]
    return train(NAME, *flags, "--parallel", way, "--steps", str(steps), ranks=ranks)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """What one rank trains without a stop."""
    runs = tmp_path_factory.mktemp("unbroken")
    run(runs, "ddp", WHOLE, ranks=1)
    return final_state(runs / NAME / "it")


def assert_near(state, wanted):
    """The shared tensors; a rank's own are of so many ranks."""
    shared = [path for path in wanted if not path.startswith("rank ")]
    assert any("average" in p for p in shared) and any("exp_avg_sq" in p for p in shared)
    for path in shared:
        assert (state[path] - wanted[path]).abs().max() < 1e-5, path


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        "fsdp2",
        "deepspeed-zero3",
        *(
            pytest.param(way, marks=pytest.mark.repeated)
            for way in ("ddp", "deepspeed-zero1", "deepspeed-zero2")
        ),
    ],
)
def test_every_way_goes_on_from_its_own_checkpoint_bit_for_bit(way, tmp_path, unbroken):
    run(tmp_path / "whole", way, WHOLE)
    run(tmp_path / "broken", way, HALF)
    said = run(tmp_path / "broken", way, WHOLE)
    assert f"from {HALF * BATCH} images" in said
    whole, broken = (final_state(tmp_path / kind / NAME / "it") for kind in ("whole", "broken"))
    assert not differences(whole, broken)
    assert_near(broken, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then", "ranks"),
    [
        ("ddp", "fsdp2", 2),
        ("ddp", "deepspeed-zero3", 2),
        ("deepspeed-zero2", "ddp", 1),
        *(
            pytest.param(*ways, marks=pytest.mark.repeated)
            for ways in (
                ("fsdp2", "ddp", 2),
                ("fsdp2", "ddp", 1),
                ("deepspeed-zero3", "deepspeed-zero1", 2),
                ("deepspeed-zero1", "fsdp2", 2),
            )
        ),
    ],
)
def test_another_way_and_number_of_ranks_go_on(first, then, ranks, tmp_path, unbroken):
    run(tmp_path, first, HALF)
    said = run(tmp_path, then, WHOLE, ranks)
    assert f"from {HALF * BATCH} images" in said
    assert_near(final_state(tmp_path / NAME / "it"), unbroken)


@pytest.mark.slow
def test_a_sharded_checkpoint_is_sampled_and_exported_as_any_other(tmp_path, unbroken):
    run(tmp_path, "fsdp2", WHOLE)
    folder = tmp_path / NAME / "it"
    newest = checkpoint.listing(folder / "checkpoints")[0]
    index = json.loads((newest / "checkpoint.json").read_text())
    assert index["parallel"] == "fsdp2" and (newest / "shard-00001.safetensors").is_file()
    stored = Loaded(newest).shared
    sizes = [p.stat().st_size for p in sorted(newest.glob("shard-*"))]
    assert max(sizes) < 0.6 * sum(sizes)  # the ranks share the work
    assert any(newest_picture(folder))
    assert export([str(folder), "--formats", "safetensors"]) == 0
    (weights,) = (folder / "export").glob("*.safetensors")
    for path, value in safetensors.torch.load_file(weights).items():
        whole = next(stored[p] for p in stored if p.startswith("autoencoder/average/") and
                     p.endswith(path))  # fmt: skip
        assert torch.equal(value, whole)


@pytest.mark.slow
def test_a_damaged_shard_is_named_and_the_one_before_is_used(tmp_path):
    run(tmp_path, "fsdp2", HALF)
    run(tmp_path, "fsdp2", WHOLE)
    newest = checkpoint.listing(tmp_path / NAME / "it" / "checkpoints")[0]
    part = newest / "shard-00001.safetensors"
    data = bytearray(part.read_bytes())
    data[-3] ^= 1
    part.write_bytes(data)
    said = run(tmp_path, "fsdp2", WHOLE + 1)
    assert "shard-00001.safetensors: wrong SHA-256" in said
    assert f"from {HALF * BATCH} images" in said
