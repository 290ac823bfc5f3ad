"""Progressively grown generator and discriminator.

Karras, Aila, Laine and Lehtinen 2018, "Progressive growing of GANs for improved quality, stability,
and variation", https://arxiv.org/abs/1710.10196, table 2 and section 4; where the text leaves
something open as in the authors' networks.py. Both hold the layers of all resolutions from the
start: level i is the resolution of 2**i times the smallest. While a level fades in, alpha goes from
0, the level before it, to 1, the level alone.

Shapes: N batch, C channels, H height, W width, L latent.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.networks.dcgan import stages
from engine.networks.equalised import GAIN, Conv2d, Linear, deviation, pixel_norm
from engine.networks.spec import ImageSpec, Network

LEAK = 0.2
STEPS = 2**20  # of `growth` in a level


def leaky(x: Tensor) -> Tensor:
    """LeakyReLU."""
    return F.leaky_relu(x, LEAK)


def double(x_NCHW: Tensor, times: int = 1) -> Tensor:
    """Height and width doubled so many times, by the nearest neighbour."""
    return x_NCHW if times == 0 else F.interpolate(x_NCHW, scale_factor=2**times, mode="nearest")


def halve(x_NCHW: Tensor, times: int = 1) -> Tensor:
    """Height and width halved so many times, by the mean."""
    return x_NCHW if times == 0 else F.avg_pool2d(x_NCHW, 2**times)


def blend(old: Tensor, new: Tensor, alpha: Tensor) -> Tensor:
    """old where alpha, (), is 0, new where it is 1, exactly; in alpha's dtype at least."""
    dtype = torch.promote_types(new.dtype, alpha.dtype)
    return torch.lerp(old.to(dtype), new.to(dtype), alpha.to(dtype))


def faded(images_NCHW: Tensor, times: int, alpha: Tensor | None) -> Tensor:
    """Real images halved so many times, as blurred as the discriminator's other images are while a
    level fades in (authors' train.py); alpha None at the smallest."""
    small_NCHW = halve(images_NCHW, times)
    return small_NCHW if alpha is None else blend(double(halve(small_NCHW)), small_NCHW, alpha)


def untouched(layers: Iterable[nn.Module]) -> Tensor | float:
    """0, (), the sum over none of these layers' parameters, whose gradient is then zero.

    Ranks that share gradients wait for one of every parameter, of layers not yet in use too; and
    Adam without moments leaves a parameter of zero gradient as it is.
    """
    return sum((p[:0].sum() for layer in layers for p in layer.parameters()), 0.0)


class First(nn.Module):
    """From the normalised latent vector to the smallest resolution."""

    def __init__(self, latent: int, after: int, side: int) -> None:
        super().__init__()
        # gain sqrt(2) / 4 at 4x4: the inputs counted as a convolution's
        self.dense = Linear(latent, after * side * side, gain=GAIN / side, bias=False)
        self.bias = nn.Parameter(torch.zeros(after))
        self.conv = Conv2d(after, after, 3)
        self.side = side

    def forward(self, z_NL: Tensor) -> Tensor:
        """(N, C, side, side)."""
        x_NCHW = self.dense(pixel_norm(z_NL)).unflatten(1, (-1, self.side, self.side))
        x_NCHW = pixel_norm(leaky(x_NCHW + self.bias[:, None, None]))
        return pixel_norm(leaky(self.conv(x_NCHW)))


class Up(nn.Module):
    """One level of the generator."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv0, self.conv1 = Conv2d(before, after, 3), Conv2d(after, after, 3)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, C, 2H, 2W)."""
        x_NCHW = pixel_norm(leaky(self.conv0(double(x_NCHW))))
        return pixel_norm(leaky(self.conv1(x_NCHW)))


class Growing(nn.Module):
    """The generator of all levels.

    growth: the level that it has come to, less 1 - alpha, in STEPS: whole numbers, which a moving
    average of the weights takes over as they are.
    """

    growth: Tensor

    def __init__(self, latent: int, widths: list[int], side: int, channels: int) -> None:
        super().__init__()
        self.first = First(latent, widths[0], side)
        self.blocks = nn.ModuleList(Up(before, after) for before, after in pairwise(widths))
        self.to_rgb = nn.ModuleList(Conv2d(width, channels, 1, gain=1) for width in widths)
        self.register_buffer("growth", torch.zeros((), dtype=torch.int64))

    @property
    def top(self) -> int:
        """The last level."""
        return len(self.blocks)

    def forward(self, z_NL: Tensor, level: int, alpha: Tensor) -> Tensor:
        """Images (N, C, H, W) of the level's resolution, alpha () of the way from the level before
        it."""
        x_NCHW = before_NCHW = self.first(z_NL)
        for i in range(level):
            before_NCHW, x_NCHW = x_NCHW, self.blocks[i](x_NCHW)
        images_NCHW = self.to_rgb[level](x_NCHW)
        if level == 0:
            return images_NCHW
        return blend(double(self.to_rgb[level - 1](before_NCHW)), images_NCHW, alpha)

    def unused(self, level: int) -> list[nn.Module]:
        """Layers that a level does without."""
        others = [self.to_rgb[i] for i in range(self.top + 1) if i not in (level - 1, level)]
        return [*(self.blocks[i] for i in range(level, self.top)), *others]


