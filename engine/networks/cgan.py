"""Conditional GANs: a fully connected pair that is given the class, and DCGAN with a projection.

Mirza and Osindero 2014, "Conditional generative adversarial nets", for the fully connected pair, in
the widely used sizes (PyTorch-GAN, cgan.py) without its dropout, and with BatchNorm's usual epsilon
where that code passes 0.8 for it. Miyato and Koyama 2018, "cGANs with projection discriminator",
equation 3 and figure 14, for the projection.

Shapes: N batch, C channels, H height, W width, L latent.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from engine.networks.conditional import ConditionalNorm
from engine.networks.dcgan import init_weights, stages
from engine.networks.point import FromPoint
from engine.networks.spec import ImageSpec, Network


class BesideClass(nn.Module):
    """Layers that see the embedding of a class beside each flattened input."""

    def __init__(self, classes: int, layers: list[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, classes)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, label_N: Tensor) -> Tensor:
        """What the layers make of x (N, ...) and classes (N,)."""
        return self.layers(torch.cat([x.flatten(1), self.embedding(label_N).to(x)], 1))


@dataclass(frozen=True)
class Generator(Network):
    """Sizes of the fully connected generator."""

    latent: int = 100
    """Length of the latent vector."""
    classes: int = 10
    """Classes of the dataset."""
    hidden: tuple[int, ...] = (128, 256, 512, 1024)
    """Units of the hidden layers."""

    def build(self, images: ImageSpec) -> nn.Module:
        shape = (images.channels, images.resolution, images.resolution)
        sizes = (self.latent + self.classes, *self.hidden)
        layers: list[nn.Module] = []
        for before, after in zip(sizes, self.hidden, strict=False):
            layers.append(nn.Linear(before, after))
            if len(layers) > 1:  # none after the first
                layers.append(nn.BatchNorm1d(after))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        pixels = shape[0] * shape[1] * shape[2]
        layers += [nn.Linear(sizes[-1], pixels), nn.Tanh(), nn.Unflatten(1, shape)]
        return BesideClass(self.classes, layers)


@dataclass(frozen=True)
class Discriminator(Network):
    """Sizes of the fully connected discriminator."""

    alone: ClassVar[bool] = True
    classes: int = 10
    """Classes of the dataset."""
    hidden: tuple[int, ...] = (512, 512, 512)
    """Units of the hidden layers."""

    def build(self, images: ImageSpec) -> nn.Module:
        sizes = (images.channels * images.resolution**2 + self.classes, *self.hidden)
        layers: list[nn.Module] = []
        for before, after in zip(sizes, self.hidden, strict=False):
            layers += [nn.Linear(before, after), nn.LeakyReLU(0.2, inplace=True)]
        return BesideClass(self.classes, [*layers, nn.Linear(sizes[-1], 1), nn.Flatten(0)])


class ConditionalStages(nn.Module):
    """DCGAN's generator with BatchNorm by class."""

    def __init__(self, latent: int, widths: list[int], base: int, classes: int, out: int) -> None:
        super().__init__()
        doublings = (
            nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)
            for before, after in pairwise([*widths, out])
        )
        self.convolutions = nn.ModuleList([FromPoint(latent, widths[0], base), *doublings])
        self.norms = nn.ModuleList(ConditionalNorm(width, classes) for width in widths)

    def forward(self, z_NL: Tensor, label_N: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1]."""
        x_NCHW = z_NL[:, :, None, None]
        *inner, last = self.convolutions
        for convolution, norm in zip(inner, self.norms, strict=True):
            x_NCHW = norm(convolution(x_NCHW), label_N).relu()
        return last(x_NCHW).tanh()


@dataclass(frozen=True)
class ConvolutionalGenerator(Network):
    """Sizes of DCGAN's generator with BatchNorm by class."""

    latent: int = 100
    """Length of the latent vector."""
    classes: int = 10
    """Classes of the dataset."""
    width: int = 64
    """Channels before the last layer; doubled with each stage towards the input."""

    def build(self, images: ImageSpec) -> nn.Module:
        base, doublings = stages(images.resolution)
        widths = [self.width * 2**i for i in reversed(range(doublings))]
        layers = ConditionalStages(self.latent, widths, base, self.classes, images.channels)
        return layers.apply(init_weights)


class Projection(nn.Module):
    """f(x, y) = <embedding(y), phi(x)> + linear(phi(x)), phi the sum over the last maps' places
    (Miyato and Koyama 2018, equation 3)."""

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.linear = nn.Linear(width, 1)
        self.embedding = nn.Embedding(classes, width) if classes else None

    def forward(self, x_NCHW: Tensor, label_N: Tensor | None = None) -> Tensor:
        """Logits, (N,); of a discriminator without classes from the images alone."""
        features_NC = self.body(x_NCHW).sum((2, 3))
        logits_N = self.linear(features_NC)[:, 0]
        if self.embedding is None:
            return logits_N
        return logits_N + (self.embedding(label_N) * features_NC).sum(1)


@dataclass(frozen=True)
class ProjectionDiscriminator(Network):
    """Sizes of DCGAN's discriminator without BatchNorm, with a projection of the class; its maps
    end at 4 to 7 pixels. For use with --discriminator.spectral-norm."""

    alone: ClassVar[bool] = True
    classes: int = 10
    """Classes of the dataset."""
    width: int = 64
    """Channels after the first layer; doubled with each stage."""

    def build(self, images: ImageSpec) -> nn.Module:
        _, doublings = stages(images.resolution)
        widths = [images.channels, *(self.width * 2**i for i in range(doublings))]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        return Projection(nn.Sequential(*layers), widths[-1], self.classes)
