"""The two encoders of a deep attentional multimodal similarity model (DAMSM): what a caption's
words say, and what an image's regions show, in one space.

Xu et al. 2018, "AttnGAN: Fine-grained text to image generation with attentional generative
adversarial networks", https://arxiv.org/abs/1711.10485, section 3.2, sizes as in the authors' code.
Regions are the maps of Inception-v3 (Szegedy et al. 2016) after its block Mixed_6e and the whole
image is its average pooling, both fixed; of the image encoder only a layer for each is trained.
Without Inception's weights a small network, all of it trained, takes its place: that is not the
paper's encoder.

Shapes: N batch, C channels, H height, W width, R regions, T words, D features.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.networks.spec import ImageSpec, Network
from engine.networks.text import TextEncoder
from engine.networks.weights import fill

LEAK = 0.2
INCEPTION_SIDE = 299
REGIONS = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1"),
    *("Conv2d_4a_3x3", "maxpool2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b"),
    *("Mixed_6c", "Mixed_6d", "Mixed_6e"),
)
WHOLE = ("Mixed_7a", "Mixed_7b", "Mixed_7c")
"""Layers under torchvision's names: up to the regions, and from them on."""
EXPECTED = (
    "--inception takes torchvision's Inception-v3 (inception_v3_google-0cc3c7bd.pth), or its state "
    "dict as .safetensors"
)


class Inception(nn.Module):
    """Inception-v3 without its classifiers, fixed, always as in evaluation."""

    widths = (768, 2048)

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import inception_v3

        layers = dict(inception_v3(weights=None, init_weights=False).named_children())
        for name in (*REGIONS, *WHOLE):
            self.add_module(name, layers[name])
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "Inception":
        """Left as it is."""
        return super().train(False)

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (N, 768, 17, 17) and (N, 2048, 8, 8) of images in [-1, 1], grey or colour, which is
        how the weights want them."""
        x_NCHW = resized(x_NCHW, INCEPTION_SIDE).expand(-1, 3, -1, -1)
        for name in REGIONS:
            x_NCHW = getattr(self, name)(x_NCHW)
        regions_NCHW = x_NCHW
        for name in WHOLE:
            x_NCHW = getattr(self, name)(x_NCHW)
        return regions_NCHW, x_NCHW


def resized(x_NCHW: Tensor, side: int) -> Tensor:
    """Images of another height and width by bilinear interpolation, float32, as two products, whose
    gradients are sums in a fixed order on a GPU too."""
    with torch.autocast("cuda" if x_NCHW.is_cuda else "cpu", enabled=False):
        weights = [
            F.interpolate(torch.eye(old, device=x_NCHW.device)[None], side, mode="linear")[0]
            for old in x_NCHW.shape[2:]
        ]
        return torch.einsum("nchw,ha,wb->ncab", x_NCHW.float(), *weights)


class Small(nn.Module):
    """In Inception's place: convolutions 3x3 that halve, each with BatchNorm and LeakyReLU, three
    to the regions and two more to the whole. Images of at least twice `side` are made smaller
    before, by a whole factor."""

    def __init__(self, channels: int, side: int, width: int) -> None:
        super().__init__()
        self.side, self.widths = side, (4 * width, 8 * width)
        self.regions = nn.Sequential(
            *_halving(channels, width), *_halving(width, 2 * width), *_halving(2 * width, 4 * width)
        )
        self.whole = nn.Sequential(*_halving(4 * width, 8 * width), *_halving(8 * width, 8 * width))

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (N, 4 width, h, w), an eighth of what enters in height and width, rounded up, and
        (N, 8 width, h / 4, w / 4)."""
        factor = shrinking(x_NCHW.shape[3], self.side)
        regions_NCHW = self.regions(F.avg_pool2d(x_NCHW, factor) if factor > 1 else x_NCHW)
        return regions_NCHW, self.whole(regions_NCHW)


def shrinking(resolution: int, side: int) -> int:
    """By what factor images are made smaller before a network for images of at least `side`."""
    return max(resolution // side, 1)


def _halving(before: int, after: int) -> list[nn.Module]:
    convolution = nn.Conv2d(before, after, 3, 2, 1, bias=False)
    return [convolution, nn.BatchNorm2d(after), nn.LeakyReLU(LEAK)]


class ImageEncoder(nn.Module):
    """Images to features of their regions and of the whole."""

    def __init__(self, seen: Inception | Small, features: int) -> None:
        super().__init__()
        self.seen = seen
        self.to_regions = nn.Conv2d(seen.widths[0], features, 1, bias=False)
        self.to_whole = nn.Linear(seen.widths[1], features)
        for layer in (self.to_regions, self.to_whole):
            nn.init.uniform_(layer.weight, -0.1, 0.1)

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D, H', W') and (N, D) of images (N, C, H, W) in [-1, 1] of any size."""
        regions_NCHW, whole_NCHW = self.seen(x_NCHW)
        return self.to_regions(regions_NCHW), self.to_whole(whole_NCHW.mean((2, 3)))


class Both(nn.Module):
    """The two encoders."""

    def __init__(self, text: TextEncoder, image: ImageEncoder) -> None:
        super().__init__()
        self.text, self.image = text, image


@dataclass(frozen=True)
class Encoders(Network):
    """Sizes of both encoders."""

    words: int = 5450
    """Rows of the table of words' vectors: those of the birds' captions, the end among them."""
    vector: int = 300
    """Length of a word's vector."""
    features: int = 256
    """Features of a word, of a region, and of each whole."""
    width: int = 64
    """Channels of the small image encoder's first layer."""
    side: int = 128
    """Height and width that it wants at least: larger images are made smaller by a whole factor."""
    dropout: float = 0.5
    """Share of the words' vectors that is dropped while training."""
    inception: bool = False
    """Inception-v3 in place of the small one; a run given its weights says so."""

    traceable: ClassVar[bool] = False  # two functions in one module

    def regions(self, resolution: int) -> int:
        """Regions of an image."""
        if self.inception:
            return 17**2
        return (-(-(resolution // shrinking(resolution, self.side)) // 8)) ** 2

    def build(self, images: ImageSpec) -> nn.Module:
        if self.features % 2:
            raise ValueError(f"--encoders.features {self.features} must be even: two directions")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--encoders.dropout {self.dropout} must be at least 0 and below 1")
        seen = Inception() if self.inception else Small(images.channels, self.side, self.width)
        text = TextEncoder(self.words, self.vector, self.features, self.dropout)
        return Both(text, ImageEncoder(seen, self.features))


def read_inception(network: Both, path: Path) -> None:
    """Put a file's weights into the encoders' Inception. Raises ValueError naming the flag."""
    with torch.no_grad():
        fill(network.image.seen, path, "--inception", "Inception-v3's", EXPECTED)
