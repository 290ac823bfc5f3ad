"""The capture contract: in an iteration no value comes to the host, none comes from it, and no
shape depends on data. Two twins prove it: a guard that sees every operation on real data, and the
meta device, which has no values that could be read, below the guard either."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import session
from engine.algorithm import Algorithm
from engine.compile import Compiler
from engine.describe import META, cost, example_batch
from engine.networks import dcgan, vae
from engine.player import Player
from engine.precision import Precision
from engine.session import Session
from engine.settings import Adam, Length, PlayerSettings, Recipe
from engine.stats import Stats
from engine.steps.adversarial import Adversarial
from engine.steps.autoencoder import Variational
from engine.world import Ranks
from kernels import image_batch, philox
from pipelines.batch import Batch
from pipelines.datasets import find
from pipelines.open import Pipeline, open_pipeline
from pipelines.settings import Data

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FORBIDDEN_TAGS = {
    torch.Tag.data_dependent_output: "reads a value back",
    torch.Tag.dynamic_output_shape: "has a shape that depends on data",
}
ADAM = Adam(lr=1e-3, warmup_kimg=1, decay_kimg=1)
STEPS: dict[str, Algorithm] = {
    "adversarial": Adversarial(
        generator=PlayerSettings(dcgan.Generator(latent=6, width=4), ADAM, ema_kimg=1, clip=1.0),
        discriminator=PlayerSettings(dcgan.Discriminator(width=4), ADAM, clip=1.0),
    ),
    "joint": Adversarial(
        generator=PlayerSettings(dcgan.Generator(latent=6, width=4)),
        discriminator=PlayerSettings(dcgan.Discriminator(width=4)),
        joint=True,
    ),
    "penalised": Adversarial(
        generator=PlayerSettings(dcgan.Generator(latent=6, width=4)),
        discriminator=PlayerSettings(dcgan.Discriminator(width=4)),
        r1=1.0,
        r1_every=1,
    ),
    "variational": Variational(
        autoencoder=PlayerSettings(vae.Convolutional(latent=6, widths=(4, 4)), ADAM, ema_kimg=1)
    ),
    "gaussian": Variational(
        autoencoder=PlayerSettings(vae.Dense(hidden=8, latent=6)), pixels="gaussian", beta=4.0
    ),
}


@pytest.fixture(autouse=True)
def draws_as_on_a_gpu(monkeypatch):
    """Eager draws on a CPU go through numpy, which a captured graph never meets."""
    monkeypatch.setattr(philox, "by_numpy", lambda index_N: False)


class BreachOfContractError(AssertionError):
    """An operation that a captured graph cannot hold."""


class Guard(TorchDispatchMode):
    """Fails at an operation that reads a value, brings one in, or has a data-dependent shape."""

    def __init__(self, device: torch.device = CPU) -> None:
        super().__init__()
        self.device, self.seen = device, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket._qualified_op_name.removeprefix("aten::")
        self.seen.add(name)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            if any(t.dtype in (torch.bool, torch.uint8) for t in given[1:]):
                raise BreachOfContractError(f"{func} with a mask depends on data")
        else:
            for tag, breach in FORBIDDEN_TAGS.items():
                if tag in func.tags:
                    raise BreachOfContractError(f"{func} {breach}")
        if name in ("lift", "lift_fresh", "lift_fresh_copy", "pin_memory", "_pin_memory"):
            raise BreachOfContractError(f"{func} brings host data in")
        out = func(*args, **(kwargs or {}))
        for tensor in [*given, *(t for t in tree_leaves(out) if isinstance(t, Tensor))]:
            if tensor.device.type != self.device.type:
                raise BreachOfContractError(f"{func} touches {tensor.device}")
        return out


def recipe_of(name: str, **changes: object) -> Recipe:
    data = Data(name="digits", resolution=16, channels=1, batch=8, flip=True)
    return replace(Recipe(data=data, step=STEPS[name], length=Length(steps=50)), **changes)


def started(recipe: Recipe, device: torch.device, precision: str = "fp32") -> Session:
    kind = "cpu" if device.type == "meta" else device.type
    return session.start(
        recipe,
        Ranks(0, 0, 1, device),
        Precision(precision, "test", kind),
        Compiler(False, "test"),
        50 * recipe.data.batch,
    )


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """A CPU picks the images to mirror by a shape that depends on data, which it may."""
    monkeypatch.setattr(image_batch, "_bytes", image_batch._indexed)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def opened(cache) -> Iterator[Callable[[Recipe, Session], Pipeline]]:
    """Opens the pipelines of sessions, and closes them."""
    pipelines = []

    def open_one(recipe: Recipe, live: Session) -> Pipeline:
        data = replace(recipe.data, cache=cache)
        dataset = find(data)
        pipeline = open_pipeline(dataset, data, live.clock, 0, live.key, say=lambda text: None)
        pipelines.append(pipeline)
        return pipeline

    yield open_one
    for pipeline in pipelines:
        pipeline.close()


def iterate(live: Session, pipeline: Pipeline, stats: Stats) -> None:
    """All that one captured iteration does."""
    stats.add(live.step(pipeline.batch(live.clock)))
    live.clock.advance()


def warmed_up(recipe: Recipe, device: torch.device, opened: Callable, precision: str = "fp32"):
    """A session after two iterations, with its pipeline ready for the next."""
    live = started(recipe, device, precision)
    pipeline, stats = opened(recipe, live), Stats(live.ranks)
    for _ in range(2):
        pipeline.ready(live.clock)
        iterate(live, pipeline, stats)
    pipeline.ready(live.clock)
    return live, pipeline, stats


# the guard itself

X = torch.ones(4)
BREACHES = {
    "item": lambda: X.sum().item(),
    "float": lambda: float(X[0]),
    "if": lambda: 1 if X.any() else 0,
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "nonzero": lambda: X.nonzero(),
    "where": lambda: torch.where(X > 0),
    "masked_select": lambda: X.masked_select(X > 0),
    "mask": lambda: X[X > 0],
    "mask write": lambda: X.clone().index_put_((X > 5,), X.sum()),
    "unique": lambda: X.unique(),
    "repeat": lambda: X.repeat_interleave(torch.ones_like(X, dtype=torch.int64)),
    "constant": lambda: torch.tensor(1.0),
    "array": lambda: torch.from_numpy(np.ones(2)) + 1,
    "copy": lambda: X.to("meta"),
    "elsewhere": lambda: torch.zeros(2, device="meta"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_the_guard_catches(breach):
    with pytest.raises(BreachOfContractError), Guard():
        BREACHES[breach]()


@pytest.mark.parametrize("read", [Tensor.tolist, Tensor.numpy, Tensor.item, float, bool])
def test_what_the_guard_may_not_see_fails_on_the_meta_device(read):
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        read(torch.zeros((), device=META))


# the iteration on real data


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("pipeline_name", ["resident", "torchvision"])
def test_an_iteration_keeps_the_contract(name, pipeline_name, opened):
    recipe = recipe_of(name)
    data = replace(recipe.data, pipeline=pipeline_name, workers=0)
    live, pipeline, stats = warmed_up(replace(recipe, data=data), CPU, opened)
    before = [p.detach().clone() for player in live.players.values() for p in player.parameters]
    with Guard() as guard:
        iterate(live, pipeline, stats)
    after = [p for player in live.players.values() for p in player.parameters]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert {"_fused_adam_", "_foreach_add_"} <= guard.seen
    backward = {"convolution_backward", "threshold_backward"}
    assert backward & guard.seen, "the guard did not see the backward pass"
    assert all(v == v for v in stats.read().values())


@pytest.mark.parametrize("name", ["adversarial", "variational"])
@pytest.mark.parametrize(
    ("change", "precision"), [({}, "bf16"), ({"accumulate": 2}, "fp32")], ids=["bf16", "accumulate"]
)
def test_an_iteration_keeps_the_contract_in_bf16_and_with_micro_batches(
    name, change, precision, opened
):
    live, pipeline, stats = warmed_up(recipe_of(name, **change), CPU, opened, precision)
    with Guard():
        iterate(live, pipeline, stats)


def test_a_step_that_reads_its_loss_breaks_the_contract(opened, monkeypatch):
    live, pipeline, stats = warmed_up(recipe_of("variational"), CPU, opened)
    plain = Player.update

    def reading(self, *args):
        values = plain(self, *args)
        assert float(values["autoencoder/loss"]) > 0
        return values

    monkeypatch.setattr(Player, "update", reading)
    with pytest.raises(BreachOfContractError, match="reads a value back"), Guard():
        iterate(live, pipeline, stats)


def test_a_skipped_update_keeps_the_contract(opened):
    live, pipeline, stats = warmed_up(recipe_of("variational"), CPU, opened)
    player = live.players["autoencoder"]
    with torch.no_grad():
        player.parameters[0].fill_(torch.nan)
    with Guard():
        iterate(live, pipeline, stats)
    assert int(player.bad_losses) == int(player.bad_gradients) == 1


# the iteration without data


@pytest.mark.parametrize("name", STEPS)
def test_an_iteration_runs_where_there_are_no_values_to_read(name):
    recipe = recipe_of(name)
    live, stats = started(recipe, META), Stats(Ranks(0, 0, 1, META))
    images = example_batch(recipe, 8)
    with live.rehearsing(), Guard(META) as guard:
        batch = Batch(images.images_NCHW, images.labels_N, live.clock.position_N())
        stats.add(live.step(batch))
        live.clock.advance()
    assert {"linear", "addmm", "convolution"} & guard.seen
    assert cost(recipe).flops_per_image > 0


def test_a_step_that_reads_its_loss_fails_on_the_meta_device(monkeypatch):
    plain = Player.update

    def reading(self, *args):
        values = plain(self, *args)
        values["autoencoder/loss"].tolist()
        return values

    monkeypatch.setattr(Player, "update", reading)
    with pytest.raises((RuntimeError, NotImplementedError)):
        cost(recipe_of("variational"))


# what a captured iteration reads and writes in place


@pytest.mark.parametrize("name", ["adversarial", "variational"])
def test_state_stays_at_its_address_from_iteration_to_iteration(name, opened):
    live, pipeline, stats = warmed_up(recipe_of(name), CPU, opened)

    def addresses() -> list[int]:
        tensors = [live.clock.device_images, live.key, *stats._sums.values(), *live.state_tensors()]
        for player in live.players.values():
            tensors += [*player.parameters, player.lr, player.bad_losses, player.bad_gradients]
            tensors += [t for s in player.optimizer.state.values() for t in s.values()]
            tensors += player.average.network.state_dict().values() if player.average else ()
        return [t.data_ptr() for t in tensors]

    before = addresses()
    iterate(live, pipeline, stats)
    assert addresses() == before


def test_the_learning_rate_is_a_device_tensor_that_the_optimizer_reads(opened):
    live, pipeline, stats = warmed_up(recipe_of("adversarial"), CPU, opened)
    for player in live.players.values():
        assert player.optimizer.param_groups[0]["lr"] is player.lr
        assert isinstance(player.lr, Tensor) and player.lr.device == live.clock.device
    live, pipeline, stats = warmed_up(recipe_of("joint"), CPU, opened)
    generator = live.players["generator"]
    generator.lr.zero_()
    before = [p.detach().clone() for p in generator.parameters]
    iterate(live, pipeline, stats)
    assert all(torch.equal(p, b) for p, b in zip(generator.parameters, before, strict=True))


def test_the_clock_moves_on_the_device_as_on_the_host(opened):
    live, pipeline, stats = warmed_up(recipe_of("variational"), CPU, opened)
    assert live.clock.images == int(live.clock.device_images) == 16
    iterate(live, pipeline, stats)
    assert live.clock.images == int(live.clock.device_images) == 24


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", STEPS)
def test_an_iteration_never_waits_for_the_gpu(name, opened):
    live, pipeline, stats = warmed_up(recipe_of(name), CUDA, opened, "bf16")
    torch.cuda.set_sync_debug_mode("error")
    try:
        iterate(live, pipeline, stats)
        with pytest.raises(RuntimeError, match="synchroniz"):
            stats.read()
    finally:
        torch.cuda.set_sync_debug_mode("default")
