"""f-AnoGAN for small grey images: generator, critic and encoder, convolutional, without BatchNorm.

Schlegl et al. 2019 take generator and critic of WGAN-GP (Gulrajani et al. 2017) as they are, and
for the encoder the critic's body with a linear layer to the latent vector, without a squashing
function. Theirs are the residual networks for 64x64 images; these are the ones that the authors of
WGAN-GP have for MNIST: 5x5 kernels, stride 2. The generator ends in tanh, for images in [-1, 1]
(theirs are in [0, 1], by a sigmoid).

Shapes: N batch, C channels, H height, W width, L latent, F features.
"""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from engine.networks.spec import ImageSpec, Network


def sides(resolution: int, stages: int = 3) -> tuple[int, ...]:
    """Sides of the maps from the image's inwards, each half of the one before, rounded up."""
    found = [resolution]
    for _ in range(stages):
        found.append(-(-found[-1] // 2))
    return tuple(found)


def init_weights(module: nn.Module) -> None:
    """He-normal weights for LeakyReLU, biases zero (WGAN-GP's code has He's uniform ones)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        # of a transposed convolution of stride 2 each output sees a quarter of the kernel
        fan_in = module.weight[0].numel()
        if isinstance(module, nn.ConvTranspose2d):
            fan_in = module.in_channels * module.kernel_size[0] ** 2 / 4
        nn.init.normal_(module.weight, 0.0, (2 / fan_in) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class Generator(Network):
    """Sizes of the generator."""

    latent: int = 128
    """Length of the latent vector."""
    width: int = 64
    """Channels before the last layer; doubled with each stage towards the input."""

    def build(self, images: ImageSpec) -> nn.Module:
        inwards = sides(images.resolution)
        widths = (images.channels, self.width, 2 * self.width, 4 * self.width)
        layers: list[nn.Module] = [
            nn.Linear(self.latent, widths[-1] * inwards[-1] ** 2),
            nn.ReLU(inplace=True),
            nn.Unflatten(1, (widths[-1], inwards[-1], inwards[-1])),
        ]
        outwards = zip(pairwise(widths[::-1]), pairwise(inwards[::-1]), strict=True)
        for (before, after), (small, large) in outwards:
            more = large - 2 * small + 1  # 0 where 4 pixels become 7: their code cuts the 8th off
            layers += [nn.ConvTranspose2d(before, after, 5, 2, 2, more), nn.ReLU(inplace=True)]
        layers[-1] = nn.Tanh()
        return nn.Sequential(*layers).apply(init_weights)


def body(images: ImageSpec, width: int) -> tuple[nn.Sequential, int]:
    """Convolutions to flat features (N, F), and how many these are."""
    widths = (images.channels, width, 2 * width, 4 * width)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 5, 2, 2), nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*layers, nn.Flatten()), widths[-1] * sides(images.resolution)[-1] ** 2


class Judge(nn.Module):
    """A critic that shows what it judges by."""

    def __init__(self, body: nn.Module, features: int) -> None:
        super().__init__()
        self.body = body
        self.last = nn.Linear(features, 1, bias=False)  # a Wasserstein loss cancels a constant

    def features(self, x_NCHW: Tensor) -> Tensor:
        """Input of the last layer, (N, F)."""
        return self.body(x_NCHW)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Opinions, (N,), unbounded."""
        return self.last(self.features(x_NCHW)).flatten()


@dataclass(frozen=True)
class Critic(Network):
    """Sizes of the critic."""

    width: int = 64
    """Channels after the first layer; doubled with each stage."""

    def build(self, images: ImageSpec) -> nn.Module:
        return Judge(*body(images, self.width)).apply(init_weights)


@dataclass(frozen=True)
class Encoder(Network):
    """Sizes of the encoder."""

    latent: int = 128
    """Length of the latent vector; the generator's."""
    width: int = 64
    """Channels after the first layer; doubled with each stage."""

    def build(self, images: ImageSpec) -> nn.Module:
        layers, features = body(images, self.width)
        return layers.append(nn.Linear(features, self.latent)).apply(init_weights)
