"""Adversarial training: one discriminator and one generator update on each batch.

Goodfellow et al. 2014, "Generative adversarial nets", algorithm 1 with k = 1, with the
non-saturating generator loss. The discriminator learns from fakes that carry no gradient; the
generator makes the same fakes again from the same latents, so that only one network's activations
are held at a time.

Shapes: N batch, C channels, H height, W width, L latent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from engine.compile import second_order
from engine.losses import discriminator_loss, nonsaturating_loss
from engine.networks.norms import statistics_kept
from engine.networks.spec import Network
from engine.penalties import r1_penalty
from engine.player import Player, frozen
from engine.settings import Algorithm, Networks, PlayerSettings, Values
from kernels import philox
from pipelines.batch import Batch

LATENTS = 1  # noise stream


@dataclass(frozen=True)
class Adversarial(Algorithm):
    """A generator and a discriminator."""

    generator: PlayerSettings
    discriminator: PlayerSettings
    joint: bool = False
    """Real and fake images go through the discriminator as one batch (its BatchNorm then sees their
    mixture); otherwise one after the other, as in the DCGAN paper's code."""
    r1: float = 0.0
    """Gamma of the R1 penalty on the discriminator's gradient at real images; 0 takes none."""
    r1_every: int = 16
    """Iterations between penalties, each then weighed so many times (Karras et al. 2020,
    "Analyzing and improving the image quality of StyleGAN", section 3.1)."""

    def check(self) -> None:
        if self.r1 < 0 or self.r1_every < 1:
            raise ValueError("--r1 must not be negative, --r1-every be at least 1")

    def second_order(self) -> bool:
        return self.r1 > 0

    def period(self) -> int:
        return self.r1_every if self.r1 else 1

    def latent_dim(self) -> int:
        return self.generator.network.latent

    def sampler_settings(self) -> Network:
        return self.generator.network

    def sampler(self, networks: Networks) -> nn.Module:
        return networks["generator"]

    def start(self, players: dict[str, Player], key: Tensor) -> Callable[[Batch], Values]:
        make = partial(make_fakes, latent=self.latent_dim())
        judge = partial(discriminator_update, joint=self.joint)
        punish = partial(penalised_update, joint=self.joint, weight=self.r1 / 2 * self.r1_every)
        fool = partial(generator_update, latent=self.latent_dim(), joint=self.joint)
        generator, discriminator = players["generator"], players["discriminator"]

        def step(batch: Batch) -> Values:
            fake_NCHW = generator.infer(make, key, batch.position_N)
            turn = self.r1 and discriminator.clock.iteration % self.r1_every == 0
            values = discriminator.update(punish if turn else judge, batch.images_NCHW, fake_NCHW)
            with frozen(discriminator) as critic, statistics_kept(generator.network):
                values |= generator.update(fool, critic, batch.images_NCHW, key, batch.position_N)
            return values

        return step


def make_fakes(generator: nn.Module, key: Tensor, position_N: Tensor, *, latent: int) -> Tensor:
    """G(z), (N, C, H, W), for the latents of these places in the stream of images."""
    return generator(philox.normal(key, LATENTS, position_N, latent))


def discriminator_update(
    discriminator: nn.Module, real_NCHW: Tensor, fake_NCHW: Tensor, *, joint: bool
) -> tuple[Tensor, Values]:
    """The discriminator's loss, and its mean opinions D(x) and D(G(z))."""
    if joint:
        real_N, fake_N = judge_together(discriminator, real_NCHW, fake_NCHW)
    else:
        real_N, fake_N = discriminator(real_NCHW), discriminator(fake_NCHW)
    opinions = {"real": _mean_opinion(real_N), "fake": _mean_opinion(fake_N)}
    return discriminator_loss(real_N, fake_N), opinions


@second_order
def penalised_update(
    discriminator: nn.Module,
    real_NCHW: Tensor,
    fake_NCHW: Tensor,
    *,
    joint: bool,
    weight: float,
) -> tuple[Tensor, Values]:
    """`discriminator_update` with so much of the R1 penalty, which is reported too."""
    loss, values = discriminator_update(discriminator, real_NCHW, fake_NCHW, joint=joint)
    r1 = r1_penalty(discriminator, real_NCHW)
    return loss + weight * r1, values | {"r1": r1.detach()}


def generator_update(
    generator: nn.Module,
    critic: nn.Module,
    real_NCHW: Tensor,
    key: Tensor,
    position_N: Tensor,
    *,
    latent: int,
    joint: bool,
) -> tuple[Tensor, Values]:
    """The generator's non-saturating loss, for the fakes that the discriminator has just judged,
    in the company in which it judged them."""
    fake_NCHW = generator(philox.normal(key, LATENTS, position_N, latent))
    fake_N = judge_together(critic, real_NCHW, fake_NCHW)[1] if joint else critic(fake_NCHW)
    return nonsaturating_loss(fake_N), {}


def judge_together(
    discriminator: nn.Module, real_NCHW: Tensor, fake_NCHW: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits (N,) of real and of fake images that go through the discriminator as one batch."""
    real_N, fake_N = discriminator(torch.cat([real_NCHW, fake_NCHW.to(real_NCHW)])).chunk(2)
    return real_N, fake_N


def _mean_opinion(logits_N: Tensor) -> Tensor:
    return logits_N.detach().float().sigmoid().mean()
