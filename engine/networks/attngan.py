"""Generator and discriminators of AttnGAN.

Xu et al. 2018, "AttnGAN: Fine-grained text to image generation with attentional generative
adversarial networks", https://arxiv.org/abs/1711.10485, section 3.1, layer by layer as in the
authors' code: gated linear units, nearest-neighbour doublings and 3x3 convolutions without bias in
the generator; 4x4 convolutions of stride 2 in the discriminators, which judge each size by the
image alone and by image and caption. Their filling of captions is hidden from the attention of
other images than its own where a batch has several; here each caption's is hidden from its own.
Weights are N(0, 0.02) where theirs are orthogonal, which takes half a minute to make at this size.

Shapes: N batch, C channels, H height, W width, L latent, T words, D features, K condition.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.networks.dcgan import init_weights
from engine.networks.spec import ImageSpec, Network
from engine.networks.text import there

LEAK = 0.2
SMALLEST = 4


def conv(before: int, after: int) -> nn.Conv2d:
    """3x3, without bias."""
    return nn.Conv2d(before, after, 3, padding=1, bias=False)


def gated(before: int, after: int) -> list[nn.Module]:
    """A convolution, BatchNorm and a gated linear unit (Dauphin et al. 2017)."""
    return [conv(before, 2 * after), nn.BatchNorm2d(2 * after), nn.GLU(1)]


def doubling(before: int, after: int) -> nn.Sequential:
    """Nearest neighbours, then a gated convolution."""
    return nn.Sequential(nn.Upsample(scale_factor=2), *gated(before, after))


class Residual(nn.Module):
    """x + a gated convolution and another of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = conv(width, width), nn.BatchNorm2d(width)
        self.path = nn.Sequential(*gated(width, width), *last)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Of the input's shape."""
        return x_NCHW + self.path(x_NCHW)


class WordAttention(nn.Module):
    """What each place of a map takes from the words of its image's caption (equation 2)."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.to_map = nn.Linear(features, width, bias=False)

    def forward(self, x_NCHW: Tensor, words_NTD: Tensor, there_NT: Tensor) -> tuple[Tensor, Tensor]:
        """Word features of each place (N, C, H, W), and each word's share of it (N, T, H, W);
        there_NT: where there are words, bool."""
        word_NTC = self.to_map(words_NTD.to(x_NCHW.dtype))
        score_NTP = torch.bmm(word_NTC, x_NCHW.flatten(2))
        share_NTP = score_NTP.masked_fill(~there_NT[:, :, None], -torch.inf).softmax(1)
        taken_NCP = torch.bmm(word_NTC.transpose(1, 2), share_NTP.to(word_NTC.dtype))
        size = x_NCHW.shape[2:]
        return taken_NCP.unflatten(2, size), share_NTP.unflatten(2, size)


class First(nn.Module):
    """F_0: from noise and condition to a map."""

    def __init__(self, given: int, width: int, doublings: int) -> None:
        super().__init__()
        wide = width * 2**doublings
        places = SMALLEST**2
        self.dense = nn.Linear(given, 2 * wide * places, bias=False)
        self.norm = nn.BatchNorm1d(2 * wide * places)
        self.wide = wide
        self.doublings = nn.Sequential(
            *(doubling(wide // 2**i, wide // 2 ** (i + 1)) for i in range(doublings))
        )

    def forward(self, given_NL: Tensor) -> Tensor:
        """(N, width, H, W)."""
        x_NF = F.glu(self.norm(self.dense(given_NL)), 1)
        return self.doublings(x_NF.unflatten(1, (self.wide, SMALLEST, SMALLEST)))


class Next(nn.Module):
    """F_i: a map of twice the height and width, by what its places take from the words."""

    def __init__(self, width: int, features: int, blocks: int) -> None:
        super().__init__()
        self.attention = WordAttention(width, features)
        self.blocks = nn.Sequential(*(Residual(2 * width) for _ in range(blocks)))
        self.up = doubling(2 * width, width)

    def forward(self, x_NCHW: Tensor, words_NTD: Tensor, there_NT: Tensor) -> tuple[Tensor, Tensor]:
        """The map, and each word's share of each place of the given one."""
        taken_NCHW, share_NTHW = self.attention(x_NCHW, words_NTD, there_NT)
        return self.up(self.blocks(torch.cat([x_NCHW, taken_NCHW.to(x_NCHW)], 1))), share_NTHW