class Grown(nn.Module):
    """The generator as it is shown: at its growth, in the last level's resolution.

    Every level is computed, and weighed by its nearness to the growth; what is shown then does not
    wait for the device, and an exported graph holds for every growth.
    """

    def __init__(self, generator: Growing) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, z_NL: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1]."""
        net, images_NCHW = self.generator, 0.0
        growth = net.growth.to(z_NL.dtype) / STEPS
        x_NCHW = net.first(z_NL)
        for level in range(net.top + 1):
            x_NCHW = net.blocks[level - 1](x_NCHW) if level else x_NCHW
            share = (1 - (growth - level).abs()).clamp(min=0)
            images_NCHW = images_NCHW + share * double(net.to_rgb[level](x_NCHW), net.top - level)
        return images_NCHW.clamp(-1, 1)


class Down(nn.Module):
    """One level of the discriminator."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv0, self.conv1 = Conv2d(before, before, 3), Conv2d(before, after, 3)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, C, H / 2, W / 2)."""
        return halve(leaky(self.conv1(leaky(self.conv0(x_NCHW)))))


class Last(nn.Module):
    """From the smallest resolution to one number per image."""

    def __init__(self, before: int, after: int, side: int, group: int) -> None:
        super().__init__()
        self.conv = Conv2d(before + 1, before, 3)
        self.dense0 = Linear(before * side * side, after)
        self.dense1 = Linear(after, 1, gain=1)
        self.group = group

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N,)."""
        x_NCHW = leaky(self.conv(deviation(x_NCHW, self.group)))
        return self.dense1(leaky(self.dense0(x_NCHW.flatten(1)))).flatten()


class Shrinking(nn.Module):
    """The discriminator of all levels."""

    def __init__(self, widths: list[int], last: int, images: ImageSpec, group: int) -> None:
        super().__init__()
        side, self.top = images.resolution >> len(widths) - 1, len(widths) - 1
        self.from_rgb = nn.ModuleList(Conv2d(images.channels, width, 1) for width in widths)
        self.blocks = nn.ModuleList(Down(before, after) for after, before in pairwise(widths))
        self.last = Last(widths[0], last, side, group)

    def forward(self, images_NCHW: Tensor, level: int, alpha: Tensor) -> Tensor:
        """What it thinks, (N,), of images of the level's resolution."""
        x_NCHW = leaky(self.from_rgb[level](images_NCHW))
        if level:
            old_NCHW = leaky(self.from_rgb[level - 1](halve(images_NCHW)))
            x_NCHW = blend(old_NCHW, self.blocks[level - 1](x_NCHW), alpha)
        for i in reversed(range(level - 1)):
            x_NCHW = self.blocks[i](x_NCHW)
        return self.last(x_NCHW)

    def unused(self, level: int) -> list[nn.Module]:
        """Layers that a level does without."""
        others = [self.from_rgb[i] for i in range(self.top + 1) if i not in (level - 1, level)]
        return [*(self.blocks[i] for i in range(level, self.top)), *others]


def levels(resolution: int) -> int:
    """Resolutions from the smallest, 4 to 7 pixels, to this one, each twice the one before."""
    return stages(resolution)[1] + 1


def channels(base: int, width: int, stage: int) -> int:
    """nf(stage) of the authors' code: min(base / 2**stage, width)."""
    return max(min(base >> stage, width), 1)


@dataclass(frozen=True)
class Generator(Network):
    """Sizes of the generator."""

    latent: int = 512
    """Length of the latent vector."""
    width: int = 512
    """Most channels of a layer."""
    base: int = 8192
    """Halved with each level: channels of the smallest are half of it, of the next a quarter, where
    that is less than --width."""

    def build(self, images: ImageSpec) -> nn.Module:
        count = levels(images.resolution)
        widths = [channels(self.base, self.width, stage) for stage in range(1, count + 1)]
        return Growing(self.latent, widths, images.resolution >> count - 1, images.channels)


@dataclass(frozen=True)
class GrownGenerator(Network):
    """Sizes of the generator as it is shown."""

    generator: Generator
    """Sizes of the network that grows."""

    def build(self, images: ImageSpec) -> nn.Module:
        return Grown(self.generator.build(images))


@dataclass(frozen=True)
class Discriminator(Network):
    """Sizes of the discriminator."""

    width: int = 512
    """Most channels of a layer."""
    base: int = 8192
    """As of the generator."""
    group: int = 4
    """Images over which the standard deviation is taken that the last layers are told."""

    def build(self, images: ImageSpec) -> nn.Module:
        widths = [
            channels(self.base, self.width, stage)
            for stage in range(1, levels(images.resolution) + 1)
        ]
        return Shrinking(widths, channels(self.base, self.width, 0), images, self.group)
