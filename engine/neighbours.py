"""Does a model memorise? Its samples beside the training images that are nearest to them.

Nearest by Euclidean distance of pixels, as in Goodfellow et al. 2014, figure 2. The figure compares
that distance with the one of images that the model has never seen, as Meehan et al. 2020 ("A
non-parametric test to detect data-copying in generative models", section 2) do.

Shapes: N samples, K neighbours of each, M training images, C channels, H height, W width, D pixels
of a reduced image (at most SIDE x SIDE, C channels).
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from engine import pictures
from engine.originals import UNUSABLE, in_random_order
from pipelines.datasets import Dataset, decode_some, find
from pipelines.pack import load, pack_path
from pipelines.settings import Data

SIDE = 32
"""Pixels to which larger images are averaged before they are compared."""
IMAGES, CACHE_BYTES, DECODED = 50_000, 1 << 30, 2_000
"""Training images searched: at most IMAGES of at most CACHE_BYTES of the packed cache; without
one, the first DECODED."""
HELD_OUT = 64
"""Held-out images whose distance is the unit."""
CHUNK = 2_000
COLUMNS, TILE = 4, 64
"""Neighbours of each sample in the picture, and pixels to which tiny images are enlarged."""


class Neighbours:
    """The training images of a run, reduced and in memory."""

    def __init__(self, dataset: Dataset, data: Data, device: torch.device) -> None:
        self.device, self.flip = device, data.flip
        self._full_MCHW = _training_images(dataset, data)
        self._reduced_MD = _reduced_set(torch.from_numpy(self._full_MCHW))
        chunks = self._reduced_MD.split(CHUNK)
        self._squared_M = torch.cat([part.float().square().sum(1) for part in chunks]).to(device)
        self.unseen = self._unseen_distance(data)

    def __len__(self) -> int:
        return len(self._reduced_MD)

    def _unseen_distance(self, data: Data) -> float | None:
        """Median distance of held-out images to their nearest training image, if there are any."""
        quiet = replace(data, download=False, on_error="skip")
        try:
            images_NCHW = in_random_order(find(quiet, "test"), quiet, 0, HELD_OUT)
        except UNUSABLE:
            return None
        return float(self.nearest(images_NCHW, 1).distance_NK.median())

    def distance(self, found: "Found") -> float | None:
        """Median distance of samples to their nearest training image, in that of held-out images.

        1: as far from the training set as real images never seen; much below 1: copies. None where
        the dataset has no held-out images. Blurred images are near to all others, also to these.
        """
        return float(found.distance_NK[:, 0].median()) / self.unseen if self.unseen else None

    def picture(self, images_NCHW: Tensor, found: "Found") -> Image.Image:
        """A row per sample, (N, C, H, W) in [-1, 1]: the sample, a gap, and its neighbours."""
        rows, mirrored = found.row_NK.flatten(), found.mirrored_NK.view(-1, 1, 1, 1)
        beside_NCHW = torch.from_numpy(self._full_MCHW[rows.numpy()]).float() / 127.5 - 1
        beside_NCHW = torch.where(mirrored, beside_NCHW.flip(-1), beside_NCHW)
        factor = -(-TILE // images_NCHW.shape[-1])
        left, right = (
            pictures.grid(
                x.repeat_interleave(factor, 2).repeat_interleave(factor, 3), columns, least=1
            )
            for x, columns in ((images_NCHW, 1), (beside_NCHW, found.row_NK.shape[1]))
        )
        gap = TILE // 8
        both = Image.new("RGB", (left.width + gap + right.width, left.height), "white")
        both.paste(left, (0, 0))
        both.paste(right, (left.width + gap, 0))
        return both

    def nearest(self, images_NCHW: Tensor, count: int = COLUMNS) -> "Found":
        """The nearest training images of these (N, C, H, W) in [-1, 1]; where the run mirrors its
        images, each is sought in both ways."""
        pixels_NCHW = ((images_NCHW.float().clamp(-1, 1) + 1) * 127.5).round()
        found = [(*self._search(_reduced(pixels_NCHW).to(self.device), count), False)]
        if self.flip:
            mirror_ND = _reduced(pixels_NCHW.flip(-1)).to(self.device)
            found.append((*self._search(mirror_ND, count), True))
        distance_NK = torch.cat([distance_NK for distance_NK, _, _ in found], 1)
        row_NK = torch.cat([row_NK for _, row_NK, _ in found], 1)
        mirrored_NK = torch.cat([torch.full_like(row, flag) for _, row, flag in found], 1)
        distance_NK, place_NK = distance_NK.topk(min(count, distance_NK.shape[1]), largest=False)
        mirrored_NK = mirrored_NK.gather(1, place_NK).bool()
        return Found(distance_NK, row_NK.gather(1, place_NK), mirrored_NK)

    def _search(self, sample_ND: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(distances, rows) (N, K) of the nearest reduced images, on the host; sought by
        |b|^2 - 2ab, which is |a - b|^2 up to |a|^2, and measured again without its rounding."""
        scores, rows, first = [], [], 0
        for part_MD in self._reduced_MD.split(CHUNK):
            squared_M = self._squared_M[first : first + len(part_MD)]
            score_NM = squared_M - 2 * (sample_ND @ part_MD.to(self.device).float().T)
            score_NK, row_NK = score_NM.topk(min(count, len(part_MD)), largest=False)
            scores.append(score_NK)
            rows.append(row_NK + first)
            first += len(part_MD)
        scores_N, rows_N = torch.cat(scores, 1), torch.cat(rows, 1)
        place_NK = scores_N.topk(min(count, scores_N.shape[1]), largest=False).indices
        row_NK = rows_N.gather(1, place_NK).cpu()
        found_NKD = self._reduced_MD[row_NK.flatten()].float().view(*row_NK.shape, -1)
        return (sample_ND.cpu()[:, None] - found_NKD).square().sum(2).sqrt(), row_NK