class Condition(nn.Module):
    """Conditioning augmentation F^ca (Zhang et al. 2017, "StackGAN", section 3.2): a Gaussian about
    the caption, from which what the generator is told is drawn."""

    def __init__(self, features: int, condition: int) -> None:
        super().__init__()
        self.dense = nn.Linear(features, 4 * condition)

    def forward(self, sentence_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Its mean and the logarithm of its variance, (N, K)."""
        return F.glu(self.dense(sentence_ND), 1).chunk(2, 1)


class Painter(nn.Module):
    """Images of several sizes, each twice as large as the one before it, of a caption."""

    def __init__(self, sizes: "Generator", channels: int, doublings: int) -> None:
        super().__init__()
        width = sizes.width
        self.condition = Condition(sizes.features, sizes.condition)
        self.first = First(sizes.latent + sizes.condition, width, doublings)
        self.next = nn.ModuleList(
            Next(width, sizes.features, sizes.blocks) for _ in range(sizes.stages - 1)
        )
        self.to_image = nn.ModuleList(
            nn.Sequential(conv(width, channels), nn.Tanh()) for _ in range(sizes.stages)
        )

    def forward(
        self, noise_NL: Tensor, told_NK: Tensor, words_NTD: Tensor, lengths_N: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Images (N, C, H, W) in [-1, 1] of each size, the smallest first, and each word's share of
        each place, (N, T, h, w), of each stage but the first; of noise, a draw of `condition`, and
        features of the words of captions of such lengths."""
        there_NT = there(lengths_N, words_NTD.shape[1])
        map_NCHW = self.first(torch.cat([told_NK, noise_NL], 1))
        images, shares = [self.to_image[0](map_NCHW)], []
        for stage, to_image in zip(self.next, self.to_image[1:], strict=True):
            map_NCHW, share_NTHW = stage(map_NCHW, words_NTD, there_NT)
            images.append(to_image(map_NCHW))
            shares.append(share_NTHW)
        return images, shares


class Judge(nn.Module):
    """Whether images of one size are real, and whether they are what a caption says."""

    def __init__(self, images: ImageSpec, width: int, features: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before, most = images.channels, 8 * width
        for i in range(_halvings(images.resolution)):
            layers.append(nn.Conv2d(before, width * 2**i, 4, 2, 1, bias=False))
            layers += [nn.BatchNorm2d(width * 2**i)] if i else []
            layers.append(nn.LeakyReLU(LEAK))
            before = width * 2**i
        while before > most:
            layers += [*self._flat(before, before // 2)]
            before //= 2
        self.features = nn.Sequential(*layers)
        self.joint = nn.Sequential(*self._flat(before + features, before))
        self.alone_logit = nn.Conv2d(before, 1, SMALLEST)
        self.joint_logit = nn.Conv2d(before, 1, SMALLEST)

    @staticmethod
    def _flat(before: int, after: int) -> list[nn.Module]:
        return [conv(before, after), nn.BatchNorm2d(after), nn.LeakyReLU(LEAK)]

    def alone(self, seen_NCHW: Tensor) -> Tensor:
        """Logits (N,) of images by their `features`."""
        return self.alone_logit(seen_NCHW).flatten()

    def with_caption(self, seen_NCHW: Tensor, sentence_ND: Tensor) -> Tensor:
        """Logits (N,) of images by their `features`, and of captions."""
        said_NDHW = sentence_ND[:, :, None, None].expand(-1, -1, *seen_NCHW.shape[2:])
        return self.joint_logit(self.joint(torch.cat([seen_NCHW, said_NDHW.to(seen_NCHW)], 1)))[
            :, 0, 0, 0
        ]


class Judges(nn.Module):
    """One for each size, the smallest first."""

    def __init__(self, judges: Sequence[Judge]) -> None:
        super().__init__()
        self.of_size = nn.ModuleList(judges)


def _halvings(resolution: int) -> int:
    """From an image's side to 4."""
    return int(math.log2(resolution // SMALLEST))


def sides(resolution: int, stages: int) -> list[int]:
    """Height and width of each stage's images. Raises ValueError where they do not fit."""
    found = [resolution // 2**i for i in reversed(range(stages))]
    first = found[0]
    whole = first << (stages - 1) == resolution and first & (first - 1) == 0
    if first < 2 * SMALLEST or not whole:
        least = 2 * SMALLEST * 2 ** (stages - 1)
        raise ValueError(
            f"--data.resolution {resolution} does not halve {stages - 1} times down to 8, 16, "
            f"32 ... pixels, as {stages} stages need: give {least}, {2 * least}, {4 * least} ..., "
            f"or fewer --generator.stages and --discriminators.stages"
        )
    return found


@dataclass(frozen=True)
class Generator(Network):
    """Sizes of the generator."""

    latent: int = 100
    """Length of the noise."""
    condition: int = 100
    """Length of what conditioning augmentation tells of the caption."""
    width: int = 32
    """Channels of each stage's last map."""
    blocks: int = 2
    """Residual blocks of each stage but the first."""
    stages: int = 3
    """Sizes of images; the last is the data's, each other half of the next."""
    features: int = 256
    """Of a word and of a caption, as the encoders make them."""

    traceable: ClassVar[bool] = False  # it takes captions, which no exported form does

    def build(self, images: ImageSpec) -> nn.Module:
        doublings = _halvings(sides(images.resolution, self.stages)[0])
        return Painter(self, images.channels, doublings).apply(init_weights)


@dataclass(frozen=True)
class Discriminators(Network):
    """Sizes of the discriminators."""

    width: int = 64
    """Channels of the first layers."""
    stages: int = 3
    """How many there are, as the generator has sizes of images."""
    features: int = 256
    """Of a caption."""

    def build(self, images: ImageSpec) -> nn.Module:
        specs = [ImageSpec(images.channels, side) for side in sides(images.resolution, self.stages)]
        return Judges([Judge(s, self.width, self.features) for s in specs]).apply(init_weights)
