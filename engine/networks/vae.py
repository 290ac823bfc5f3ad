"""Variational autoencoders: fully connected and convolutional.

Kingma and Welling 2014, "Auto-encoding variational Bayes", appendix C: a Gaussian encoder gives
mean and log-variance of q(z|x), a decoder gives p(x|z). Images stay in [-1, 1] outside; the loss
decides what the decoder's output means.

Shapes: N batch, C channels, H height, W width, L latent.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from engine.networks.spec import ImageSpec, Network


class Autoencoder(nn.Module):
    """Encoder to (mean, log-variance) and decoder from a latent vector."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def encode(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), (N, L) each, float32."""
        mean_NL, log_variance_NL = self.encoder(x_NCHW).float().chunk(2, dim=1)
        return mean_NL, log_variance_NL

    def decode(self, z_NL: Tensor) -> Tensor:
        """Decoder output, (N, C, H, W), float32, before any squashing."""
        return self.decoder(z_NL).float()


@dataclass(frozen=True)
class Dense(Network):
    """Sizes of the fully connected autoencoder (pixels-hidden-latent and back)."""

    hidden: int = 400
    """Units of the hidden layer."""
    latent: int = 20
    """Length of the latent vector."""

    def build(self, images: ImageSpec) -> nn.Module:
        shape = (images.channels, images.resolution, images.resolution)
        pixels = shape[0] * shape[1] * shape[2]
        encoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(pixels, self.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(self.hidden, 2 * self.latent),
        )
        decoder = nn.Sequential(
            nn.Linear(self.latent, self.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(self.hidden, pixels),
            nn.Unflatten(1, shape),
        )
        return Autoencoder(encoder, decoder)


@dataclass(frozen=True)
class Convolutional(Network):
    """Sizes of the convolutional autoencoder: 4x4 kernels, stride 2, BatchNorm, ReLU."""

    latent: int = 64
    """Length of the latent vector."""
    widths: tuple[int, ...] = (128, 256, 512, 1024)
    """Channels of the encoder's stages; the decoder mirrors them."""

    def build(self, images: ImageSpec) -> nn.Module:
        base, left = divmod(images.resolution, 2 ** len(self.widths))
        if left or not base:
            raise ValueError(
                f"data.resolution={images.resolution} cannot be halved {len(self.widths)} times; "
                f"give as many widths as it can"
            )
        flat = self.widths[-1] * base * base
        encoder: list[nn.Module] = []
        for before, after in zip((images.channels, *self.widths), self.widths, strict=False):
            encoder += _block(nn.Conv2d(before, after, 4, 2, 1, bias=False), after)
        encoder += [nn.Flatten(), nn.Linear(flat, 2 * self.latent)]
        upwards = self.widths[::-1]
        decoder: list[nn.Module] = [
            nn.Linear(self.latent, flat),
            nn.Unflatten(1, (upwards[0], base, base)),
        ]
        for before, after in pairwise(upwards):
            decoder += _block(nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), after)
        decoder.append(nn.ConvTranspose2d(upwards[-1], images.channels, 4, 2, 1))
        return Autoencoder(nn.Sequential(*encoder), nn.Sequential(*decoder))


def _block(convolution: nn.Module, channels: int) -> list[nn.Module]:
    return [convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


class Sampler(nn.Module):
    """A decoder with what turns its output into images: the generating half of an autoencoder."""

    def __init__(self, decoder: nn.Module, pixels: str) -> None:
        super().__init__()
        self.decoder = decoder
        self.squash = {"bernoulli": torch.sigmoid, "gaussian": nn.Identity()}[pixels]

    def forward(self, z_NL: Tensor) -> Tensor:
        """Images, (N, C, H, W), float32 in [-1, 1]: the mean of p(x|z), clamped."""
        return self.squash(self.decoder(z_NL).float()).clamp(0, 1) * 2 - 1


@dataclass(frozen=True)
class Decoder(Network):
    """Sizes of the generating half of an autoencoder."""

    autoencoder: Network
    """Sizes of the whole."""
    pixels: Literal["bernoulli", "gaussian"] = "bernoulli"
    """What the decoder's output means: logits, or grey values in [0, 1]."""

    @property
    def latent(self) -> int:
        """Length of the latent vector."""
        return self.autoencoder.latent

    def build(self, images: ImageSpec) -> nn.Module:
        return Sampler(self.autoencoder.build(images).decoder, self.pixels)
