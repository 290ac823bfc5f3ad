"""What every recipe can do, whoever adds it: found by listing the folder, tried at toy size.

A recipe that builds but loses its state on resume, leaves a parameter without gradient, or trains
otherwise on two ranks than on one cannot be added.
"""

import pytest
import torch
from torch import nn

from engine import recipe, session, world
from engine.compile import Compiler
from engine.describe import cost
from engine.precision import Precision
from engine.train import main
from pipelines.batch import Batch
from tests.forked import Run, train
from tests.runs import (
    QUICK,
    captions_of,
    differences,
    final_state,
    kill_once_at,
    newest_picture,
    pair_of,
    run_folder,
    toy,
)

NAMES = recipe.names()
STEPS, BATCH = 3, 8


@pytest.fixture(scope="module", params=NAMES)
def whole_run(request, tmp_path_factory):
    """(name, flags, run folder) of an unbroken run of three steps in fp32; a large epsilon, since
    Adam makes whole steps of a gradient that is rounding alone (a bias before a norm)."""
    name = request.param
    runs = tmp_path_factory.mktemp(name)
    small, flags = toy(name, BATCH)
    flags += [*QUICK, "--precision", "fp32", "--compile", "off"]
    for player in small.step.players():
        flags += [f"--{player}.eps", "1e-3"]
    train(name, *flags, "--steps", str(STEPS), "--runs", str(runs))
    return name, flags, run_folder(runs, name)


@pytest.mark.parametrize("name", NAMES)
def test_dry_run_prints_settings_networks_and_cost(name, capsys):
    assert main([name, *toy(name)[1], "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for word in ("--data.batch", "parameters", "FLOPs per image", "compile", "precision"):
        assert word in printed


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_finite_gradient(name):
    small, _ = toy(name, BATCH)
    cpu = torch.device("cpu")
    live = session.start(
        small, world.Ranks(0, 0, 1, cpu), Precision("fp32", "", "cpu"), Compiler(False, ""), 100
    )
    shape = (BATCH, small.data.channels, small.data.resolution, small.data.resolution)
    noise = torch.Generator().manual_seed(0)
    images = torch.rand(shape, generator=noise) * 2 - 1
    for player in live.players.values():
        player.shared.forget = lambda: None  # the gradients of all steps stay
        for parameter in player.parameters:  # a gain of 0 hides what is behind it
            if not parameter.any():
                nn.init.normal_(parameter, 0.0, 0.01, generator=noise)
    for iteration in small.step.kinds():
        live.clock.seek(iteration * BATCH)
        labels, position_N = torch.arange(BATCH) % 2, live.clock.position_N()
        given = pair_of(small, images), *captions_of(small, BATCH)
        live.step(Batch(images, labels, position_N, *given))
    for player in live.players.values():
        for path, parameter in player.network.named_parameters():
            where = f"{player.name} {path}"
            assert parameter.grad is not None, where
            assert parameter.grad.isfinite().all(), where
            # critics' losses are differences, in which a bias may cancel
            assert path.endswith("bias") or parameter.grad.abs().sum() > 0, where


@pytest.mark.parametrize("name", NAMES)
def test_cost_is_counted_without_data(name):
    counted = cost(toy(name)[0])
    assert counted.flops_per_image > 1000
    assert counted.units


def test_run_leaves_its_outputs(whole_run):
    _, _, folder = whole_run
    left = {p.name for p in folder.iterdir()}
    assert {"recipe.json", "stats.jsonl", "report.html", "reals.png", "tensorboard"} <= left
    assert any(newest_picture(folder))  # a picture, and not a black one
    assert all(t.isfinite().all() for t in final_state(folder).values())


def test_killed_run_goes_on_bit_for_bit(whole_run, tmp_path):
    name, flags, folder = whole_run
    common = [*flags, "--runs", str(tmp_path), "--run", "killed"]
    often = ["--checkpoint-every", str(BATCH / 1000), "--keep", "10000"]
    killed = tmp_path / name / "killed"
    kill_once_at(killed, BATCH, Run(name, *common, *often, "--steps", "3000"))
    train(name, *common, "--steps", str(STEPS))
    assert not differences(final_state(folder), final_state(killed))
    assert newest_picture(folder) == newest_picture(killed)


def test_two_ranks_equal_one_rank_with_the_same_global_batch(whole_run, tmp_path):
    """Each tensor as a whole, up to rounding: sums over ranks run in another order, and a ReLU or
    the sign of an absolute error that this turns over shows in single values."""
    name, flags, folder = whole_run
    common = [*flags, "--runs", str(tmp_path), "--steps", str(STEPS)]
    train(name, *common, ranks=2, SADDLE_BUCKET_MB="0.01")
    one, two = final_state(folder), final_state(run_folder(tmp_path, name))
    for path, value in one.items():
        share = 0.03 if "/optimizer/" in path else 1e-3
        apart, whole = (torch.linalg.vector_norm(t.double()) for t in (two[path] - value, value))
        assert apart <= share * whole + 2e-5 * value.numel() ** 0.5, path
    for path, value in two.items():
        if path.startswith("rank 1/"):
            torch.testing.assert_close(value, two[path.replace("rank 1", "rank 0")], msg=path)
