"""Autoencoder with a codebook: one update of encoder and decoder on each batch, then the codebook.

van den Oord et al. 2017, "Neural discrete representation learning",
https://arxiv.org/abs/1711.00937, equation 3 with its appendix A.1: minimise

    E[(x - decoder(e))^2] + commitment E[(z - sg(e))^2]

where e is the codebook's vector nearest to z = encoder(x), and sg stops gradients. Means are over
all values, as in the authors' code (which divides the first by the variance of the data, 1 here;
images are in [-1, 1]). The decoder's gradient goes straight through to z: e + z - sg(z). The
codebook has no part in the loss: it follows by moving averages (`engine.codebook`).

Shapes: N batch, C channels, H height, W width, h and w those of the code map, D length of a code's
vector, K codes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.algorithm import Algorithm, Networks, Values
from engine.codebook import follow, perplexity
from engine.player import Player
from engine.settings import PlayerSettings
from pipelines.batch import Batch
from pipelines.settings import Data

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Quantised(Algorithm):
    """An encoder, a codebook and a decoder, one player."""

    autoencoder: PlayerSettings
    commitment: float = 0.25
    """Weight of the distance of the encoder's vectors from those of the codebook (beta)."""
    decay: float = 0.99
    """Of the codebook's moving averages, in an iteration."""
    revive_below: float = 1.0
    """A code that on average stands for fewer vectors of a batch begins anew at one of them, drawn
    at random; 0 leaves all codes as they are."""

    def check(self) -> None:
        if self.commitment < 0 or self.revive_below < 0:
            raise ValueError("--commitment and --revive-below must not be negative")
        if not 0 <= self.decay < 1:
            raise ValueError(f"--decay {self.decay} must be at least 0 and below 1")

    def check_data(self, data: Data) -> None:
        sizes = self.autoencoder.network
        vectors = data.batch * sizes.side(data.resolution) ** 2
        if self.revive_below * sizes.codes > vectors:
            raise ValueError(
                f"--revive-below {self.revive_below:g}: a batch has {vectors:,} vectors for "
                f"{sizes.codes:,} codes, too few for each to stand for so many: give a larger "
                f"--data.batch, fewer --autoencoder.codes, or a smaller --revive-below (0: never)"
            )

    def reduced(self) -> int:
        sizes = self.autoencoder.network
        return FLOAT * sizes.codes * (1 + 2 * sizes.length)

    def reconstruct(self, networks: Networks, images_NCHW: Tensor) -> Tensor:
        network = networks["autoencoder"]
        return network.decode(network.encode(images_NCHW))

    def columns(self, networks: Networks, batch: Batch) -> tuple[Tensor, ...]:
        """Images, what their codes give, and the thumbnails of `trivial`."""
        images_NCHW = batch.images_NCHW
        made_NCHW = self.reconstruct(networks, images_NCHW)
        return images_NCHW, made_NCHW, self.trivial(batch)["thumbnail"]

    def trivial(self, batch: Batch) -> dict[str, Tensor]:
        """colour: each image's mean colour. thumbnail: each image made smaller (means of areas),
        to the largest square whose 8-bit values take no more bits than its codes, K being of
        log2 K bits each; and enlarged again (bicubic)."""
        x_NCHW = batch.images_NCHW
        sizes = self.autoencoder.network
        bits = sizes.side(x_NCHW.shape[2]) ** 2 * math.log2(sizes.codes)
        side = max(math.isqrt(int(bits / (8 * x_NCHW.shape[1]))), 1)
        small_NCHW = F.interpolate(x_NCHW, (side, side), mode="area")
        large_NCHW = F.interpolate(small_NCHW, x_NCHW.shape[2:], mode="bicubic")
        colour_NCHW = x_NCHW.mean((2, 3), keepdim=True).expand_as(x_NCHW)
        return {"colour": colour_NCHW, "thumbnail": large_NCHW.clamp(-1, 1)}

    def held_out(self, networks: Networks, batch: Batch, key: Tensor) -> Values:
        """The mean squared error of each image, (N,), and its codes, (N, h w)."""
        network, x_NCHW = networks["autoencoder"], batch.images_NCHW
        code_Nhw = network.encode(x_NCHW)
        error_N = (network.decode(code_Nhw) - x_NCHW).square().flatten(1).mean(1)
        return {"reconstruction": error_N, "code": code_Nhw.flatten(1)}

    def summarise(
        self, values: Values, labels_N: Tensor | None, without: tuple[int, ...] = ()
    ) -> dict[str, float]:
        """The mean error; the perplexity of the codes of all images, and the share of codes that
        stand for anything in them."""
        codes = self.autoencoder.network.codes
        count_K = torch.bincount(values["code"].long().flatten(), minlength=codes)
        return {
            "reconstruction": float(values["reconstruction"].mean()),
            "code_perplexity": float(perplexity(count_K)),
            "codes_in_use": float((count_K > 0).double().mean()),
        }

    def start(self, players: dict[str, Player], key: Tensor) -> Callable[[Batch], Values]:
        autoencoder = players["autoencoder"]
        loss = partial(quantised_update, commitment=self.commitment)

        def step(batch: Batch) -> Values:
            values = autoencoder.update(loss, batch.images_NCHW)
            found = [values.pop(f"autoencoder/{name}") for name in ("vectors", "codes")]
            place = key, batch.position_N
            return values | follow(
                autoencoder, *found, *place, decay=self.decay, revive_below=self.revive_below
            )

        return step


def quantised_update(
    network: nn.Module, images_NCHW: Tensor, *, commitment: float
) -> tuple[Tensor, Values]:
    """The loss, its two parts, and for the codebook the vectors z (N, D, h, w) and their codes."""
    z_NDhw = network.vectors(images_NCHW)
    code_Nhw = network.codebook.nearest(z_NDhw.detach())
    e_NDhw = network.codebook.look_up(code_Nhw)
    # in this order the decoder sees e to the last bit
    made_NCHW = network.decoder(e_NDhw + (z_NDhw - z_NDhw.detach())).float()
    values = {
        "reconstruction": F.mse_loss(made_NCHW, images_NCHW),
        "commitment": F.mse_loss(z_NDhw, e_NDhw),
    }
    loss = values["reconstruction"] + commitment * values["commitment"]
    return loss, values | {"vectors": z_NDhw, "codes": code_Nhw}
