"""Autoregressive likelihood of binary images: one update of the model on each batch.

van den Oord, Kalchbrenner and Kavukcuoglu 2016, "Pixel recurrent neural networks", equation 1:
minimise -log p(x), the sum over pixels of -log p(x_i | x_1 .. x_(i-1)), in nats and averaged over
images. It is exact, not a bound.

Images are made binary by drawing each pixel with its grey value as the probability of white
(Salakhutdinov and Murray 2008, section 5). Training draws anew each time an image is seen; of
held-out images one draw is taken, the same at every measurement and in every run.

Shapes: N batch, C channels (1), H height, W width, L latent.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.algorithm import Algorithm, Networks, Values
from engine.losses import bernoulli_nll
from engine.networks.pixelrnn import Drawing, Sampler
from engine.networks.spec import Network
from engine.player import Player
from engine.settings import PlayerSettings
from kernels import philox
from pipelines.batch import Batch

BINARY, COMPLETION = 1, 5  # noise streams; pictures and metrics take 2 to 4


@dataclass(frozen=True)
class Autoregressive(Algorithm):
    """A model of each pixel given those before it, one player."""

    model: PlayerSettings
    latent: int = 784
    """Length of the latent vector: one number for each pixel, --data.resolution squared."""

    def latent_dim(self) -> int:
        return self.latent

    def sampler_settings(self) -> Network:
        return Drawing(self.model.network)

    def sampler(self, networks: Networks) -> nn.Module:
        return Sampler(networks["model"])

    def reconstruct(self, networks: Networks, images_NCHW: Tensor) -> Tensor:
        """Images whose upper half is that of the given ones, made binary, and whose lower half is
        drawn by the model, with the same noise each time."""
        key = philox.make_key(0, device=images_NCHW.device)
        position_N = torch.arange(len(images_NCHW), device=images_NCHW.device)
        z_NCHW = philox.normal(key, COMPLETION, position_N, self.latent).view_as(images_NCHW)
        upper = slice(images_NCHW.shape[2] // 2)
        white_NCHW = binarise(images_NCHW, key, position_N)[:, :, upper] > 0
        z_NCHW[:, :, upper] = torch.where(white_NCHW, -math.inf, math.inf)
        return self.decode(networks, z_NCHW.flatten(1))

    def held_out(self, networks: Networks, batch: Batch, key: Tensor) -> Values:
        nll_N = nll(networks["model"], batch.images_NCHW, key, batch.position_N)
        return {"nll": nll_N, "bits_per_dim": nll_N / (self.latent * math.log(2))}

    def start(self, players: dict[str, Player], key: Tensor) -> Callable[[Batch], Values]:
        model = players["model"]
        side = model.network.resolution
        if self.latent != side * side:
            raise ValueError(
                f"--latent {self.latent} does not fit data.resolution={side}: give one number for "
                f"each pixel, --latent {side * side}"
            )

        def step(batch: Batch) -> Values:
            return model.update(mean_nll, batch.images_NCHW, key, batch.position_N)

        return step


def binarise(images_NCHW: Tensor, key: Tensor, position_N: Tensor) -> Tensor:
    """Images of -1 and 1, white with the grey value's probability, for images in [-1, 1] at these
    places in the stream of images."""
    u_NL = philox.uniform(key, BINARY, position_N, images_NCHW[0].numel())
    white_NCHW = u_NL.view_as(images_NCHW) < (images_NCHW + 1) / 2
    return white_NCHW.to(images_NCHW.dtype) * 2 - 1


def nll(network: nn.Module, images_NCHW: Tensor, key: Tensor, position_N: Tensor) -> Tensor:
    """-log p(x) of each image, made binary, (N,) in nats."""
    x_NCHW = binarise(images_NCHW, key, position_N)
    return bernoulli_nll(network(x_NCHW), (x_NCHW + 1) / 2)


def mean_nll(
    network: nn.Module, images_NCHW: Tensor, key: Tensor, position_N: Tensor
) -> tuple[Tensor, Values]:
    """-log p(x) averaged over images."""
    return nll(network, images_NCHW, key, position_N).mean(), {}
