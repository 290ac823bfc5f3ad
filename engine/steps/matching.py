"""Matching: encoders of captions and of images learn which go together (DAMSM).

Xu et al. 2018, "AttnGAN: Fine-grained text to image generation with attentional generative
adversarial networks", https://arxiv.org/abs/1711.10485, section 3.2: one update minimises the
losses of words and of sentences (`engine.damsm`). An image's own caption is set against those of
all images of the batch, on whatever rank they are, or of the micro-batch where there are several.

Shapes: N batch, C channels, H height, W width, R regions, T words, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import damsm
from engine.algorithm import Algorithm, Networks, Values
from engine.anomalies import in_colours, spread
from engine.damsm import Features, Sharpness
from engine.everyone import FLOAT, gathered
from engine.networks.damsm import Encoders, read_inception
from engine.player import Player
from engine.settings import PlayerSettings
from engine.world import Ranks
from kernels import philox
from kernels.dispatch import wide
from pipelines.batch import Batch
from pipelines.captions import LENGTH
from pipelines.settings import Data

DROPOUT = 12  # noise stream
SHARP = Sharpness()
SHOWN = 6
"""Words of a caption whose attention is shown."""
EXACT = 1 << 24
"""Below this, float32 holds every whole number, as which classes go to other ranks."""


@dataclass(frozen=True)
class Matching(Algorithm):
    """Both encoders, one player."""

    encoders: PlayerSettings
    inception: Path | None = None
    """Inception-v3's weights for the image encoder: torchvision's file (.pth), or .safetensors;
    none trains a small encoder in its place."""

    def settled(self) -> "Matching":
        sizes = replace(self.encoders.network, inception=self.inception is not None)
        return replace(self, encoders=replace(self.encoders, network=sizes))

    def begin(self, networks: Networks) -> None:
        if self.inception:
            read_inception(networks["encoders"], self.inception)

    def notes(self) -> tuple[str, ...]:
        if self.inception:
            return (f"image encoder: Inception-v3, fixed, {self.inception}",)
        return (
            "image encoder: no --inception FILE, so a small network, trained with the text encoder,"
            " in place of Inception-v3: not the paper's encoder",
        )

    def uses(self) -> dict[str, str]:
        return {"text to image": "python -m engine.train attngan_birds --damsm RUN_DIR"}

    def gathered(self, data: Data) -> int:
        return FLOAT * exchanged(self.encoders.network, data)

    def talks(self) -> bool:
        return True

    def columns(self, networks: Networks, batch: Batch) -> tuple[Tensor, ...]:
        """Images, and where in them the first words of their captions look."""
        maps_NThw = word_maps(networks["encoders"], batch)[:, :SHOWN]
        maps_NTHW = F.interpolate(maps_NThw, batch.images_NCHW.shape[2:], mode="bilinear")
        channels = batch.images_NCHW.shape[1]
        pictures = [in_colours(map_NHW[:, None])[:, -channels:] for map_NHW in maps_NTHW.unbind(1)]
        return batch.images_NCHW, *pictures

    def held_out(self, networks: Networks, batch: Batch, key: Tensor) -> Values:
        """The features (N, D) of each image and of its caption."""
        found = seen_and_read(networks["encoders"], batch.images_NCHW, batch)
        return {"whole": found.whole_ND, "sentence": found.sentence_ND}

    def summarise(
        self, values: Values, labels_N: Tensor | None, without: tuple[int, ...] = ()
    ) -> dict[str, float]:
        """R-precision, and that of blind choice."""
        return damsm.r_precision(values["whole"], values["sentence"], labels_N)

    def start(self, players: dict[str, Player], key: Tensor) -> Callable[[Batch], Values]:
        encoders = players["encoders"]
        loss = matching_of(encoders.shared.ranks)

        def step(batch: Batch) -> Values:
            return encoders.update(loss, *given(batch), key, batch.position_N)

        return step


def exchanged(sizes: Encoders, data: Data) -> int:
    """Numbers of each image that `matching_losses` gives to all ranks: features, length, class."""
    return sizes.features * (sizes.regions(data.resolution) + LENGTH + 2) + 2


def given(batch: Batch) -> tuple[Tensor, ...]:
    """Images, tokens, lengths and classes; each image is its own class where there are none."""
    labels_N = batch.position_N % EXACT if batch.labels_N is None else batch.labels_N
    return batch.images_NCHW, batch.tokens_NL, batch.lengths_N, labels_N


def matching_of(ranks: Ranks) -> Callable:
    """The encoders' loss function among these ranks."""
    return partial(matching_update, ranks=ranks)


def matching_update(
    encoders: nn.Module,
    images_NCHW: Tensor,
    tokens_NT: Tensor,
    lengths_N: Tensor,
    labels_N: Tensor,
    key: Tensor,
    position_N: Tensor,
    *,
    ranks: Ranks,
) -> tuple[Tensor, Values]:
    """The encoders' loss and its parts."""
    count = encoders.text.draws(tokens_NT.shape[1])
    uniform_NM = philox.uniform(key, DROPOUT, position_N, count)
    read = encoders.text(tokens_NT, lengths_N, uniform_NM)
    seen = encoders.image(images_NCHW)
    values = matching_losses(seen, read, lengths_N, labels_N, ranks)
    return values["words"] + values["sentence"], values


def matching_losses(
    seen: tuple[Tensor, Tensor],
    read: tuple[Tensor, Tensor],
    lengths_N: Tensor,
    labels_N: Tensor,
    ranks: Ranks,
) -> Values:
    """Both losses over the images of all ranks, float32, of what the encoders make of this rank's
    images and captions."""
    parts = seen[0].flatten(2), seen[1], *read
    with torch.autocast("cuda" if seen[1].is_cuda else "cpu", enabled=False):
        everything = gathered(ranks, *map(wide, parts), lengths_N, labels_N)
        words, sentence = damsm.losses(Features(*everything), SHARP)
    return {"words": words, "sentence": sentence}


def seen_and_read(encoders: nn.Module, images_NCHW: Tensor, batch: Batch) -> Features:
    """What encoders in eval mode make of images and of a batch's captions."""
    regions_NDhw, whole_ND = encoders.image(images_NCHW)
    words_NTD, sentence_ND = encoders.text(batch.tokens_NL, batch.lengths_N)
    parts = (regions_NDhw.flatten(2), whole_ND, words_NTD, sentence_ND)
    return Features(*map(wide, parts), batch.lengths_N, batch.labels_N)


def word_maps(encoders: nn.Module, batch: Batch) -> Tensor:
    """Where in its image each word of a caption looks, (N, T, h, w), scaled to [0, 2] over the
    image; 0 after the last word."""
    regions_NDhw, _ = encoders.image(batch.images_NCHW)
    words_NTD, _ = encoders.text(batch.tokens_NL, batch.lengths_N)
    maps = []
    for regions_Dhw, words_TD, length in zip(regions_NDhw, words_NTD, batch.lengths_N, strict=True):
        given_1DR = regions_Dhw.flatten(1)[None].float()
        map_TR = damsm.attention(given_1DR, words_TD[None].float(), length[None], SHARP.regions)[
            0, 0
        ]
        maps.append(map_TR.view(-1, *regions_Dhw.shape[1:]))
    return spread(torch.stack(maps))
