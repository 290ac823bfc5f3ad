"""Generators and discriminators of CycleGAN, a pair of each as one network.

Zhu, Park, Isola and Efros 2017, "Unpaired image-to-image translation using cycle-consistent
adversarial networks", https://arxiv.org/abs/1703.10593, appendix 7.2; where the text leaves
something open as in the authors' networks.py (pytorch-CycleGAN-and-pix2pix).

Shapes: N batch, C channels, H height, W width, P images of a pool.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.networks.planar import Chain
from engine.networks.spec import ImageSpec, Network

LEAK = 0.2


class Residual(nn.Module):
    """x + two 3x3 convolutions of it, each padded by reflection and normalised."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.path = nn.Sequential(*padded(width, width, 3), nn.ReLU(), *padded(width, width, 3))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Of the input's shape."""
        return x_NCHW + self.path(x_NCHW)


def padded(before: int, after: int, kernel: int) -> list[nn.Module]:
    """A convolution that keeps the size, padded by reflection, and InstanceNorm."""
    reflect = nn.ReflectionPad2d(kernel // 2)
    return [reflect, nn.Conv2d(before, after, kernel), nn.InstanceNorm2d(after)]


def translator(channels: int, width: int, blocks: int) -> Chain:
    """ResNet generator: two halvings, residual blocks, two doublings; images (N, C, H, W) in
    [-1, 1] to such images, H and W multiples of 4."""
    layers = [*padded(channels, width, 7), nn.ReLU()]
    for before in (width, 2 * width):
        halving = nn.Conv2d(before, 2 * before, 3, stride=2, padding=1)
        layers += [halving, nn.InstanceNorm2d(2 * before), nn.ReLU()]
    layers += [Residual(4 * width) for _ in range(blocks)]
    for after in (2 * width, width):
        doubling = nn.ConvTranspose2d(2 * after, after, 3, stride=2, padding=1, output_padding=1)
        layers += [doubling, nn.InstanceNorm2d(after), nn.ReLU()]
    layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, channels, 7), nn.Tanh()]
    return Chain(*layers)


def patch_critic(channels: int, width: int, layers: int, affine: bool = False) -> Chain:
    """PatchGAN: so many halvings, each output judging a patch, of 70x70 pixels with three; images
    (N, C, H, W) to logits (N, 1, H', W'). affine: normalised values are scaled and shifted."""
    made = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(LEAK)]
    before = width
    for i in range(1, layers + 1):
        after = width * min(2**i, 8)
        stride = 2 if i < layers else 1
        made.append(nn.Conv2d(before, after, 4, stride, padding=1, bias=not affine))
        made += [nn.InstanceNorm2d(after, affine=affine), nn.LeakyReLU(LEAK)]
        before = after
    return Chain(*made, nn.Conv2d(before, 1, 4, padding=1))


def init_normal(module: nn.Module) -> None:
    """N(0, 0.02) weights, biases 0."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.InstanceNorm2d) and module.affine:
        nn.init.normal_(module.weight, 1.0, 0.02)


class Translators(nn.Module):
    """Both directions."""

    def __init__(self, channels: int, width: int, blocks: int) -> None:
        super().__init__()
        self.to_B, self.to_A = (translator(channels, width, blocks) for _ in range(2))


class Critics(nn.Module):
    """A critic of each domain, and the pools of translated images that they are shown.

    pool_A, pool_B: float32 (P, C, H, W). held: images in each so far, int64 ().
    """

    pool_A: Tensor
    pool_B: Tensor
    held: Tensor

    def __init__(self, images: ImageSpec, width: int, layers: int, pool: int) -> None:
        super().__init__()
        self.of_A, self.of_B = (patch_critic(images.channels, width, layers) for _ in range(2))
        shape = (pool, images.channels, images.resolution, images.resolution)
        self.register_buffer("pool_A", torch.zeros(shape))
        self.register_buffer("pool_B", torch.zeros(shape))
        self.register_buffer("held", torch.zeros((), dtype=torch.int64))


@dataclass(frozen=True)
class Generators(Network):
    """Sizes of both generators."""

    width: int = 64
    """Channels of the first layer."""
    blocks: int = 9
    """Residual blocks: 9 for 256x256 and larger, 6 for 128x128."""

    def build(self, images: ImageSpec) -> nn.Module:
        if images.resolution % 4:
            raise ValueError(
                f"--data.resolution {images.resolution} is no multiple of 4, by which the "
                f"generators reduce it"
            )
        return Translators(images.channels, self.width, self.blocks).apply(init_normal)


@dataclass(frozen=True)
class Translator(Network):
    """Sizes of one of the two generators, for whoever has only that."""

    width: int = 64
    """Channels of the first layer."""
    blocks: int = 9
    """Residual blocks."""

    def build(self, images: ImageSpec) -> nn.Module:
        return translator(images.channels, self.width, self.blocks)


@dataclass(frozen=True)
class Discriminators(Network):
    """Sizes of both discriminators and of their pools."""

    width: int = 64
    """Channels of the first layer."""
    layers: int = 3
    """Halvings: 3 judge patches of 70x70 pixels."""
    pool: int = 50
    """Translated images of each domain that are kept, to be shown again (Shrivastava et al.)."""

    def build(self, images: ImageSpec) -> nn.Module:
        least = 3 * 2**self.layers  # the last normalised map has more than one place
        if images.resolution < least:
            raise ValueError(
                f"--data.resolution {images.resolution} is too small for discriminators of "
                f"{self.layers} halvings: give at least {least}, or fewer --discriminators.layers"
            )
        return Critics(images, self.width, self.layers, self.pool).apply(init_normal)
