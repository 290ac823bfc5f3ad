"""The baselines of CycleGAN, pix2pix and SRGAN: one iteration as today's public code writes it.

Eager float32 in contiguous NCHW; each image goes through each network by itself, pools are lists on
the host, Adam as torch makes it by default. Written from what pytorch-CycleGAN-and-pix2pix and
PyTorch-GAN's srgan.py do, on networks of the sizes that the engine trains, and from nothing else of
the engine.

Shapes: N batch, C channels, H height, W width.
"""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.plain import entropy

POOL = 50


def frozen(network: nn.Module, yes: bool) -> None:
    """Whether its parameters get no gradient."""
    for parameter in network.parameters():
        parameter.requires_grad = not yes


def squared(output: Tensor, target: float) -> Tensor:
    """Mean squared distance from a target that is made anew each time."""
    return F.mse_loss(output, torch.full_like(output, target))


class Pool:
    """Images of before, one of which is returned half of the time in place of a new one."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []

    def query(self, images_NCHW: Tensor) -> Tensor:
        """As many images as are given."""
        shown = []
        for image in images_NCHW:
            image = image.detach()[None]
            if len(self.images) < POOL:
                self.images.append(image)
            elif random.uniform(0, 1) > 0.5:
                place = random.randint(0, POOL - 1)
                image, self.images[place] = self.images[place].clone(), image
            shown.append(image)
        return torch.cat(shown)


@dataclass
class PlainCycle:
    """Generators with to_A and to_B, discriminators with of_A and of_B, and their optimizers."""

    generators: nn.Module
    discriminators: nn.Module
    optimizer_g: torch.optim.Optimizer
    optimizer_d: torch.optim.Optimizer
    cycle: float
    identity: float
    pool_A: Pool = field(default_factory=Pool)
    pool_B: Pool = field(default_factory=Pool)

    def iteration(self, real_A: Tensor, real_B: Tensor) -> tuple[Tensor, Tensor]:
        """Update generators and discriminators; the losses of the latter and the former."""
        G, D = self.generators, self.discriminators
        fake_B = G.to_B(real_A)
        back_A = G.to_A(fake_B)
        fake_A = G.to_A(real_B)
        back_B = G.to_B(fake_A)
        frozen(D, True)
        self.optimizer_g.zero_grad()
        same = F.l1_loss(G.to_B(real_B), real_B) + F.l1_loss(G.to_A(real_A), real_A)
        fooling = squared(D.of_B(fake_B), 1.0) + squared(D.of_A(fake_A), 1.0)
        back = F.l1_loss(back_A, real_A) + F.l1_loss(back_B, real_B)
        loss_g = fooling + self.cycle * back + self.cycle * self.identity * same
        loss_g.backward()
        self.optimizer_g.step()
        frozen(D, False)
        self.optimizer_d.zero_grad()
        loss_d = torch.zeros(())
        for critic, real, fake, pool in (
            (D.of_A, real_A, fake_A, self.pool_A),
            (D.of_B, real_B, fake_B, self.pool_B),
        ):
            judged = 0.5 * (squared(critic(real), 1.0) + squared(critic(pool.query(fake)), 0.0))
            judged.backward()
            loss_d = loss_d + judged.detach()
        self.optimizer_d.step()
        return loss_d, loss_g


@dataclass
class PlainPaired:
    """U-Net and conditional discriminator, and their optimizers."""

    generator: nn.Module
    discriminator: nn.Module
    optimizer_g: torch.optim.Optimizer
    optimizer_d: torch.optim.Optimizer
    l1: float
    reverse: bool

    def dropping(self, given: Tensor) -> Tensor:
        """Uniform numbers that decide what is dropped, (N, M)."""
        count = self.generator.draws(*given.shape[2:])
        return torch.rand(len(given), count, device=given.device)

    def iteration(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Update the discriminator and the generator; their losses."""
        given, goal = (right, left) if self.reverse else (left, right)
        fake = self.generator(given, self.dropping(given))
        frozen(self.discriminator, False)
        self.optimizer_d.zero_grad()
        loss_d = entropy(self.discriminator(given, fake.detach()), 0.0)
        loss_d = 0.5 * (loss_d + entropy(self.discriminator(given, goal), 1.0))
        loss_d.backward()
        self.optimizer_d.step()
        frozen(self.discriminator, True)
        self.optimizer_g.zero_grad()
        loss_g = entropy(self.discriminator(given, fake), 1.0) + self.l1 * F.l1_loss(fake, goal)
        loss_g.backward()
        self.optimizer_g.step()
        return loss_d, loss_g


@dataclass
class PlainEnlarging:
    """SRGAN's generator and discriminator, with the latter's features for the perceptual loss; the
    weights of features, pixels and the adversarial loss, and the optimizers."""

    generator: nn.Module
    discriminator: nn.Module
    optimizer_g: torch.optim.Optimizer
    optimizer_d: torch.optim.Optimizer
    weights: tuple[float, float, float]

    def iteration(self, small: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Update the generator and the discriminator; the losses of the latter and the former."""
        D = self.discriminator
        self.optimizer_g.zero_grad()
        made = self.generator(small)
        seen = D.features(made)
        features = F.mse_loss(seen, D.features(real).detach())
        parts = features, F.mse_loss(made, real), entropy(D.dense(seen), 1.0)
        loss_g = sum(weight * part for weight, part in zip(self.weights, parts, strict=True))
        loss_g.backward()
        self.optimizer_g.step()
        self.optimizer_d.zero_grad()
        loss_d = entropy(D(real), 1.0) + entropy(D(made.detach()), 0.0)
        loss_d.backward()
        self.optimizer_d.step()
        return loss_d, loss_g
