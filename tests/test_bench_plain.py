"""The baseline that bench_recipes compares with computes what the engine does.

In float64, all but the autoencoders: in float32 rounding alone turns over a ReLU now and then,
which a penalty's gradient shows in the next loss's fourth digit.
"""

from dataclasses import replace

import pytest
import torch

from bench.bench_recipes import (
    ALL,
    NAMES,
    captions_batch,
    noise_batch,
    plain_of,
    seen_by_plain,
)
from engine import session
from engine.compile import Compiler
from engine.networks.spectral import Normalised
from engine.settings import Recipe
from engine.steps.adversarial import LATENTS, MIXING, Adversarial
from engine.steps.autoencoder import NOISE as CODES
from engine.steps.autoencoder import Variational
from engine.steps.cycle import Cycle
from engine.steps.matching import DROPOUT as WORDS
from engine.steps.paired import DROPOUT, Paired
from engine.steps.progressive import FOOLING, Progressive
from engine.steps.super_resolution import SuperResolution
from engine.steps.text_to_image import NOISE, TextToImage
from kernels import philox
from pipelines.batch import Batch
from tests.players import CPU, FP32, RANKS, steady
from tests.runs import toy

ITERATIONS = 2


@pytest.fixture
def double(monkeypatch):
    """Networks and all noise are float64."""
    for name in ("normal", "uniform"):
        drawn = getattr(philox, name)
        monkeypatch.setattr(philox, name, lambda *a, drawn=drawn: drawn(*a).double())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small(name: str) -> Recipe:
    """At toy size, at most two updates of the critic for each of the generator."""
    given, changes = steady(toy(name)[0]), {}
    if isinstance(given.step, Progressive):
        changes["updates"] = (1,) * len(given.step.updates)
    elif isinstance(given.step, Adversarial):
        changes["critic_updates"] = min(given.step.critic_updates, ITERATIONS)
        changes["r1"] = 1e5 * given.step.r1  # the slope of a fresh small network is next to nothing
    return replace(given, step=replace(given.step, **changes))


def agree(plain, live) -> None:
    """Both estimates of the largest singular values are exact: power iterations approach them in
    different ways."""
    for player in live.players.values():
        for path, module in player.network.named_modules():
            if isinstance(module, Normalised):
                u_OO, _, v_II = torch.linalg.svd(module._rows(module.weight.detach()))
                module.singular_O.copy_(u_OO[:, 0])
                network = getattr(plain, player.name)
                norm = network.get_submodule(path).parametrizations.weight[0]
                norm._u.copy_(u_OO[:, 0])
                norm._v.copy_(v_II[0])


def give_noise(plain, live, given: Recipe) -> None:
    """Have plain draw what the engine draws for these images."""
    place_N, latent = live.clock.position_N(), plain.latent
    again = FOOLING if isinstance(given.step, Progressive) else LATENTS
    streams = iter((LATENTS, again))
    plain.noise = lambda _: philox.normal(live.key, next(streams), place_N, latent)
    plain.mixing = lambda _: philox.uniform(live.key, MIXING, place_N, 1)[:, 0]


OF_IMAGES = (Cycle, Paired, SuperResolution)
READING = [name for name in NAMES if isinstance(ALL[name].step, TextToImage)]
TRANSLATING = [name for name in NAMES if isinstance(ALL[name].step, OF_IMAGES)]
VARIATIONAL = [name for name in NAMES if isinstance(ALL[name].step, Variational)]
OTHERS = {*TRANSLATING, *READING, *VARIATIONAL}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OTHERS])
def test_plain_computes_the_same_losses(name, double):
    given = small(name)
    live = session.start(given, RANKS, FP32, Compiler(False, ""), 10**9)
    live.clock.seek(given.step.settles() * given.data.batch)
    plain = plain_of(given, CPU)
    agree(plain, live)
    real_NCHW, label_N, _ = noise_batch(given, CPU)
    seen = (label_N,) if given.step.classes() else ()
    learned = 0
    for _ in range(min(given.step.period(), ITERATIONS)):
        give_noise(plain, live, given)
        values = live.step(Batch(real_NCHW, label_N, live.clock.position_N()))
        live.clock.advance()
        loss_d, loss_g = plain.iteration(real_NCHW, *seen)
        assert loss_d == pytest.approx(values["discriminator/loss"].item(), rel=1e-4)
        assert (loss_g is not None) == ("generator/loss" in values)
        if loss_g is not None:
            assert loss_g == pytest.approx(values["generator/loss"].item(), rel=1e-4)
            learned += 1
    assert learned


