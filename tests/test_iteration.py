"""The captured iteration: is a run of replayed iterations bit for bit the run without them, for
every recipe, and what becomes of it where it cannot be?"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import checkpoint, recipe, session
from engine import iteration as iterations
from engine.compile import Compiler
from engine.iteration import CudaGraph, Graph, Iteration, choose_graph, own_stream
from engine.optimizer import Guarded
from engine.parallel import Piece
from engine.precision import Precision
from engine.session import Session
from engine.settings import Recipe
from engine.stats import Stats
from engine.steps.progressive import Progressive
from engine.world import Ranks
from kernels import image_batch, philox
from pipelines.datasets import find
from pipelines.open import open_pipeline
from tests.forked import train
from tests.runs import QUICK, run_folder, toy
from tests.tape import Tape

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAMES = recipe.names()
FEW = {type(recipe.load(name).step): name for name in reversed(NAMES)}.values()
"""One of each algorithm."""
MARKED = [
    name if name in FEW else pytest.param(name, marks=[pytest.mark.slow, pytest.mark.repeated])
    for name in NAMES
]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """A CPU draws through numpy, and mirrors images by a shape that depends on data."""
    monkeypatch.setattr(philox, "by_numpy", lambda index_N: False)
    monkeypatch.setattr(image_batch, "_bytes", image_batch._indexed)
    monkeypatch.setattr(iterations, "WARM_UP", 1)
    monkeypatch.setattr(iterations, "SETTLED", 1)
    monkeypatch.setattr(Tape, "made", [])


class Live:
    """A session at toy size, its pipeline, statistics and iteration."""

    def __init__(
        self,
        small: Recipe,
        cache: Path,
        graph: Callable[[], Graph] | None,
        device: torch.device = CPU,
        precision: str = "fp32",
    ) -> None:
        self.said: list[str] = []
        self.session: Session = session.start(
            small,
            Ranks(0, 0, 1, device),
            Precision(precision, "test", device.type),
            Compiler(False, "test"),
            10**6,
        )
        data = replace(small.data, cache=cache)
        self.clock = self.session.clock
        self.pipeline = open_pipeline(
            find(data), data, self.clock, 0, self.session.key, lambda text: None
        )
        self.stats = Stats(self.session.ranks)
        self.iterate = Iteration(self.session, self.pipeline, self.stats, graph, self.said.append)

    def run(self, count: int, start: int = 0) -> dict[str, Tensor]:
        """The state after so many iterations from one on, the means of the statistics in it."""
        self.clock.seek(start * self.clock.batch)
        for _ in range(count):
            self.pipeline.ready(self.clock)
            self.iterate()
        state = checkpoint.shared_tensors(self.session) | checkpoint.local_tensors(self.session)
        whole = {n: v.whole() if isinstance(v, Piece) else v.clone() for n, v in state.items()}
        means = {f"stats/{n}": torch.tensor(v) for n, v in self.stats.read().items()}
        place = {
            "host": torch.tensor(self.clock.images),
            "device": self.clock.device_images.clone(),
        }
        return whole | means | place


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [n for n in one if not torch.equal(one[n], other[n])] == []


def spans(small: Recipe) -> list[tuple[int, int]]:
    """Where to begin, and how many iterations until each set of updates is replayed."""
    count = max(4, 3 * min(small.step.period(), 7))
    return [(start, count) for start in sorted({0, small.step.settles()})]


@pytest.mark.parametrize("name", MARKED)
def test_replayed_iterations_are_those_of_the_run_as_written(name, tmp_path):
    small, _ = toy(name, 8)
    for start, count in spans(small):
        plain, taped = (Live(small, tmp_path, graph) for graph in (None, Tape))
        assert_equal(plain.run(count, start), taped.run(count, start))
        assert taped.said and "replayed" in taped.said[0]
    assert all(tape.replays for tape in Tape.made)


def lazily_punished() -> Recipe:
    small, _ = toy("dcgan_celeba", 8)
    return replace(small, step=replace(small.step, r1=1.0, r1_every=3, critic_updates=2))


def test_each_set_of_updates_has_a_graph_of_its_own(tmp_path):
    small = lazily_punished()
    plain, taped = (Live(small, tmp_path, graph) for graph in (None, Tape))
    assert_equal(plain.run(24), taped.run(24))
    turns = {small.step.turns(i) for i in range(small.step.period())}
    assert len(turns) == 4 == len(Tape.made)
    assert all(tape.replays >= 3 for tape in Tape.made)


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"seed": 3}])
def test_micro_batches_and_averages_are_in_the_graph(changes, tmp_path):
    small = replace(toy("vae_celeba", 8)[0], **changes)
    plain, taped = (Live(small, tmp_path, graph, precision="bf16") for graph in (None, Tape))
    assert_equal(plain.run(5), taped.run(5))


def test_what_the_host_says_anew_in_each_iteration_is_not_in_a_graph(tmp_path):
    """The test of the tests: a step that reads the host's clock."""
    small, _ = toy("vae_mnist", 8)
    lives = [Live(small, tmp_path, graph) for graph in (None, Tape)]
    for live in lives:
        step, clock = live.session.step, live.clock
        live.session.step = lambda batch, step=step, clock=clock: (
            step(batch) | {"place": torch.zeros(()) + clock.images}
        )
    plain, taped = (live.run(4) for live in lives)
    assert plain["stats/place"] == (0 + 8 + 16 + 24) / 4
    assert taped["stats/place"] == (0 + 8 + 8 + 8) / 4


