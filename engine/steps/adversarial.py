"""Adversarial training: a discriminator update on each batch, and a generator update on every batch
or every few.

Goodfellow et al. 2014, "Generative adversarial nets", algorithm 1, by default with k = 1 and the
non-saturating generator loss. The generator learns from the fakes that the discriminator has just
learnt from (`Player.make` says when they are made once, and when again). Networks that are given
classes get those of the batch, for fakes too.

Shapes: N batch, C channels, H height, W width, L latent.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.algorithm import Algorithm, Networks, Values
from engine.augment import Kind, augment
from engine.compile import second_order
from engine.losses import ADVERSARIES
from engine.networks.conditional import ByClass, Choosing
from engine.networks.spec import Network
from engine.penalties import gradient_penalty, r1_penalty
from engine.player import Player, frozen
from engine.settings import PlayerSettings
from kernels import philox
from pipelines.batch import Batch

LATENTS = 1  # noise streams; 2 to 4 are those of pictures, samples, metrics
MIXING, REAL, FAKE, FOOLING = 5, 6, 7, 8
SLOW, EARLY, LONG = 100, 25, 500  # of critic_warmup

Kinds = tuple[Kind, ...]
Loss = Literal["nonsaturating", "minimax", "hinge", "least-squares", "wasserstein"]


@dataclass(frozen=True)
class Adversarial(Algorithm):
    """A generator and a discriminator."""

    generator: PlayerSettings
    discriminator: PlayerSettings
    loss: Loss = "nonsaturating"
    """What both minimise (engine/losses.py)."""
    critic_updates: int = 1
    """Discriminator updates for each of the generator."""
    critic_warmup: bool = False
    """100 of them for each of the generator's first 25 updates and every 500th, as in the code of
    Arjovsky et al. 2017."""
    joint: bool = False
    """Real and fake images go through the discriminator as one batch (its BatchNorm then sees their
    mixture); otherwise one after the other, as in the DCGAN paper's code, or as one batch where the
    discriminator looks at each image by itself, which is the same and faster."""
    r1: float = 0.0
    """Gamma of the R1 penalty on the discriminator's gradient at real images; 0 takes none."""
    r1_every: int = 16
    """Iterations between penalties, each then weighed so many times (Karras et al. 2020,
    "Analyzing and improving the image quality of StyleGAN", section 3.1)."""
    gp: float = 0.0
    """Lambda of the penalty on the distance of the discriminator's gradient from norm 1, between
    real and fake images (Gulrajani et al. 2017); 0 takes none."""
    clip_weights: float = 0.0
    """Bound to which the discriminator's parameters are clipped before each of its updates
    (Arjovsky et al. 2017, algorithm 1); 0 does not clip."""
    augment: Kinds = ()
    """Differentiable augmentation of what the discriminator sees: color, translation, cutout (Zhao
    et al. 2020)."""

    def check(self) -> None:
        for name in ("r1", "gp", "clip_weights"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{_flag(name)} {getattr(self, name)} must not be negative")
        for name in ("r1_every", "critic_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{_flag(name)} {getattr(self, name)} must be at least 1")
        if len(set(self.augment)) < len(self.augment):
            raise ValueError(f"--augment {' '.join(self.augment)}: name each kind once")
        bounds = (self.r1, self.gp, self.clip_weights, self.discriminator.spectral_norm)
        if self.loss == "wasserstein" and not any(bounds):
            raise ValueError(
                "--loss wasserstein needs a critic that is bounded: give --gp 10, "
                "--clip-weights 0.01, --r1 or --discriminator.spectral-norm"
            )
        both = {name: player.network.classes for name, player in self.players().items()}
        if len(set(both.values())) > 1:
            named = ", ".join(f"{name} {count}" for name, count in both.items())
            raise ValueError(
                f"the networks are for different numbers of classes ({named}): give "
                f"--generator.classes and --discriminator.classes alike"
            )

    def second_order(self) -> bool:
        return self.r1 > 0 or self.gp > 0

    def period(self) -> int:
        return math.lcm(self.critic_updates, self.r1_every if self.r1 else 1)

    def settles(self) -> int:
        return EARLY * SLOW if self.critic_warmup else 0

    def kinds(self) -> tuple[int, ...]:
        fooling = (SLOW if self.critic_warmup else self.critic_updates) - 1
        return tuple(sorted({0, fooling, *((1,) if self.r1 else ())}))

    def turns(self, iteration: int) -> tuple[bool, bool]:
        """Whether the generator is updated, and whether the discriminator is punished lazily."""
        punishes = self.r1 > 0 and iteration % self.r1_every == 0
        return self.generator_learns(iteration), punishes

    def generator_learns(self, iteration: int) -> bool:
        """Whether the generator is updated in this iteration, after the discriminator."""
        each = self.critic_updates
        if not self.critic_warmup:
            return (iteration + 1) % each == 0
        if iteration < EARLY * SLOW:
            return (iteration + 1) % SLOW == 0
        iteration -= EARLY * SLOW
        first = (LONG - EARLY) * each  # until the 500th update
        if iteration < first:
            return (iteration + 1) % each == 0
        place = (iteration - first) % (SLOW + (LONG - 1) * each)
        return place == SLOW - 1 or (place >= SLOW and (place - SLOW + 1) % each == 0)

    def _alone(self) -> bool:
        """Whether it is all the same to the discriminator what else is in a batch, so that one
        forward of all images does for two; spectral normalisation moves with each."""
        return self.discriminator.network.alone and not self.discriminator.spectral_norm

    def classes(self) -> int:
        return self.generator.network.classes

    def latent_dim(self) -> int:
        return self.generator.network.latent + self.classes()

    def sampler_settings(self) -> Network:
        network = self.generator.network
        return ByClass(network) if self.classes() else network

    def sampler(self, networks: Networks) -> nn.Module:
        network = networks["generator"]
        return Choosing(network, self.generator.network.latent) if self.classes() else network

    def start(self, players: dict[str, Player], key: Tensor) -> Callable[[Batch], Values]:
        make = partial(make_fakes, latent=self.generator.network.latent)
        seen = {"loss": self.loss, "kinds": self.augment}
        fool = partial(generator_update, joint=self.joint, **seen)
        seen["joint"] = self.joint or self._alone()
        judge = partial(discriminator_update, **seen)
        weight = self.r1 / 2 * self.r1_every
        punish = partial(penalised_update, r1=weight, gp=self.gp, **seen)
        mix = partial(penalised_update, r1=0.0, gp=self.gp, **seen)
        generator, discriminator = players["generator"], players["discriminator"]
        generator.stride = self.critic_updates
        if self.gp and any(isinstance(m, _BatchNorm) for m in discriminator.network.modules()):
            raise ValueError(
                "--gp needs a discriminator without BatchNorm, which lets other images into the "
                "gradient at one (Gulrajani et al. 2017, section 4): give --r1 in its place, or "
                "take a recipe such as wgan_gp_celeba"
            )

        def step(batch: Batch) -> Values:
            where = (batch.labels_N if self.classes() else None, key, batch.position_N)
            learns, punishes = self.turns(discriminator.clock.iteration)
            made = generator.make(make, *where, hold=learns)
            if self.clip_weights:
                discriminator.clip_weights(self.clip_weights)
            update = punish if punishes else mix if self.gp else judge
            values = discriminator.update(update, batch.images_NCHW, made.tensor, *where)
            if learns:
                with frozen(discriminator) as critic:
                    values |= generator.update_made(made, fool, critic, batch.images_NCHW, *where)
            return values

        return step


def _flag(name: str) -> str:
    return name.replace("_", "-")


def given(label_N: Tensor | None) -> tuple[Tensor, ...]:
    """What a network is given besides images or latents."""
    return () if label_N is None else (label_N,)


def make_fakes(
    generator: nn.Module, label_N: Tensor | None, key: Tensor, position_N: Tensor, *, latent: int
) -> Tensor:
    """G(z), (N, C, H, W), for the latents of these places in the stream of images."""
    return generator(philox.normal(key, LATENTS, position_N, latent), *given(label_N))


def discriminator_update(
    discriminator: nn.Module,
    real_NCHW: Tensor,
    fake_NCHW: Tensor,
    label_N: Tensor | None,
    key: Tensor,
    position_N: Tensor,
    *,
    loss: Loss,
    joint: bool,
    kinds: Kinds,
) -> tuple[Tensor, Values]:
    """The discriminator's loss, and what it thinks of real and of fake images."""
    real_NCHW = augment(real_NCHW, kinds, key, REAL, position_N)
    fake_NCHW = augment(fake_NCHW, kinds, key, FAKE, position_N)
    if joint:
        real_N, fake_N = judge_together(discriminator, real_NCHW, fake_NCHW, label_N)
    else:
        real_N, fake_N = (discriminator(x, *given(label_N)) for x in (real_NCHW, fake_NCHW))
    return ADVERSARIES[loss][0](real_N, fake_N), opinions(real_N, fake_N, loss)


@second_order
def penalised_update(
    discriminator: nn.Module,
    real_NCHW: Tensor,
    fake_NCHW: Tensor,
    label_N: Tensor | None,
    key: Tensor,
    position_N: Tensor,
    *,
    loss: Loss,
    joint: bool,
    kinds: Kinds,
    r1: float,
    gp: float,
) -> tuple[Tensor, Values]:
    """`discriminator_update` with so much of each penalty, which are reported too. They are taken
    at images without augmentation."""
    total, values = discriminator_update(
        discriminator,
        *(real_NCHW, fake_NCHW, label_N, key, position_N),
        loss=loss,
        joint=joint,
        kinds=kinds,
    )
    if r1:
        penalty = r1_penalty(discriminator, real_NCHW, *given(label_N))
        total, values = total + r1 * penalty, values | {"r1": penalty.detach()}
    if gp:
        alpha_N = philox.uniform(key, MIXING, position_N, 1)[:, 0]
        penalty = gradient_penalty(discriminator, real_NCHW, fake_NCHW, alpha_N, *given(label_N))
        total, values = total + gp * penalty, values | {"gp": penalty.detach()}
    return total, values


def generator_update(
    fake_NCHW: Tensor,
    critic: nn.Module,
    real_NCHW: Tensor,
    label_N: Tensor | None,
    key: Tensor,
    position_N: Tensor,
    *,
    loss: Loss,
    joint: bool,
    kinds: Kinds,
) -> tuple[Tensor, Values]:
    """The generator's loss, for the fakes that the discriminator has just judged, in the company in
    which it judged them."""
    fake_NCHW = augment(fake_NCHW, kinds, key, FOOLING, position_N)
    if joint:
        real_NCHW = augment(real_NCHW, kinds, key, REAL, position_N)
        fake_N = judge_together(critic, real_NCHW, fake_NCHW, label_N)[1]
    else:
        fake_N = critic(fake_NCHW, *given(label_N))
    return ADVERSARIES[loss][1](fake_N), {}


def judge_together(
    discriminator: nn.Module, real_NCHW: Tensor, fake_NCHW: Tensor, label_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Logits (N,) of real and of fake images that go through the discriminator as one batch."""
    both_NCHW = torch.cat([real_NCHW, fake_NCHW.to(real_NCHW)])
    both_N = () if label_N is None else (torch.cat([label_N, label_N]),)
    real_N, fake_N = discriminator(both_NCHW, *both_N).chunk(2)
    return real_N, fake_N


def opinions(real_N: Tensor, fake_N: Tensor, loss: Loss) -> Values:
    """D(x) and D(G(z)) where the outputs are logits; else the mean outputs and, for Wasserstein's
    critic, their difference, an estimate of the distance (Arjovsky et al. 2017, figure 3)."""
    real, fake = real_N.detach().float(), fake_N.detach().float()
    if loss in ("nonsaturating", "minimax"):
        return {"real": real.sigmoid().mean(), "fake": fake.sigmoid().mean()}
    means = {"output_real": real.mean(), "output_fake": fake.mean()}
    if loss != "wasserstein":
        return means
    return means | {"distance": real.mean() - fake.mean()}
