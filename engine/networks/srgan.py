"""Generator and discriminator of SRGAN.

Ledig et al. 2017, "Photo-realistic single image super-resolution using a generative adversarial
network", https://arxiv.org/abs/1609.04802, figure 4. Convolutions before a BatchNorm, whose shift
is theirs too, have no bias. The paper's discriminator ends in dense layers on the 6x6 places that
remain of its 96x96 crops; here the maps of larger crops are averaged over k x k places down to at
most 6x6, those of smaller crops stay as they are. So at 96 it is the paper's, and at no crop has it
more parameters.

Shapes: N batch, C channels, H height, W width, F features.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from engine.networks.spec import ImageSpec, Network

LEAK = 0.2
STRIDES = (1, 2, 1, 2, 1, 2, 1, 2)
PLACES = 6
"""Side of the maps that the paper's dense layers see."""


class Residual(nn.Module):
    """x + two 3x3 convolutions of it, each normalised."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.path = nn.Sequential(*normed(width, width), nn.PReLU(), *normed(width, width))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Of the input's shape."""
        return x_NCHW + self.path(x_NCHW)


def normed(before: int, after: int, stride: int = 1) -> list[nn.Module]:
    """A 3x3 convolution and BatchNorm."""
    return [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)]


class Enlarger(nn.Module):
    """Images (N, C, H, W) in [-1, 1], of any size, to images (N, C, scale H, scale W), for [-1, 1]
    but unbounded."""

    def __init__(self, channels: int, width: int, blocks: int, doublings: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, width, 9, padding=4), nn.PReLU())
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(blocks)))
        self.blocks.extend(normed(width, width))
        layers: list[nn.Module] = []
        for _ in range(doublings):
            layers += [nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.PReLU()]
        self.last = nn.Sequential(*layers, nn.Conv2d(width, channels, 9, padding=4))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The larger images. Given ones go in as [0, 1], as the paper has them (section 3.2)."""
        first_NCHW = self.first((x_NCHW + 1) / 2)
        return self.last(first_NCHW + self.blocks(first_NCHW))


class Critic(nn.Module):
    """A discriminator that shows what it judges by."""

    def __init__(self, images: ImageSpec, width: int, hidden: int) -> None:
        super().__init__()
        widths = [width * 2 ** (i // 2) for i in range(len(STRIDES))]
        layers: list[nn.Module] = [nn.Conv2d(images.channels, width, 3, padding=1)]
        side = images.resolution
        for (before, after), stride in zip(pairwise(widths), STRIDES[1:], strict=True):
            layers += [nn.LeakyReLU(LEAK), *normed(before, after, stride)]
            side = -(-side // stride)
        self.features = nn.Sequential(*layers, nn.LeakyReLU(LEAK))
        pool = -(-side // PLACES)
        side = -(-side // pool)
        self.dense = nn.Sequential(
            nn.AvgPool2d(pool, ceil_mode=True) if pool > 1 else nn.Identity(),
            nn.Flatten(),
            nn.Linear(widths[-1] * side**2, hidden),
            nn.LeakyReLU(LEAK),
            nn.Linear(hidden, 1),
            nn.Flatten(0),
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits (N,) of images."""
        return self.dense(self.features(x_NCHW))


def doublings(scale: int) -> int:
    """How many doublings make the scale. Raises ValueError where none do."""
    if scale < 2 or scale & (scale - 1):
        raise ValueError(
            f"--data.scale {scale} is no power of two, and the generator enlarges by doubling: "
            f"give 2, 4 or 8"
        )
    return int(math.log2(scale))


@dataclass(frozen=True)
class Generator(Network):
    """Sizes of the generator (SRResNet)."""

    width: int = 64
    """Channels."""
    blocks: int = 16
    """Residual blocks."""

    def build(self, images: ImageSpec) -> nn.Module:
        return Enlarger(images.channels, self.width, self.blocks, doublings(images.scale))

    def reach(self, scale: int) -> int:
        """How many pixels of the given image around a place its result depends on."""
        pixels = 4  # of the last convolution, 9x9; those before it are 3x3 at half the size each
        for _ in range(doublings(scale)):
            pixels = -(-pixels // 2) + 1
        return pixels + 1 + 2 * self.blocks + 4


@dataclass(frozen=True)
class Discriminator(Network):
    """Sizes of the discriminator."""

    width: int = 64
    """Channels of the first layer; doubled with each halving of the image but the first."""
    hidden: int = 1024
    """Units of the dense layer."""

    def build(self, images: ImageSpec) -> nn.Module:
        if images.resolution < 17:  # one place and no more after four halvings: no BatchNorm there
            raise ValueError(
                f"--data.resolution {images.resolution} is too small for the discriminator, which "
                f"halves it four times: give at least 17"
            )
        return Critic(images, self.width, self.hidden)
