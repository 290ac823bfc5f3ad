"""U-Net generator and conditional PatchGAN of pix2pix.

Isola, Zhu, Zhou and Efros 2017, "Image-to-image translation with conditional adversarial networks",
https://arxiv.org/abs/1611.07004, appendix 6.1; where the text leaves something open as in the
authors' networks.py (pytorch-CycleGAN-and-pix2pix). They train with BatchNorm on single images,
which then is InstanceNorm with a scale and a shift; here it is that at every batch size, so that an
image does not depend on those beside it, in training and after.

Shapes: N batch, C channels, H height, W width, M numbers that decide what is dropped.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from engine.networks.cyclegan import init_normal, patch_critic
from engine.networks.planar import Planar
from engine.networks.spec import ImageSpec, Network

LEAK = 0.2
WIDEST = 8
"""Times the first layer's channels, at most."""
DROPPING = 3
"""Innermost doublings, after the first, that drop half of their values."""


def norm(width: int) -> nn.Module:
    """BatchNorm of a single image."""
    return nn.InstanceNorm2d(width, affine=True)


class UNet(Planar):
    """Halvings down to a small map and as many doublings, each beside the halving of its size.

    Dropout is the paper's only noise (section 3.2) and stays after training. It is decided by
    numbers that are given, so that they are the caller's to fix.
    """

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        widths = [width * min(2**i, WIDEST) for i in range(depth)]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, (before, after) in enumerate(zip([channels, *widths], widths, strict=False)):
            halving = nn.Conv2d(before, after, 4, 2, 1, bias=False)
            self.down.append(nn.Sequential(halving, norm(after)) if 0 < i < depth - 1 else halving)
        for i in reversed(range(1, depth)):
            before = widths[i] * (1 if i == depth - 1 else 2)
            doubling = nn.ConvTranspose2d(before, widths[i - 1], 4, 2, 1, bias=False)
            self.up.append(nn.Sequential(doubling, norm(widths[i - 1])))
        self.last = nn.ConvTranspose2d(2 * width, channels, 4, 2, 1)
        self.dropped = [widths[i - 1] for i in reversed(range(1, depth - 1))][:DROPPING]

    def draws(self, height: int, width: int) -> int:
        """How many numbers an image of that size takes."""
        places = (height * width) // 4 ** (len(self.down) - 2)
        return sum(channels * places * 4**i for i, channels in enumerate(self.dropped))

    def forward(self, x_NCHW: Tensor, uniform_NM: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] of such images, H and W multiples of 2 ** depth;
        uniform_NM: in [0, 1)."""
        kept, used, x_NCHW = [], 0, x_NCHW.contiguous()
        for i, halving in enumerate(self.down):
            kept.append(x_NCHW)
            x_NCHW = halving(nn.functional.leaky_relu(x_NCHW, LEAK) if i else x_NCHW)
        for i, doubling in enumerate(self.up):
            x_NCHW = doubling(x_NCHW.relu())
            if 0 < i <= len(self.dropped):
                size = x_NCHW[0].numel()
                x_NCHW = halved(x_NCHW, uniform_NM[:, used : used + size])
                used += size
            x_NCHW = torch.cat([kept.pop(), x_NCHW], 1)
        return self.last(x_NCHW.relu()).tanh()


def halved(x_NCHW: Tensor, uniform_NM: Tensor) -> Tensor:
    """Dropout of half of the values: those are kept, doubled, whose number is below a half."""
    return x_NCHW * ((uniform_NM < 0.5) * 2.0).view(x_NCHW.shape).to(x_NCHW.dtype)


@dataclass(frozen=True)
class Generator(Network):
    """Sizes of the U-Net."""

    width: int = 64
    """Channels after the first halving."""
    depth: int = 8
    """Halvings: 8 make a 256x256 image one place."""

    def build(self, images: ImageSpec) -> nn.Module:
        if self.depth < 3:
            raise ValueError(f"--generator.depth {self.depth} is too few halvings: give at least 3")
        if images.resolution % 2**self.depth:
            raise ValueError(
                f"--data.resolution {images.resolution} is no multiple of {2**self.depth}, by "
                f"which {self.depth} halvings reduce it: give --generator.depth fewer"
            )
        return UNet(images.channels, self.width, self.depth).apply(init_normal)


class Settled(nn.Module):
    """A U-Net with the numbers that decide what it drops, for images of one size alone.

    uniform_1M: float32 (1, M), in [0, 1); the same for every image.
    """

    uniform_1M: Tensor

    def __init__(self, unet: UNet, uniform_1M: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("uniform_1M", uniform_1M)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] of such images."""
        return self.unet(x_NCHW, self.uniform_1M.expand(x_NCHW.shape[0], -1))


@dataclass(frozen=True)
class Translator(Network):
    """Sizes of the U-Net, for whoever has it with those numbers."""

    generator: Generator = Generator()

    any_size: ClassVar[bool] = False  # another size would take as many other numbers

    def build(self, images: ImageSpec) -> nn.Module:
        unet, side = self.generator.build(images), images.resolution
        return Settled(unet, torch.zeros(1, unet.draws(side, side)))


class Conditional(nn.Module):
    """A PatchGAN that sees an image and what it was made from."""

    def __init__(self, channels: int, width: int, layers: int) -> None:
        super().__init__()
        self.critic = patch_critic(2 * channels, width, layers, affine=True)

    def forward(self, given_NCHW: Tensor, x_NCHW: Tensor) -> Tensor:
        """Logits (N, 1, H', W'), each of a patch."""
        return self.critic(torch.cat([given_NCHW, x_NCHW.to(given_NCHW)], 1))


@dataclass(frozen=True)
class Discriminator(Network):
    """Sizes of the conditional PatchGAN."""

    width: int = 64
    """Channels of the first layer."""
    layers: int = 3
    """Halvings: 3 judge patches of 70x70 pixels."""

    def build(self, images: ImageSpec) -> nn.Module:
        return Conditional(images.channels, self.width, self.layers).apply(init_normal)
