"""Residual generators and critics of WGAN-GP, and the blocks that they share with others.

Gulrajani et al. 2017, "Improved training of Wasserstein GANs", appendix C and F, layer by layer as
in the authors' gan_64x64.py (GoodGenerator, GoodDiscriminator) and gan_cifar_resnet.py.

Shapes: N batch, C channels, H height, W width, L latent.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from torch import Tensor, nn

from engine.networks.dcgan import stages
from engine.networks.spec import ImageSpec, Network

Norm = Literal["batch", "layer", "none"]
Resample = Literal["up", "down", "none"]


def norm_layer(kind: Norm, channels: int) -> nn.Module:
    """BatchNorm, or LayerNorm over C, H, W with a scale for each channel, which is a GroupNorm of
    one group, or nothing."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(1, channels) if kind == "layer" else nn.Identity()


def convolution(before: int, after: int, kernel: int, resample: Resample, **options: bool) -> list:
    """A convolution after nearest-neighbour doubling, before averaging of 2x2, or alone."""
    layer = nn.Conv2d(before, after, kernel, padding=kernel // 2, **options)
    if resample == "up":
        return [nn.Upsample(scale_factor=2), layer]
    return [layer, nn.AvgPool2d(2)] if resample == "down" else [layer]


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which has a 1x1 one where the size changes.

    bare: the first block of a discriminator, whose input is the image: no norm and no ReLU before
    it, and the shortcut averages before its convolution. late: the first convolution keeps the
    number of channels, as WGAN-GP's do where the side is halved.
    """

    def __init__(
        self,
        before: int,
        after: int,
        resample: Resample,
        norm: Norm,
        bare: bool = False,
        late: bool = False,
    ) -> None:
        super().__init__()
        middle = before if late else after
        first: Resample = "up" if resample == "up" else "none"
        second: Resample = "down" if resample == "down" else "none"
        start = [] if bare else [norm_layer(norm, before), nn.ReLU()]
        self.path = nn.Sequential(
            *start,
            *convolution(before, middle, 3, first, bias=norm == "none"),
            norm_layer(norm, middle),
            nn.ReLU(),
            *convolution(middle, after, 3, second),
        )
        short = convolution(before, after, 1, resample)
        same = before == after and resample == "none"
        self.shortcut = nn.Identity() if same else nn.Sequential(*(short[::-1] if bare else short))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, C, H, W), H and W doubled, halved, or as they were."""
        return self.shortcut(x_NCHW) + self.path(x_NCHW)


def init_he(module: nn.Module) -> None:
    """He's normal weights for 3x3 convolutions, Glorot's for the rest, biases 0 (the authors'
    code draws uniform numbers of these variances)."""
    if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
        nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
    elif isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class Generator(Network):
    """Sizes of the residual generator."""

    latent: int = 128
    """Length of the latent vector."""
    width: int = 64
    """Channels before the last layer."""
    growing: bool = True
    """Twice as many channels with each stage towards the input (GoodGenerator, at most 8 times),
    or the same everywhere (CIFAR-10)."""

    def build(self, images: ImageSpec) -> nn.Module:
        base, doublings = stages(images.resolution)
        widths = channels(self.width, doublings, self.growing)[::-1]
        first = widths[0]
        layers: list[nn.Module] = [
            nn.Linear(self.latent, first * base * base),
            nn.Unflatten(1, (first, base, base)),
        ]
        for before, after in pairwise(widths):
            layers.append(Block(before, after, "up", "batch"))
        layers += [nn.BatchNorm2d(self.width), nn.ReLU()]
        layers += [nn.Conv2d(self.width, images.channels, 3, padding=1), nn.Tanh()]
        return nn.Sequential(*layers).apply(init_he)


def channels(width: int, doublings: int, growing: bool) -> list[int]:
    """Channels from the image's side inwards, one more than there are changes of size."""
    if not growing:
        return [width] * (doublings + 1)
    return [width * min(2**i, 8) for i in range(doublings + 1)]


@dataclass(frozen=True)
class Critic(Network):
    """Sizes of the 64x64 critic (GoodDiscriminator): LayerNorm, a linear layer over all places."""

    alone: ClassVar[bool] = True
    width: int = 64
    """Channels after the first layer; doubled with each stage, at most 8 times."""

    def build(self, images: ImageSpec) -> nn.Module:
        base, doublings = stages(images.resolution)
        widths = channels(self.width, doublings, growing=True)
        layers: list[nn.Module] = [nn.Conv2d(images.channels, self.width, 3, padding=1)]
        for before, after in pairwise(widths):
            layers.append(Block(before, after, "down", "layer", late=True))
        layers += [nn.Flatten(), nn.Linear(widths[-1] * base * base, 1), nn.Flatten(0)]
        return nn.Sequential(*layers).apply(init_he)


@dataclass(frozen=True)
class FlatCritic(Network):
    """Sizes of the CIFAR-10 critic: no norm, as many channels everywhere, a mean over places."""

    alone: ClassVar[bool] = True
    width: int = 128
    """Channels."""

    def build(self, images: ImageSpec) -> nn.Module:
        width = self.width
        layers = [
            Block(images.channels, width, "down", "none", bare=True),
            Block(width, width, "down", "none"),
            Block(width, width, "none", "none"),
            Block(width, width, "none", "none"),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, 1),
            nn.Flatten(0),
        ]
        return nn.Sequential(*layers).apply(init_he)
