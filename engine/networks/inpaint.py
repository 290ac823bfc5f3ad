"""Gated-convolution generator and SN-PatchGAN for repairing images.

Yu et al. 2019, "Free-form image inpainting with gated convolution" (DeepFill v2),
https://arxiv.org/abs/1806.03589, sections 3.1 to 3.4; widths and kernels as in the authors' code
(generative_inpainting, inpaint_model.py). The generator is its coarse stage: without a second,
refining one and its contextual attention. The discriminator's last convolution has no activation.

Shapes: N batch, C channels, H height, W width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.networks.spec import ImageSpec, Network

MULTIPLE = 4
"""By which the generator reduces an image."""
DILATIONS = (2, 4, 8, 16)
LEAK = 0.2
WIDEST = 4
"""Times the first layer's channels, at most."""


class Gated(nn.Module):
    """A convolution that keeps the size but for its stride, of which another one says where and by
    how much it counts: ELU(features) * sigmoid(gate) (equation 2)."""

    def __init__(
        self, before: int, after: int, kernel: int = 3, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.both = nn.Conv2d(before, 2 * after, kernel, stride, padding, dilation)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, after, H', W')."""
        features, gate = self.both(x_NCHW).chunk(2, 1)
        return F.elu(features) * gate.sigmoid()


class Repairer(nn.Module):
    """Two halvings, dilated convolutions that look far around, two doublings."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        middle = 4 * width
        self.layers = nn.Sequential(
            Gated(channels + 1, width, 5),
            Gated(width, 2 * width, stride=2),
            Gated(2 * width, 2 * width),
            Gated(2 * width, middle, stride=2),
            *(Gated(middle, middle) for _ in range(2)),
            *(Gated(middle, middle, dilation=dilation) for dilation in DILATIONS),
            *(Gated(middle, middle) for _ in range(2)),
            nn.Upsample(scale_factor=2),
            Gated(middle, 2 * width),
            Gated(2 * width, 2 * width),
            nn.Upsample(scale_factor=2),
            Gated(2 * width, width),
            Gated(width, max(width // 2, 1)),
            nn.Conv2d(max(width // 2, 1), channels, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, x_NCHW: Tensor, hole_N1HW: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1], also where they were known, of images and where their
        holes are (bool); H and W multiples of MULTIPLE. What is in the holes is not looked at."""
        grey_NCHW = torch.where(hole_N1HW, 0.0, x_NCHW)
        return self.layers(torch.cat([grey_NCHW, hole_N1HW.to(x_NCHW.dtype)], 1))


def init(module: nn.Module) -> None:
    """Weights of Glorot and Bengio 2010, biases 0: TensorFlow's defaults, as the authors have."""
    if isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class Generator(Network):
    """Sizes of the generator."""

    width: int = 24
    """Channels after the first gated convolution: half of the paper's 48, which counts the gates'
    too."""

    def build(self, images: ImageSpec) -> nn.Module:
        if images.resolution % MULTIPLE:
            raise ValueError(
                f"--data.resolution {images.resolution} is no multiple of {MULTIPLE}, by which the "
                f"generator reduces it"
            )
        return Repairer(images.channels, self.width).apply(init)


class PatchCritic(nn.Module):
    """Halvings by 5x5 convolutions, each output value judging a patch (section 3.3)."""

    def __init__(self, channels: int, width: int, layers: int) -> None:
        super().__init__()
        made: list[nn.Module] = []
        before = channels + 1
        for i in range(layers):
            after = width * min(2**i, WIDEST)
            made += [nn.Conv2d(before, after, 5, stride=2, padding=2), nn.LeakyReLU(LEAK)]
            before = after
        self.layers = nn.Sequential(*made[:-1])

    def forward(self, x_NCHW: Tensor, hole_N1HW: Tensor) -> Tensor:
        """Outputs (N, C', H', W') for images that may have been repaired there."""
        return self.layers(torch.cat([x_NCHW, hole_N1HW.to(x_NCHW.dtype)], 1))


@dataclass(frozen=True)
class Discriminator(Network):
    """Sizes of SN-PatchGAN."""

    width: int = 64
    """Channels of the first layer."""
    layers: int = 6
    """Halvings."""

    def build(self, images: ImageSpec) -> nn.Module:
        return PatchCritic(images.channels, self.width, self.layers).apply(init)
