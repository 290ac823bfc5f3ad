"""The count of memory: against sums by hand, and against what an iteration really takes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from engine import recipe as recipes
from engine.algorithm import Algorithm
from engine.compile import Compiler
from engine.footprint import activation_bytes, state_bytes
from engine.networks.spec import Network
from engine.precision import Precision
from engine.session import start
from engine.settings import PlayerSettings, Recipe
from engine.world import Ranks
from pipelines.batch import Batch
from pipelines.settings import Data
from tests.runs import captions_of, pair_of, toy

CPU = torch.device("cpu")
IMAGE, HIDDEN = 3 * 8 * 8, 50


@dataclass(frozen=True)
class Perceptron(Network):
    hidden: int = HIDDEN

    def build(self, images):
        return nn.Sequential(
            nn.Flatten(), nn.Linear(IMAGE, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1)
        )


def mean_output(network, images_NCHW):
    return network(images_NCHW).mean(), {}


@dataclass(frozen=True)
class OneUpdate(Algorithm):
    player: PlayerSettings

    def start(self, players, key) -> Callable[[Batch], dict]:
        return lambda batch: players["player"].update(mean_output, batch.images_NCHW)


@pytest.fixture
def perceptron() -> Recipe:
    step = OneUpdate(PlayerSettings(Perceptron(), ema_kimg=1))
    return Recipe(step=step, data=Data(name="synthetic", resolution=8, channels=3))


def test_activations_are_those_counted_by_hand(perceptron):
    # The most is held when the backward pass goes through the ReLU: the image, with channels last
    # and flattened, its label and position, the ReLU's output, the gradient after it and the one
    # before it.
    assert activation_bytes(perceptron) == 2 * 4 * IMAGE + 8 + 8 + 3 * 4 * HIDDEN


def test_micro_batches_share_a_batch_and_16_bits_take_half(perceptron):
    whole = activation_bytes(perceptron)
    assert activation_bytes(replace(perceptron, precision="bf16")) == whole / 2
    # the images of the other micro-batch wait beside those that are worked on
    parts = activation_bytes(replace(perceptron, accumulate=2))
    assert parts == whole + 4 * IMAGE + 8 + 8


def test_state_is_that_counted_by_hand(perceptron):
    weights = 4 * (IMAGE * HIDDEN + HIDDEN + HIDDEN + 1)
    state = state_bytes(perceptron)["player"]
    assert (state.parameters, state.gradients, state.average) == (weights, weights, weights)
    assert state.optimizer == 2 * weights + 4 * 4  # a count for each of four tensors
    assert state.held == state.stored + weights


def real(recipe: Recipe, classes: int = 0):
    """A session on the CPU and one batch for it."""
    ranks, off = Ranks(0, 0, 1, CPU), Compiler(False, "off")
    session = start(recipe, ranks, Precision("fp32", "test", "cpu"), off, 10**6, classes)
    data = recipe.data
    images = torch.randn(data.batch, data.channels, data.resolution, data.resolution)
    labels = torch.zeros(data.batch, dtype=torch.int64)
    given = pair_of(recipe, images), *captions_of(recipe, data.batch)
    return session, Batch(images, labels, torch.arange(data.batch), *given)


@pytest.mark.parametrize("name", recipes.names())
def test_state_is_what_a_session_keeps(name):
    recipe = toy(name)[0]
    session, batch = real(recipe, 10)
    for iteration in recipe.step.kinds():
        session.clock.seek(iteration * session.clock.batch)
        session.step(batch)
    for player, state in state_bytes(recipe, 10).items():
        live = session.players[player]
        values = [v for s in live.optimizer.state.values() for v in s.values()]
        assert state.optimizer == sum(v.numel() * v.element_size() for v in values)
        weights = live.network.state_dict().values()
        assert state.parameters == sum(v.numel() * v.element_size() for v in weights)
        assert (state.average > 0) == (live.average is not None)


def peak(work: Callable) -> int:
    """The most bytes of tensors that the work adds to what is held."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    held = most = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("name", ["gan_mnist", "vae_mnist", "dcgan_mnist"])
def test_an_iteration_takes_what_was_counted(name):
    recipe = recipes.load(name)
    recipe = replace(recipe, data=replace(recipe.data, batch=64), precision="fp32")
    session, batch = real(recipe)
    session.step(batch)  # the first makes the optimizer's state
    gradients = max(s.gradients for s in state_bytes(recipe).values())
    counted = 64 * activation_bytes(recipe) + gradients
    assert 0.6 < peak(lambda: session.step(batch)) / counted < 1.25


def test_penalties_of_some_iterations_count():
    recipe = toy("dcgan_mnist")[0]
    plain, punished = (replace(recipe, step=replace(recipe.step, r1=r1)) for r1 in (0.0, 1.0))
    assert activation_bytes(punished) > 1.2 * activation_bytes(plain)
