"""GAN-EM: generator of K classes, discriminator that knows them, and E-net.

Zhao et al. 2019, "GAN-EM: GAN based EM learning framework". The E-net's layers and widths are those
of the authors' code for MNIST (https://github.com/zhaowt61/GAN-EM), less its BatchNorm: there it
never leaves eval mode, so it is an affine map. Generator and discriminator are convolutional there
and fully connected here, at a tenth of the cost.

Shapes: N batch, C channels, H height, W width, L latent, K classes.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.networks.spec import ImageSpec, Network


class ClassGenerator(nn.Module):
    """Layers that make images from a class, one-hot, and a latent vector of so much spread."""

    def __init__(self, layers: nn.Module, clusters: int, spread: float) -> None:
        super().__init__()
        self.layers = layers
        self.clusters = clusters
        self.spread = spread

    def forward(self, z_NL: Tensor, label_N: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] from standard normal z_NL and int64 label_N."""
        class_NK = F.one_hot(label_N, self.clusters).to(z_NL)
        return self.layers(torch.cat([class_NK, self.spread * z_NL], dim=1))


@dataclass(frozen=True)
class Generator(Network):
    """Sizes of the fully connected generator."""

    latent: int = 30
    """Length of the latent vector, without the class."""
    clusters: int = 10
    """Clusters to find."""
    hidden: tuple[int, ...] = (256, 512)
    """Units of the hidden layers, with BatchNorm."""
    spread: float = 0.3
    """Standard deviation of the latent vector beside the class, which is one-hot; about that of
    U[0, 1], from which the authors' code draws it. Beside a latent vector of unit variance the
    class would be a small part of what the first layer sees."""

    def build(self, images: ImageSpec) -> nn.Module:
        shape = (images.channels, images.resolution, images.resolution)
        layers: list[nn.Module] = []
        for before, after in pairwise((self.latent + self.clusters, *self.hidden)):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(True)]
        pixels = shape[0] * shape[1] * shape[2]
        layers += [nn.Linear(self.hidden[-1], pixels), nn.Tanh(), nn.Unflatten(1, shape)]
        return ClassGenerator(nn.Sequential(*layers), self.clusters, self.spread)


@dataclass(frozen=True)
class Discriminator(Network):
    """Sizes of the fully connected discriminator: K logits of "a real image of this class", and
    one of "fake"."""

    clusters: int = 10
    """Clusters to find."""
    hidden: tuple[int, ...] = (512, 256)
    """Units of the hidden layers."""

    def build(self, images: ImageSpec) -> nn.Module:
        pixels = images.channels * images.resolution**2
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise((pixels, *self.hidden)):
            layers += [nn.Linear(before, after), nn.LeakyReLU(0.2, inplace=True)]
        return nn.Sequential(*layers, nn.Linear(self.hidden[-1], self.clusters + 1))


@dataclass(frozen=True)
class Encoder(Network):
    """Sizes of the E-net: K logits, the softmax of which are an image's responsibilities."""

    clusters: int = 10
    """Clusters to find."""
    width: int = 64
    """Channels after the first of three 4x4 convolutions of stride 2, doubled with each."""
    hidden: int = 1024
    """Units of the fully connected layer."""

    def build(self, images: ImageSpec) -> nn.Module:
        size = images.resolution // 8
        if not size:
            raise ValueError(
                f"data.resolution={images.resolution} does not halve three times, as the E-net "
                f"needs; give at least 8"
            )
        channels = (images.channels, self.width, 2 * self.width, 4 * self.width)
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        layers += [nn.Flatten(), nn.Linear(channels[-1] * size * size, self.hidden)]
        layers += [nn.LeakyReLU(0.2, inplace=True), nn.Linear(self.hidden, self.clusters)]
        return nn.Sequential(*layers)
