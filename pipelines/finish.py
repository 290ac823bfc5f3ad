"""The one finishing step, on the device: from the stored uint8 images of any pipeline to a batch.

Flip, random square and the choice of a caption are functions of the image's position in the
stream, so that they are the same in every pipeline, on any number of ranks and after a resume.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from kernels import philox
from kernels.image_batch import image_batch
from pipelines.batch import Batch, Clock
from pipelines.settings import Data
from pipelines.sources import Dataset

FLIP, CORNER, CAPTION = 1001, 1002, 1003
"""Random streams: the mirror flips, the random squares, which caption."""
OTHER = 100
"""What is added to a stream for the second of two unpaired domains."""
WINDOW = 1 << 14
"""Positions whose draws are made at a time: for the 64 of a batch, Philox's 200 small operations
would cost more than the images (1 ms on a CPU)."""


class Finish:
    """What a dataset has beside its images (labels, captions), on the device, and what its settings
    ask for. `ready` is the host's part of an iteration; called with stored images it is the
    device's."""

    def __init__(
        self, dataset: Dataset, data: Data, key: Tensor, device: torch.device, domain: int = 0
    ) -> None:
        self.fit, self.flip, self.scale, self.key = dataset.fit, data.flip, data.scale, key
        self._other = domain * OTHER
        self._labels = _table(dataset.labels, device)
        captions = dataset.captions
        self._tokens = _table(None if captions is None else captions.tokens_NKL, device)
        self._lengths = _table(None if captions is None else captions.lengths_NK, device)
        self._start: int | None = None
        self._version = 0
        self._device_start = torch.zeros((), dtype=torch.int64, device=device)
        self._drawn: dict[str, Tensor] = {}

    def ready(self, clock: Clock) -> None:
        """Draw for the coming positions, in place, once the clock leaves those that are drawn
        or the key is another."""
        window = max(WINDOW, clock.batch)
        start, version = self._start, self.key._version  # a rollback changes the key, in place
        ahead = start is not None and start <= clock.images <= start + window - clock.batch
        if ahead and version == self._version:
            return
        self._start, self._version = clock.images, version
        self._device_start.fill_(self._start)
        positions = torch.arange(window, device=self._device_start.device) + self._start
        for name, drawn in self._draw(positions).items():
            if name in self._drawn:
                self._drawn[name].copy_(drawn)  # a captured graph reads it there
            else:
                self._drawn[name] = drawn

    def _draw(self, position_N: Tensor) -> dict[str, Tensor]:
        """What the settings ask for: mirrored or not, corners, which caption; each (N,)."""
        drawn = {}
        if self.flip:
            drawn["flip"] = self._uniform(FLIP, position_N, 1)[:, 0] < 0.5
        if self.fit.side > self.fit.resolution:
            room = self.fit.side - self.fit.resolution + 1
            corner_N2 = (self._uniform(CORNER, position_N, 2) * room).long()
            drawn |= {"top": corner_N2[:, 0].contiguous(), "left": corner_N2[:, 1].contiguous()}
        if self._tokens is not None:
            choice_N1 = self._uniform(CAPTION, position_N, 1) * self._tokens.shape[1]
            drawn["caption"] = choice_N1[:, 0].long()
        return drawn

    def __call__(
        self, images_NHWC: Tensor, places_N: Tensor, rows_N: Tensor, position_N: Tensor
    ) -> Batch:
        """The batch of the images at `places_N` among the stored ones, uint8 (any, *fit.stored).

        rows_N: the dataset's rows that they are; all int64 on the device of the images. Tensor
        operations only: no synchronisation, no host copy.
        """
        assert self._start is not None, "call ready(clock) before"
        side, at_N = self.fit.resolution, position_N - self._device_start
        drawn = {name: table.index_select(0, at_N) for name, table in self._drawn.items()}
        flip_N, top_N, left_N = (drawn.get(name) for name in ("flip", "top", "left"))
        images_NCHW = image_batch(images_NHWC, places_N, side, flip_N, top_N, left_N)
        batch = Batch(images_NCHW, _rows(self._labels, rows_N), position_N)
        if self.fit.halves:
            zero_N = torch.zeros_like(places_N)
            right_N = (zero_N if left_N is None else left_N) + self.fit.side
            top_N = zero_N if top_N is None else top_N
            batch.pair_NCHW = image_batch(images_NHWC, places_N, side, flip_N, top_N, right_N)
        elif self.scale:
            batch.pair_NCHW = smaller(images_NCHW, self.scale)
        if self._tokens is not None:
            batch.tokens_NL = self._tokens[rows_N, drawn["caption"]].long()
            batch.lengths_N = self._lengths[rows_N, drawn["caption"]].long()
        return batch

    def _uniform(self, stream: int, position_N: Tensor, count: int) -> Tensor:
        return philox.uniform(self.key, stream + self._other, position_N, count)


def smaller(images_NCHW: Tensor, scale: int) -> Tensor:
    """The images in [-1, 1] made smaller: bicubic with antialias, rounded to the 256 levels of a
    file, as super-resolution papers make their inputs."""
    size = [side // scale for side in images_NCHW.shape[2:]]
    small_NCHW = interpolate(images_NCHW, size, mode="bicubic", antialias=True)
    levels_NCHW = small_NCHW.mul(127.5).add_(127.5).round_().clamp_(0, 255)
    return levels_NCHW.sub_(127.5).mul_(1 / 127.5)


def _table(rows: np.ndarray | None, device: torch.device) -> Tensor | None:
    return None if rows is None else torch.from_numpy(rows).to(device)


def _rows(table: Tensor | None, rows_N: Tensor) -> Tensor | None:
    return None if table is None else table.index_select(0, rows_N)
