"""Style transfer by the means and standard deviations of features: an encoder that is fixed, AdaIN,
and a decoder.

Huang and Belongie 2017, "Arbitrary style transfer in real-time with adaptive instance
normalization", https://arxiv.org/abs/1703.06868, figure 2 and section 6.1: the encoder is VGG19 up
to relu4_1, the decoder mirrors it with nearest doublings in place of poolings; both pad by
reflection, the decoder has no norm. The authors' VGG has been rescaled; here it is torchvision's as
it is. Without its weights the encoder has random orthogonal ones (Saxe et al. 2014,
https://arxiv.org/abs/1312.6120): statistics of random features tell textures apart too (He et al.
2016, "A powerful generative model using random weights for the deep image representation",
https://arxiv.org/abs/1606.04801).

Shapes: N batch, C channels, H height, W width.
"""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from engine.networks.spec import ImageSpec, Network
from engine.networks.vgg import TappedVgg19

EPS = 1e-5
LEAST = 16
"""Side of the smallest images: an eighth of it is still padded by reflection."""
VGG_WIDTH = 64


def statistics(x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of each image, float (N, C, 1, 1) (equations 5
    and 6)."""
    x_NCHW = x_NCHW.double() if x_NCHW.dtype.itemsize == 8 else x_NCHW.float()
    mean_NC11 = x_NCHW.mean((2, 3), keepdim=True)
    variance_NC11 = (x_NCHW - mean_NC11).square().mean((2, 3), keepdim=True)
    return mean_NC11, (variance_NC11 + EPS).sqrt()


def adain(content_NCHW: Tensor, style_NCHW: Tensor) -> Tensor:
    """The content's features with the means and standard deviations of the style's, whose sizes
    may be others (equation 8)."""
    mean_NC11, std_NC11 = statistics(content_NCHW)
    style_mean_NC11, style_std_NC11 = statistics(style_NCHW)
    return (content_NCHW - mean_NC11) / std_NC11 * style_std_NC11 + style_mean_NC11


class Encoder(TappedVgg19):
    """VGG19 up to the first ReLU of a block, its layers `width` / 64 times as wide; its weights are
    buffers, so that it is saved, and nothing trains it."""

    def __init__(self, width: int, levels: int) -> None:
        before = zip((1, 2, 4), (2, 2, 4), strict=True)
        blocks = [(times * width, count) for times, count in before][: levels - 1]
        super().__init__((*blocks, (width * 2 ** (levels - 1), 1)), padding="reflect")
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.orthogonal_(layer.weight, math.sqrt(2))
                nn.init.zeros_(layer.bias)
                fix(layer)


def fix(layer: nn.Module) -> None:
    """Make buffers of a layer's parameters."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        delattr(layer, name)
        layer.register_buffer(name, parameter.detach())


def mirrored(channels: int, width: int, levels: int) -> nn.Sequential:
    """Decoder: features of the encoder to images (N, C, H, W), for [-1, 1] but unbounded."""
    blocks = ((1,), (2, 1), (4, 4, 4, 2), (4,))[:levels]
    layers: list[nn.Module] = []
    before = width * 2 ** (levels - 1)
    for number, block in enumerate(reversed(blocks)):
        widths = block if number else block[-1:]  # the encoder's last block is cut short
        layers += [nn.Upsample(scale_factor=2)] if layers else []
        for after in (times * width for times in widths):
            layers += [reflected(before, after), nn.ReLU()]
            before = after
    return nn.Sequential(*layers, reflected(before, channels))


def reflected(before: int, after: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size, padded by reflection."""
    return nn.Conv2d(before, after, 3, padding=1, padding_mode="reflect")


class Styler(nn.Module):
    """Images in the style of others."""

    def __init__(self, channels: int, width: int, levels: int) -> None:
        super().__init__()
        self.encoder = Encoder(width, levels)
        self.decoder = mirrored(channels, width, levels)

    def forward(self, content_NCHW: Tensor, style_NCHW: Tensor, alpha: float = 1.0) -> Tensor:
        """Content images, of sides that are multiples of 8, in the style of others of any size, at
        least LEAST; alpha: how much so (equation 14)."""
        plain_NCHW = self.encoder(content_NCHW)[-1]
        styled_NCHW = adain(plain_NCHW, self.encoder(style_NCHW)[-1])
        return self.decoder(plain_NCHW.lerp(styled_NCHW.to(plain_NCHW), alpha))


@dataclass(frozen=True)
class StylerSizes(Network):
    """Sizes of encoder and decoder."""

    width: int = VGG_WIDTH
    """Channels of the first layers; VGG19 has 64."""
    levels: int = 4
    """Blocks of layers: 4 end at relu4_1 and an eighth of the image's size, 3 at relu3_1 and a
    quarter, which keeps more of the content and trains faster."""

    def build(self, images: ImageSpec) -> nn.Module:
        if not 2 <= self.levels <= 4:
            raise ValueError(f"--styler.levels {self.levels} is none of 2, 3 and 4")
        if images.resolution < LEAST:
            raise ValueError(
                f"--data.resolution {images.resolution} is too small for the encoder, which "
                f"halves it three times: give at least {LEAST}"
            )
        if images.resolution % 8:
            raise ValueError(
                f"--data.resolution {images.resolution} is no multiple of 8, by which the encoder "
                f"reduces it"
            )
        return Styler(images.channels, self.width, self.levels)
