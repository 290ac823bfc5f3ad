"""DCGAN: all-convolutional generator and discriminator.

Radford, Metz and Chintala 2016, "Unsupervised representation learning with deep convolutional
generative adversarial networks", section 3 and figure 1; layer by layer as in the authors' code:
4x4 kernels, stride 2, no bias, BatchNorm but at the generator's output and the discriminator's
input; N(0, 0.02) weights.

Shapes: N batch, C channels, H height, W width, L latent.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from engine.networks.point import FromPoint, ToPoint
from engine.networks.spec import ImageSpec, Network


def stages(resolution: int, smallest: int = 4) -> tuple[int, int]:
    """(base, doublings) with resolution = base * 2**doublings and base the least >= smallest.

    64 gives (4, 4) and 28 gives (7, 2). Raises ValueError where no such base is below twice
    `smallest`.
    """
    base, doublings = resolution, 0
    while base % 2 == 0 and base // 2 >= smallest:
        base, doublings = base // 2, doublings + 1
    if doublings == 0 or base >= 2 * smallest:
        raise ValueError(
            f"data.resolution={resolution} does not halve down to {smallest}..{2 * smallest - 1} "
            f"pixels, as this network needs; try 16, 28, 32 or 64"
        )
    return base, doublings


def init_weights(module: nn.Module) -> None:
    """N(0, 0.02) weights, BatchNorm scale N(1, 0.02) (DCGAN, section 4, and the authors' code)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) and module.affine:
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class Generator(Network):
    """Sizes of the generator."""

    latent: int = 100
    """Length of the latent vector."""
    width: int = 64
    """Channels before the last layer; doubled with each stage towards the input."""

    def build(self, images: ImageSpec) -> nn.Module:
        base, doublings = stages(images.resolution)
        channels = self.width * 2 ** (doublings - 1)
        layers: list[nn.Module] = [
            nn.Unflatten(1, (self.latent, 1, 1)),
            FromPoint(self.latent, channels, base),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        ]
        for _ in range(doublings - 1):
            layers += [
                nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1, bias=False),
                nn.BatchNorm2d(channels // 2),
                nn.ReLU(inplace=True),
            ]
            channels //= 2
        layers += [nn.ConvTranspose2d(channels, images.channels, 4, 2, 1, bias=False), nn.Tanh()]
        return nn.Sequential(*layers).apply(init_weights)


class Logits(nn.Module):
    """A discriminator's body with its last convolution, giving one logit per image."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits, (N,)."""
        return self.layers(x_NCHW).flatten()


@dataclass(frozen=True)
class Discriminator(Network):
    """Sizes of the discriminator."""

    width: int = 64
    """Channels after the first layer; doubled with each stage."""

    def build(self, images: ImageSpec) -> nn.Module:
        base, doublings = stages(images.resolution)
        channels = self.width
        layers: list[nn.Module] = [
            nn.Conv2d(images.channels, channels, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        for _ in range(doublings - 1):
            layers += [
                nn.Conv2d(channels, channels * 2, 4, 2, 1, bias=False),
                nn.BatchNorm2d(channels * 2),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            channels *= 2
        layers.append(ToPoint(channels, 1, base))
        return Logits(layers).apply(init_weights)
