"""The plain GAN for small grey images: fully connected generator, small convolutional critic of it.

Goodfellow et al. 2014 used fully connected generators on MNIST; the sizes here are the widely
taught ones: generator latent-256-512-1024-pixels with BatchNorm and LeakyReLU, discriminator with
5x5 convolutions of 32, 64 and 128 channels, stride 2.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from engine.networks.dcgan import Logits, init_weights
from engine.networks.spec import ImageSpec, Network


@dataclass(frozen=True)
class Generator(Network):
    """Sizes of the fully connected generator."""

    latent: int = 100
    """Length of the latent vector."""
    hidden: tuple[int, ...] = (256, 512, 1024)
    """Units of the hidden layers."""

    def build(self, images: ImageSpec) -> nn.Module:
        shape = (images.channels, images.resolution, images.resolution)
        layers: list[nn.Module] = []
        for before, after in zip((self.latent, *self.hidden), self.hidden, strict=False):
            layers += [
                nn.Linear(before, after, bias=False),
                nn.BatchNorm1d(after),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        pixels = shape[0] * shape[1] * shape[2]
        layers += [nn.Linear(self.hidden[-1], pixels), nn.Tanh(), nn.Unflatten(1, shape)]
        return nn.Sequential(*layers)


@dataclass(frozen=True)
class Discriminator(Network):
    """Sizes of the convolutional discriminator."""

    alone: ClassVar[bool] = True
    channels: tuple[int, ...] = (32, 64, 128)
    """Output channels of the 5x5 convolutions, each of stride 2."""

    def build(self, images: ImageSpec) -> nn.Module:
        layers: list[nn.Module] = []
        size = images.resolution
        for before, after in zip((images.channels, *self.channels), self.channels, strict=False):
            layers += [nn.Conv2d(before, after, 5, 2, 2), nn.LeakyReLU(0.2, inplace=True)]
            size = -(-size // 2)
        layers += [nn.Flatten(), nn.Linear(self.channels[-1] * size * size, 1)]
        return Logits(layers).apply(init_weights)
