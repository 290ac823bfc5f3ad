"""Progressive growing: a generator and a critic that begin with the smallest images, and to which
layers of twice the resolution are faded in, one level after the other.

Karras et al. 2018, https://arxiv.org/abs/1710.10196, sections 2 and A.1, with the WGAN-GP loss as
in the authors' loss.py: the critic, updated once for each update of the generator, minimises

    E[D(G(z))] - E[D(x)] + gp E[(||grad D(x')|| - 1)^2] + drift E[D(x)^2],   x' between x and G(z).

The level, and how far it is faded in, are functions of the clock. Real images are made as small as
the level's, and are as blurred while it fades in. With each new level the optimizers begin anew.

A level has one graph, whether it fades in (alpha < 1) or rests (alpha = 1). Levels of large images
take smaller batches, as several updates on parts of one batch; the parts are made of groups of
consecutive images, so that however many ranks there are, an update sees the same images.

Shapes: N batch, C channels, H height, W width, L latent.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.algorithm import Algorithm, Networks, Values
from engine.compile import second_order
from engine.losses import critic_generator_loss, wasserstein_critic_loss
from engine.networks.progan import STEPS, Grown, GrownGenerator, faded, levels, untouched
from engine.networks.spec import Network
from engine.penalties import gradient_penalty
from engine.player import Player, frozen
from engine.settings import PlayerSettings
from kernels import philox
from pipelines.batch import Batch, Clock
from pipelines.settings import Data

LATENTS, MIXING, FOOLING = 1, 5, 8  # noise streams


class Level(NamedTuple):
    """What a level computes, and on which parts of a rank's images."""

    make: Callable
    judge: Callable
    fool: Callable
    parts: list[Tensor]
    """Places of each update's images in the batch, int64 (N,)."""


