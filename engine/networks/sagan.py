"""Self-attention GAN.

Zhang et al. 2019, "Self-attention generative adversarial networks", section 3 and the authors' code
(self-attention-gan, generator.py, discriminator.py, non_local.py), which is for 128x128 pixels; for
fewer, the stages at the image's side are left out. Spectral normalisation is a setting of the
player. With classes, BatchNorm is conditional and the discriminator has a projection.

Shapes: N batch, C channels, H height, W width, L latent, Q places that ask, K places that answer.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from engine.networks.cgan import Projection
from engine.networks.conditional import ConditionalNorm
from engine.networks.dcgan import stages
from engine.networks.residual import Block
from engine.networks.spec import ImageSpec, Network

LOOKING = 32
"""Side of the maps with the attention, in both networks; half the image's side if that is less."""


class Attention(nn.Module):
    """x + gamma * W (sum over places of v), equations 1 to 3, as in the authors' code: queries and
    keys have C/8 channels, values C/2; keys and values are pooled 2x2; gamma starts at 0.

    plain: attention written out, which can be differentiated twice.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow, half = max(channels // 8, 1), max(channels // 2, 1)
        self.query = nn.Conv2d(channels, narrow, 1, bias=False)
        self.key = nn.Conv2d(channels, narrow, 1, bias=False)
        self.value = nn.Conv2d(channels, half, 1, bias=False)
        self.out = nn.Conv2d(half, channels, 1, bias=False)
        self.gamma = nn.Parameter(Tensor([0.0]))
        self.plain = False

    def parts(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N, Q, C/8), keys (N, K, C/8), values (N, K, C/2)."""
        pooled = (F.max_pool2d(layer(x_NCHW), 2) for layer in (self.key, self.value))
        query, key, value = (p.flatten(2).mT for p in (self.query(x_NCHW), *pooled))
        return query, key, value

    def weights(self, x_NCHW: Tensor) -> Tensor:
        """How much each place takes from each pooled place, (N, Q, K); rows sum to 1."""
        query, key, _ = self.parts(x_NCHW)
        return (query @ key.mT).softmax(2)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, C, H, W), H and W even; the same shape."""
        query, key, value = self.parts(x_NCHW)
        if self.plain:
            taken = (query @ key.mT).softmax(2) @ value
        else:
            taken = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        taken_NCHW = taken.mT.unflatten(2, x_NCHW.shape[2:])
        return x_NCHW + self.gamma * self.out(taken_NCHW)


class ByClassBlock(nn.Module):
    """The generator's residual block that doubles the side; its norms may see the class."""

    def __init__(self, before: int, after: int, classes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(width, classes) for width in (before, after))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, after, 3, padding=1) for width in (before, after)
        )
        self.shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x_NCHW: Tensor, *label_N: Tensor) -> Tensor:
        """(N, C, 2H, 2W)."""
        inner = F.relu(self.norms[0](x_NCHW, *label_N))
        inner = self.convolutions[0](doubled(inner))
        inner = F.relu(self.norms[1](inner, *label_N))
        return self.shortcut(doubled(x_NCHW)) + self.convolutions[1](inner)


def doubled(x_NCHW: Tensor) -> Tensor:
    """Every pixel four times."""
    return F.interpolate(x_NCHW, scale_factor=2.0)


def norm(channels: int, classes: int) -> nn.Module:
    """BatchNorm, by class where there are any."""
    return ConditionalNorm(channels, classes) if classes else nn.BatchNorm2d(channels)


class Stages(nn.Module):
    """The generator."""

    def __init__(self, latent: int, widths: list[int], base: int, classes: int, out: int) -> None:
        super().__init__()
        self.start = nn.Linear(latent, widths[0] * base * base)
        self.shape = (widths[0], base, base)
        self.blocks = nn.ModuleList(ByClassBlock(a, b, classes) for a, b in pairwise(widths))
        self.place = place(base * 2 ** len(self.blocks), len(self.blocks))
        self.attention = Attention(widths[-1 - self.place])
        self.norm = nn.BatchNorm2d(widths[-1])
        self.last = nn.Conv2d(widths[-1], out, 3, padding=1)

    def forward(self, z_NL: Tensor, *label_N: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1]; classes (N,) where the networks have them."""
        x_NCHW = self.start(z_NL).unflatten(1, self.shape)
        for left, block in zip(reversed(range(len(self.blocks))), self.blocks, strict=True):
            x_NCHW = block(x_NCHW, *label_N)
            if left == self.place:
                x_NCHW = self.attention(x_NCHW)
        return self.last(F.relu(self.norm(x_NCHW))).tanh()


def place(resolution: int, doublings: int) -> int:
    """Doublings that lie between the maps with the attention and the image."""
    return min(max(round(math.log2(resolution / LOOKING)), 1), doublings - 1)


def init_glorot(module: nn.Module) -> None:
    """Glorot's uniform weights, biases 0, as in the authors' code."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class Generator(Network):
    """Sizes of the generator."""

    latent: int = 128
    """Length of the latent vector."""
    classes: int = 0
    """Classes of the dataset; 0 gives it none."""
    width: int = 64
    """Channels before the last layer; doubled with each stage towards the input."""

    def build(self, images: ImageSpec) -> nn.Module:
        base, doublings = stages(images.resolution)
        widths = [self.width * 2**i for i in reversed(range(doublings))]
        made = Stages(self.latent, [widths[0], *widths], base, self.classes, images.channels)
        return made.apply(init_glorot)


@dataclass(frozen=True)
class Discriminator(Network):
    """Sizes of the discriminator."""

    alone: ClassVar[bool] = True
    classes: int = 0
    """Classes of the dataset; 0 gives it none."""
    width: int = 64
    """Channels after the first block; doubled with each block that halves the side."""

    def build(self, images: ImageSpec) -> nn.Module:
        _, doublings = stages(images.resolution)
        widths = [self.width * 2**i for i in range(doublings)]
        layers: list[nn.Module] = [Block(images.channels, widths[0], "down", "none", bare=True)]
        for i, (before, after) in enumerate(pairwise(widths), start=1):
            if i == place(images.resolution, doublings):
                layers.append(Attention(before))
            layers.append(Block(before, after, "down", "none"))
        layers += [Block(widths[-1], widths[-1], "none", "none"), nn.ReLU()]
        return Projection(nn.Sequential(*layers), widths[-1], self.classes).apply(init_glorot)
