"""The loops that bench_peers compares train the same thing, and its figures are what it says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import peers
from bench.bench_peers import figures
from engine.steps.adversarial import LATENTS
from kernels import philox
from pipelines.datasets import find
from pipelines.order import Order
from tests.players import CPU, weights

ITERATIONS = 3


class Noted:
    """In place of turns: the losses of each iteration."""

    def __init__(self) -> None:
        self.losses: list[list[float]] = []
        self.entered = 0

    def __enter__(self) -> None:
        self.entered += 1

    def __exit__(self, *_: object) -> None:
        pass

    def next(self, *losses: Tensor) -> None:
        self.losses.append([loss.item() for loss in losses])


def trained(name: str, folder: Path) -> tuple[list[list[float]], list[Tensor]]:
    """Losses and final weights of one of the others, fed with our images and latents."""
    given = peers.recipe_of("narrow", ITERATIONS, folder)
    images, turns = ITERATIONS * given.data.batch, Noted()
    rows = Order(len(find(given.data)), given.seed).rows(np.arange(images)).tolist()
    work = peers.work_of(given, CPU, folder, rows)
    key, place_N = philox.make_key(given.seed), torch.arange(images)
    drawn = iter(philox.normal(key, LATENTS, place_N, peers.LATENT).split(given.data.batch))
    work.noise = lambda _: next(drawn)
    peers.OTHERS[name](work, turns)
    assert turns.entered == len(turns.losses) == ITERATIONS
    return turns.losses, weights(work.generator) + weights(work.discriminator)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return trained("bare", tmp_path_factory.mktemp("bare"))


def test_our_loop_trains_what_the_bare_one_does(bare, tmp_path):
    turns = Noted()
    peers.ours(peers.recipe_of("narrow", ITERATIONS, tmp_path), turns, tmp_path)
    assert turns.entered == len(turns.losses) == ITERATIONS
    np.testing.assert_allclose(turns.losses, bare[0], rtol=1e-4)


@pytest.mark.parametrize("name", ["accelerate", "lightning"])
@pytest.mark.filterwarnings("ignore")
def test_a_peer_trains_what_the_bare_loop_does(name, bare, tmp_path, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.setattr(peers, "LOG", 2)
    losses, parameters = trained(name, tmp_path)
    if name == "accelerate":
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
    assert losses == bare[0]
    for own, other in zip(parameters, bare[1], strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)
    assert list(tmp_path.rglob("*tfevents*"))


def test_blocks_are_begun_and_told():
    events, zero = [], torch.zeros(())
    turns = peers.Turns(2, CPU, lambda: events.append("wait"), events.append)
    for _ in range(4):
        with turns:
            pass
        turns.next(zero, zero)
    assert [e if e == "wait" else "told" for e in events] == ["wait", *["told", "wait"] * 2]
    assert all(0 <= e["inside_seconds"] <= e["seconds"] for e in events[1::2])
    assert all(0 <= e["inside_cpu"] <= e["cpu"] for e in events[1::2])


def block(seconds: float, inside: float) -> dict[str, float]:
    """On a machine that has something else to do half of the time."""
    both = {"seconds": seconds, "inside_seconds": inside}
    return both | {"cpu": seconds / 2, "inside_cpu": inside / 2}


def test_figures_compare_blocks_of_one_round():
    bare = [block(s, 0.8 * s) for s in (0.1, 0.2, 0.1)]
    own = [block(1.5 * b["seconds"], b["seconds"]) for b in bare]
    found = figures({"bare": bare, "ours": own}, "ours")
    for prefix, unit in (("", 1), ("cpu_", 0.5)):
        assert found[f"{prefix}milliseconds"] == pytest.approx(150 * unit)
        assert found[f"{prefix}ratio_to_bare"] == pytest.approx(1.5)
        assert found[f"{prefix}overhead_ms"] == pytest.approx(70 * unit)
        assert found[f"{prefix}share_outside"] == pytest.approx(1 / 3)
