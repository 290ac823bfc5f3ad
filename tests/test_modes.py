"""Every adversarial loss learns a grid of 25 Gaussians: which modes does it find, and how many of
its samples lie in one? The test bed of Dumoulin et al. 2017 and of many since."""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from engine import session
from engine.compile import Compiler
from engine.losses import ADVERSARIES
from engine.networks.spec import ImageSpec, Network
from engine.settings import Adam, Length, PlayerSettings, Recipe
from engine.steps.adversarial import Adversarial
from kernels import philox
from pipelines.batch import Batch
from pipelines.settings import Data
from tests.players import FP32, RANKS

BATCH, STEPS, SAMPLES = 256, 3000, 4000
SPREAD, NEAR = 0.02, 4  # of a mode; standard deviations within which a sample belongs to it
CENTRES = torch.cartesian_prod(*[torch.linspace(-0.8, 0.8, 5)] * 2)
GAUSSIANS = 77  # noise stream


@dataclass(frozen=True)
class Layers(Network):
    """Four linear layers from `before` to `after` numbers, seen as images of one pixel."""

    before: int
    after: int
    latent: int = 4

    def build(self, images: ImageSpec) -> nn.Module:
        sizes = [self.before, 128, 128, 128]
        layers = [nn.Flatten()]
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.LeakyReLU(0.2)]
        shape = nn.Unflatten(1, (2, 1, 1)) if self.after == 2 else nn.Flatten(0)
        return nn.Sequential(*layers, nn.Linear(128, self.after), shape)


def reals(key: Tensor, place_N: Tensor) -> Tensor:
    """Points of the grid, (N, 2, 1, 1)."""
    mode_N = (philox.uniform(key, GAUSSIANS, place_N, 1)[:, 0] * len(CENTRES)).long()
    points_N2 = CENTRES[mode_N] + SPREAD * philox.normal(key, GAUSSIANS + 1, place_N, 2)
    return points_N2[:, :, None, None]


def trained(loss: str, seed: int) -> Tensor:
    """Samples (N, 2) of a generator trained with this loss."""
    step = Adversarial(
        generator=PlayerSettings(Layers(4, 2), Adam(1e-3, betas=(0.0, 0.99)), ema_kimg=20),
        discriminator=PlayerSettings(Layers(2, 1), Adam(1e-3, betas=(0.0, 0.99))),
        loss=loss,
        r1=0.02,
        r1_every=4,
    )
    if loss == "wasserstein":
        step = replace(step, r1=0.0, gp=0.1, critic_updates=2)
    data = replace(Data(resolution=1, batch=BATCH), channels=2)
    recipe = Recipe(step, data, Length(steps=STEPS), seed=seed)
    live = session.start(recipe, RANKS, FP32, Compiler(False, "test"), STEPS * BATCH)
    for _ in range(STEPS):
        place_N = live.clock.position_N()
        live.step(Batch(reals(live.key, place_N), None, place_N))
        live.clock.advance()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        z_NL = torch.randn(SAMPLES, 4, generator=generator)
        return live.players["generator"].sampler(z_NL).flatten(1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("loss", ADVERSARIES)
def test_every_loss_finds_the_modes_of_a_grid(loss, seed):
    distance_N, mode_N = torch.cdist(trained(loss, seed), CENTRES).min(1)
    good_N = distance_N < NEAR * SPREAD
    found = torch.bincount(mode_N[good_N], minlength=25)
    modes, good = int((found >= SAMPLES / 25 / 10).sum()), float(good_N.float().mean())
    assert modes >= 22 and good >= 0.6, (modes, good)