@pytest.mark.parametrize("name", NAMES)
def test_turns_tell_apart_what_kinds_of_iterations_there_are(name):
    step = recipe.load(name).step
    kinds = step.kinds()
    assert len({step.turns(i) for i in kinds}) == len(kinds)
    period, settled = step.period(), step.settles()
    assert step.turns(settled + 1) == step.turns(settled + 1 + period)


def test_a_level_that_begins_is_a_turn_of_its_own():
    step = recipe.load("progan_celeba").step
    assert isinstance(step, Progressive)
    first = step.begins(1)
    assert [step.turns(i) for i in (first - 1, first, first + 1)] == [
        (0, False),
        (1, True),
        (1, False),
    ]


class Broken:
    """A graph that cannot be recorded: something waits for the device, at the very end."""

    def record(self, work):
        Tape().record(work)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    def replay(self):
        raise AssertionError("nothing was recorded")


def test_what_cannot_be_captured_runs_as_written_and_says_so_once(tmp_path):
    small, _ = toy("dcgan_celeba", 8)
    plain, broken = (Live(small, tmp_path, graph) for graph in (None, Broken))
    assert_equal(plain.run(6), broken.run(6))
    assert broken.said == [
        "graph: off from here on (the iteration cannot be captured: "
        "operation not permitted when stream is capturing)"
    ]


class BrokenBackward(Broken):
    """One whose record ends between an update's backward pass and its optimizer."""

    def record(self, work):
        def fail(*_: object) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Guarded, "guard", fail)
            Tape().record(work)


def test_gradients_of_an_iteration_that_could_not_be_captured_are_dropped(tmp_path):
    small, _ = toy("dcgan_digits", 8)
    plain, broken = (Live(small, tmp_path, graph) for graph in (None, BrokenBackward))
    assert_equal(plain.run(6), broken.run(6))
    assert "off from here on" in broken.said[0]


def test_a_state_that_is_restored_is_recorded_anew(tmp_path):
    small, _ = toy("dcgan_celeba", 8)
    plain, taped = (Live(small, tmp_path, graph) for graph in (None, Tape))
    for live in (plain, taped):
        live.run(4)
        live.iterate.forget()
        for player in live.session.players.values():  # as checkpoint.restore does
            player.optimizer.state.clear()
            player.shared.make_moments()
    assert_equal(plain.run(4, 10), taped.run(4, 10))
    assert len(Tape.made) == 2


def test_the_first_iterations_run_as_written(tmp_path, monkeypatch):
    monkeypatch.setattr(iterations, "WARM_UP", 3)
    monkeypatch.setattr(iterations, "SETTLED", 5)
    live = Live(toy("dcgan_celeba", 8)[0], tmp_path, Tape)
    live.run(5)
    assert not Tape.made
    live.run(2, 5)
    assert [tape.replays for tape in Tape.made] == [2]


# -- from the command line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "device", "profile", "expected"),
    [
        ({}, CUDA, False, (False, "not yet measured")),
        ({"graph": "on"}, CPU, False, (False, "needs a GPU")),
        ({"graph": "on", "parallel": "fsdp2"}, CUDA, False, (False, "--parallel fsdp2")),
        ({"graph": "on"}, CUDA, True, (False, "--profile")),
        ({"graph": "on", "parallel": "ddp"}, CUDA, False, (True, "as asked")),
    ],
)
def test_it_is_said_why_iterations_are_captured_or_not(changes, device, profile, expected):
    on, why = choose_graph(replace(recipe.load("dcgan_celeba"), **changes), device, profile)
    assert on == expected[0] and expected[1] in why


def test_a_run_without_a_gpu_says_so_and_goes_on_without_the_flag(tmp_path):
    flags = [*toy("gan_mnist", 8)[1], *QUICK, "--runs", str(tmp_path), "--device", "cpu"]
    said = train("gan_mnist", *flags, "--steps", "2", "--graph", "on")
    assert "graph: off (a CUDA graph needs a GPU)" in said
    train("gan_mnist", *flags, "--steps", "3")
    assert run_folder(tmp_path, "gan_mnist")


@NEEDS_GPU
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_graph_is_bit_for_bit_the_run_without_it(name, precision, tmp_path):
    small, _ = toy(name, 8)
    own_stream(CUDA)
    for start, count in spans(small):
        states = [
            Live(small, tmp_path, graph, CUDA, precision).run(count, start)
            for graph in (None, CudaGraph)
        ]
        assert_equal(*states)