class Found(NamedTuple):
    """Distances (grey levels, Euclidean), rows and whether mirrored of the nearest training images,
    nearest first, on the host."""

    distance_NK: Tensor
    row_NK: Tensor
    mirrored_NK: Tensor


def _training_images(dataset: Dataset, data: Data) -> np.ndarray:
    """uint8 (M, C, H, W)."""
    pack = load(pack_path(dataset, data), dataset)
    if pack is None:
        return decode_some(dataset, range(len(dataset)), DECODED, skip=True)
    count = min(IMAGES, max(1, CACHE_BYTES // int(np.prod(dataset.fit.stored))))
    return dataset.fit.shown(pack.images_NHWC[:count])


def _reduced_set(images_MCHW: Tensor) -> Tensor:
    """uint8 (M, D) of uint8 images (M, C, H, W); no copy where none needs averaging."""
    if max(images_MCHW.shape[-2:]) <= SIDE:
        return images_MCHW.flatten(1)
    size = _reduced(images_MCHW[:1].float()).shape[1]
    reduced_MD = torch.empty(len(images_MCHW), size, dtype=torch.uint8)
    chunks = zip(images_MCHW.split(CHUNK), reduced_MD.split(CHUNK), strict=True)
    for part_MCHW, part_MD in chunks:
        part_MD.copy_(_reduced(part_MCHW.float()))
    return reduced_MD


def _reduced(images_NCHW: Tensor) -> Tensor:
    """Images (N, C, H, W) in [0, 255], averaged to at most SIDE x SIDE and rounded: (N, D)."""
    height, width = images_NCHW.shape[-2:]
    if max(height, width) > SIDE:
        images_NCHW = adaptive_avg_pool2d(images_NCHW, (min(height, SIDE), min(width, SIDE)))
    return images_NCHW.round().flatten(1)