@pytest.mark.parametrize("name", TRANSLATING)
def test_plain_translation_computes_the_same_losses(name, double):
    given = small(name)
    given = replace(given, data=replace(given.data, batch=2))
    live = session.start(given, RANKS, FP32, Compiler(False, ""), 10**9)
    live.clock.seek(given.step.settles() * given.data.batch)
    plain = plain_of(given, CPU)
    real_NCHW, _, pair_NCHW = noise_batch(given, CPU)
    own, other = given.step.players()
    for _ in range(ITERATIONS):  # a pool that is not full shows what it is given
        place_N = live.clock.position_N()
        plain.dropping = lambda x, n=place_N: philox.uniform(
            live.key, DROPOUT, n, plain.generator.draws(*x.shape[2:])
        )
        values = live.step(Batch(real_NCHW, None, place_N, pair_NCHW))
        live.clock.advance()
        loss_d, loss_g = plain.iteration(*seen_by_plain(given, CPU))
        assert loss_g.item() == pytest.approx(values[f"{own}/loss"].item(), rel=1e-6)
        assert loss_d.item() == pytest.approx(values[f"{other}/loss"].item(), rel=1e-6)


@pytest.mark.parametrize("name", READING)
def test_plain_text_to_image_computes_the_same_losses(name, double):
    given = small(name)
    live = session.start(given, RANKS, FP32, Compiler(False, ""), 10**9)
    plain = plain_of(given, CPU)
    real_NCHW, label_N, _ = noise_batch(given, CPU)
    said, share = captions_batch(given, CPU), plain.reader.dropout
    for _ in range(ITERATIONS):
        place_N = live.clock.position_N()
        plain.noise = lambda x, n=place_N: philox.normal(live.key, NOISE, n, plain.latent)

        def drop(vectors, n=place_N):
            uniform = philox.uniform(live.key, WORDS, n, vectors[0].numel()).view_as(vectors)
            return vectors * (uniform >= share) / (1 - share)

        plain.reader.drop = drop
        values = live.step(Batch(real_NCHW, label_N, place_N, None, *said))
        live.clock.advance()
        losses = plain.iteration(*seen_by_plain(given, CPU))
        for player, loss in zip(("discriminators", "generator", "encoders"), losses, strict=True):
            assert loss.item() == pytest.approx(values[f"{player}/loss"].item(), rel=1e-4), player


@pytest.mark.parametrize("name", VARIATIONAL)
def test_plain_autoencoder_computes_the_same_losses(name):
    given = small(name)  # in float32, as which an autoencoder hands on its latents
    live = session.start(given, RANKS, FP32, Compiler(False, ""), 10**9)
    plain, latent = plain_of(given, CPU), given.step.latent_dim()
    (image_NCHW,) = seen_by_plain(given, CPU)
    for _ in range(ITERATIONS):
        place_N = live.clock.position_N()
        plain.noise = lambda _, n=place_N: philox.normal(live.key, CODES, n, latent)
        values = live.step(Batch(image_NCHW, None, place_N))
        live.clock.advance()
        assert plain.iteration(image_NCHW) == pytest.approx(
            values["autoencoder/loss"].item(), rel=1e-5
        )
