"""Variational autoencoder: one update of encoder and decoder on each batch.

Kingma and Welling 2014, "Auto-encoding variational Bayes", equation 10 with one sample per image:
minimise -log p(x|z) + KL(q(z|x) || p(z)), z = mean + sigma * noise. With beta > 1 it is the
beta-VAE (Higgins et al. 2017, equation 4). Both terms are summed over pixels and latents and
averaged over images: beta means nothing without that.

Shapes: N batch, C channels, H height, W width, L latent.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn

from engine.algorithm import Algorithm, Networks, Values
from engine.losses import bernoulli_nll, gaussian_nll, sample_and_kl
from engine.networks.spec import Network
from engine.networks.vae import Decoder, Sampler
from engine.player import Player
from engine.settings import PlayerSettings
from kernels import philox
from pipelines.batch import Batch

NOISE = 1  # noise stream
PIXELS = {"bernoulli": bernoulli_nll, "gaussian": gaussian_nll}


@dataclass(frozen=True)
class Variational(Algorithm):
    """An encoder and a decoder, one player."""

    autoencoder: PlayerSettings
    pixels: Literal["bernoulli", "gaussian"] = "bernoulli"
    """p(x|z): bernoulli is binary cross-entropy on grey targets in [0, 1]; gaussian is half the
    squared error of images in [0, 1], variance 1. Both summed over pixels."""
    beta: float = 1.0
    """Weight of the KL, summed over latents."""

    def latent_dim(self) -> int:
        return self.autoencoder.network.latent

    def sampler_settings(self) -> Network:
        return Decoder(self.autoencoder.network, self.pixels)

    def sampler(self, networks: Networks) -> nn.Module:
        return Sampler(networks["autoencoder"].decoder, self.pixels)

    def reconstruct(self, networks: Networks, images_NCHW: Tensor) -> Tensor:
        mean_NL, _ = networks["autoencoder"].encode(images_NCHW)
        return self.decode(networks, mean_NL)

    def held_out(self, networks: Networks, batch: Batch, key: Tensor) -> Values:
        nll_N, kl_N = terms(
            networks["autoencoder"],
            batch.images_NCHW,
            key,
            batch.position_N,
            pixels=self.pixels,
            latent=self.latent_dim(),
        )
        values = {"elbo": -(nll_N + kl_N), "reconstruction": nll_N, "kl": kl_N}
        pixels = batch.images_NCHW[0].numel()
        return values | {"bits_per_dim": bits_per_dim(nll_N + kl_N, pixels, self.pixels)}

    def start(self, players: dict[str, Player], key: Tensor) -> Callable[[Batch], Values]:
        loss = partial(negative_elbo, pixels=self.pixels, latent=self.latent_dim(), beta=self.beta)
        autoencoder = players["autoencoder"]

        def step(batch: Batch) -> Values:
            return autoencoder.update(loss, batch.images_NCHW, key, batch.position_N)

        return step


def terms(
    network: nn.Module,
    images_NCHW: Tensor,
    key: Tensor,
    position_N: Tensor,
    *,
    pixels: str,
    latent: int,
) -> tuple[Tensor, Tensor]:
    """(-log p(x|z), KL(q(z|x) || p(z))) of each image, (N,) each, in nats."""
    mean_NL, log_variance_NL = network.encode(images_NCHW)
    noise_NL = philox.normal(key, NOISE, position_N, latent)
    z_NL, kl_N = sample_and_kl(mean_NL, log_variance_NL, noise_NL)
    target_NCHW = (images_NCHW + 1) / 2
    return PIXELS[pixels](network.decode(z_NL), target_NCHW), kl_N


def bits_per_dim(nats_N: Tensor, pixels: int, kind: str) -> Tensor:
    """Bound on -log2 p(x) per channel and pixel from the negative ELBO in nats, (N,).

    gaussian: of 8-bit images, the density over [0, 1] being 256 times that over 0..255 (Theis et
    al. 2016, section 3.1), with the constant that the loss leaves out. bernoulli: of grey targets,
    which is no bound for 8-bit images.
    """
    if kind == "gaussian":
        nats_N = nats_N + pixels * (0.5 * math.log(2 * math.pi) + math.log(256))
    return nats_N / (pixels * math.log(2))


def negative_elbo(
    network: nn.Module,
    images_NCHW: Tensor,
    key: Tensor,
    position_N: Tensor,
    *,
    pixels: str,
    latent: int,
    beta: float,
) -> tuple[Tensor, Values]:
    """-log p(x|z) + beta * KL averaged over images, and its two terms."""
    nll_N, kl_N = terms(network, images_NCHW, key, position_N, pixels=pixels, latent=latent)
    nll, kl = nll_N.mean(), kl_N.mean()
    return nll + beta * kl, {"reconstruction": nll, "kl": kl}
