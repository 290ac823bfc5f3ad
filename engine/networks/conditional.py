"""Networks that are given classes: how a latent vector alone chooses one, and where it goes in.

Shapes: N batch, C channels, H height, W width, L latent, K classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.networks.spec import ImageSpec, Network


class Choosing(nn.Module):
    """A class-conditional generator of latents (N, L + K), whose last K numbers choose the class
    by the largest of them: standard normal ones choose every class equally often."""

    def __init__(self, generator: nn.Module, latent: int) -> None:
        super().__init__()
        self.generator, self.latent = generator, latent

    def forward(self, z_NL: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1]."""
        return self.generator(z_NL[:, : self.latent], z_NL[:, self.latent :].argmax(1))


@dataclass(frozen=True)
class ByClass(Network):
    """Sizes of that generator."""

    generator: Network
    """Sizes of the network that is given the class."""

    def build(self, images: ImageSpec) -> nn.Module:
        return Choosing(self.generator.build(images), self.generator.latent)


def with_classes(z_NL: Tensor, label_N: Tensor, classes: int) -> Tensor:
    """Latents (N, L + K) whose last K numbers choose these classes (int64 (N,))."""
    choice_NK = F.one_hot(label_N, classes).to(z_NL)
    return torch.cat([z_NL[:, : z_NL.shape[1] - classes], choice_NK], 1)


class ConditionalNorm(nn.Module):
    """BatchNorm with a scale and a shift for each class (Dumoulin et al. 2017, equation 5), which
    start as 1 and 0."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.scale_KC = nn.Parameter(torch.ones(classes, channels))
        self.shift_KC = nn.Parameter(torch.zeros(classes, channels))

    def forward(self, x_NCHW: Tensor, label_N: Tensor) -> Tensor:
        """x (N, C, H, W), classes (N,); the same shape."""
        scale_NC11 = F.embedding(label_N, self.scale_KC)[:, :, None, None]
        shift_NC11 = F.embedding(label_N, self.shift_KC)[:, :, None, None]
        return self.norm(x_NCHW) * scale_NC11 + shift_NC11