@dataclass(frozen=True)
class Progressive(Algorithm):
    """A generator and a discriminator that grow together."""

    generator: PlayerSettings
    discriminator: PlayerSettings
    stable_steps: int = 4688
    """Iterations for which a level rests once it is there; at least so many for the last."""
    fade_steps: int = 4688
    """Iterations in which a level is faded in."""
    updates: tuple[int, ...] = (1, 1, 1, 2, 4)
    """Updates of both in an iteration, each on an equal part of the batch: a number for each level,
    from the smallest images up; what is too many is not used."""
    gp: float = 10.0
    """Lambda of the penalty on the distance of the discriminator's gradient from norm 1, between
    real and fake images (Gulrajani et al. 2017)."""
    drift: float = 0.001
    """Weight of the penalty on the square of the discriminator's outputs at real images."""

    def check(self) -> None:
        counts = {"stable-steps": self.stable_steps, "fade-steps": self.fade_steps}
        for flag, count in (counts | {"updates": min(self.updates, default=0)}).items():
            if count < 1:
                raise ValueError(f"--{flag} must be at least 1")
        if self.gp <= 0:
            raise ValueError(f"--gp {self.gp} must be positive")
        if self.drift < 0:
            raise ValueError(f"--drift {self.drift} must not be negative")

    def check_data(self, data: Data) -> None:
        count = levels(data.resolution)
        if count > len(self.updates):
            raise ValueError(
                f"--updates has {len(self.updates)} numbers, but there are {count} levels up to "
                f"data.resolution={data.resolution}: give one for each"
            )
        if wrong := [n for n in self.updates[:count] if data.batch % n]:
            raise ValueError(
                f"data.batch={data.batch} does not divide into {wrong[0]} updates; change "
                f"--data.batch or --updates"
            )

    def second_order(self) -> bool:
        return True

    def level(self, iteration: int) -> int:
        """The level of an iteration, were there no last one."""
        return (iteration + self.fade_steps) // (self.stable_steps + self.fade_steps)

    def turns(self, iteration: int) -> tuple[int, bool]:
        """The level, and whether it begins, with fresh optimizers."""
        level = self.level(iteration)
        return level, level > 0 and iteration == self.begins(level)

    def begins(self, level: int) -> int:
        """The first iteration of a level."""
        return max(level * (self.stable_steps + self.fade_steps) - self.fade_steps, 0)

    def alpha(self, level: int, iteration: Tensor) -> Tensor:
        """How far a level is faded in at an iteration, int64 (): float32 () in [0, 1]."""
        if level == 0:
            return torch.ones_like(iteration, dtype=torch.float32)
        return ((iteration - self.begins(level)).float() / self.fade_steps).clamp(0.0, 1.0)

    def kinds(self) -> tuple[int, ...]:
        """An iteration of each level, at rest: while it is faded in, all is computed too."""
        return (0, *(self.begins(k) + self.fade_steps for k in range(1, len(self.updates))))

    def settles(self) -> int:
        return self.kinds()[-1]

    def latent_dim(self) -> int:
        return self.generator.network.latent

    def sampler_settings(self) -> Network:
        return GrownGenerator(self.generator.network)

    def sampler(self, networks: Networks) -> nn.Module:
        return Grown(networks["generator"])

    def start(self, players: dict[str, Player], key: Tensor) -> Callable[[Batch], Values]:
        generator, discriminator = players["generator"], players["discriminator"]
        clock, network = generator.clock, generator.network
        all_levels = [self._level(level, generator) for level in range(network.top + 1)]

        def step(batch: Batch) -> Values:
            level, begins = self.turns(clock.iteration)
            if begins and level <= network.top:
                for player in players.values():
                    player.restart()
            level = min(level, network.top)
            alpha = self.alpha(level, clock.device_images // clock.batch)
            growth = level - 1 + alpha
            network.growth.copy_((growth * STEPS).round())
            now, values = all_levels[level], {}
            generator.stride = 1 / len(now.parts)
            for place_N in now.parts:
                real_NCHW, position_N = batch.images_NCHW, batch.position_N
                if len(now.parts) > 1:
                    real_NCHW, position_N = real_NCHW[place_N], position_N[place_N]
                where = (alpha, key, position_N)
                fake_NCHW = generator.infer(now.make, *where)
                values = discriminator.update(now.judge, real_NCHW, fake_NCHW, *where)
                with frozen(discriminator) as critic:
                    values |= generator.update(now.fool, critic, *where)
            return values | {"generator/level": growth}

        return step

    def _level(self, level: int, generator: Player) -> Level:
        seen = {"level": level, "latent": self.generator.network.latent}
        times = generator.network.top - level
        return Level(
            partial(make_fakes, stream=LATENTS, **seen),
            partial(discriminator_update, level=level, times=times, gp=self.gp, drift=self.drift),
            partial(generator_update, **seen),
            parts_of(generator.clock, self.updates[level], generator.accumulate),
        )


def parts_of(clock: Clock, updates: int, accumulate: int, group: int = 4) -> list[Tensor]:
    """Places of the images of each update in this rank's share of the batch: groups of neighbours
    in turn. Raises ValueError where the share cannot be divided."""
    share, divisor = clock.batch // clock.world_size, clock.world_size * updates * accumulate
    if clock.batch % divisor and clock.device.type != "meta":  # where counting takes few images
        raise ValueError(
            f"data.batch={clock.batch} on {clock.world_size} rank(s) does not divide into "
            f"{updates} updates (--updates) of {accumulate} micro-batches (--accumulate); try "
            f"--data.batch {max(clock.batch // divisor, 1) * divisor}"
        )
    updates = math.gcd(updates, share)
    together = math.gcd(share // updates, group)
    place_N = torch.arange(share, device=clock.device)
    return list(place_N.view(-1, updates, together).movedim(1, 0).flatten(1))


def make_fakes(
    generator: nn.Module,
    alpha: Tensor,
    key: Tensor,
    position_N: Tensor,
    *,
    stream: int,
    level: int,
    latent: int,
) -> Tensor:
    """G(z), (N, C, H, W), for the latents of these places in the stream of images."""
    return generator(philox.normal(key, stream, position_N, latent), level, alpha)


@second_order
def discriminator_update(
    discriminator: nn.Module,
    real_NCHW: Tensor,
    fake_NCHW: Tensor,
    alpha: Tensor,
    key: Tensor,
    position_N: Tensor,
    *,
    level: int,
    times: int,
    gp: float,
    drift: float,
) -> tuple[Tensor, Values]:
    """The critic's loss with its penalties. Real images come in the last level's resolution, and
    are halved so many times."""
    real_NCHW = faded(real_NCHW, times, alpha if level else None)
    real_N, fake_N = (discriminator(x, level, alpha).float() for x in (real_NCHW, fake_NCHW))
    loss = wasserstein_critic_loss(real_N, fake_N) + drift * real_N.square().mean()
    values = {"output_real": real_N.detach().mean(), "output_fake": fake_N.detach().mean()}
    values["distance"] = values["output_real"] - values["output_fake"]
    mixing_N = philox.uniform(key, MIXING, position_N, 1)[:, 0]
    penalty = gradient_penalty(discriminator, real_NCHW, fake_NCHW, mixing_N, level, alpha)
    loss, values = loss + gp * penalty, values | {"gp": penalty.detach()}
    return loss + untouched(discriminator.unused(level)), values


def generator_update(
    generator: nn.Module,
    critic: nn.Module,
    alpha: Tensor,
    key: Tensor,
    position_N: Tensor,
    *,
    level: int,
    latent: int,
) -> tuple[Tensor, Values]:
    """The generator's loss, for fakes of other latents than the critic has just judged."""
    where = (alpha, key, position_N)
    fake_NCHW = make_fakes(generator, *where, stream=FOOLING, level=level, latent=latent)
    loss = critic_generator_loss(critic(fake_NCHW, level, alpha))
    return loss + untouched(generator.unused(level)), {}
