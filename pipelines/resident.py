"""The resident pipeline: the packed images wholly on the device, or memory-mapped on the host."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import Batch, Clock
from pipelines.feed import HostFed, labels_on
from pipelines.finish import finish
from pipelines.order import Order
from pipelines.pack import Pack, open_pack, packed_bytes
from pipelines.settings import Data
from pipelines.sources import Dataset

SHARE_OF_MEMORY = 0.25
"""Part of the free device memory that images may take; the networks need the rest."""
WINDOW = 1 << 16
"""Stream positions, at least, that the order on the device covers before it is refreshed."""


class OnDevice:
    """Images, labels and the order of the coming epochs are device tensors: a batch is a gather."""

    name = "resident"
    choice = ""

    def __init__(
        self,
        dataset: Dataset,
        pack: Pack,
        data: Data,
        clock: Clock,
        seed: int,
        key: Tensor,
        memory_format: torch.memory_format,
    ) -> None:
        self.images, self.skipped = len(dataset), len(pack.skipped)
        self._finish = (key, data.flip, memory_format)
        self._images_NCHW = torch.from_numpy(pack.images_NCHW).to(clock.device)
        self._labels = labels_on(_shown_labels(dataset, pack), clock.device)
        self._order = Order(len(dataset), seed)
        self._start, rows = self._order.window(clock.images, max(WINDOW, clock.batch))
        self._rows = torch.from_numpy(rows).to(clock.device)
        self._device_start = torch.tensor(self._start, device=clock.device)

    def _covers(self, clock: Clock) -> bool:
        end = self._start + len(self._rows)
        return self._start <= clock.images and clock.images + clock.batch <= end

    def ready(self, clock: Clock) -> None:
        """Host part: refresh the order on the device, in place, once the clock leaves it."""
        if not self._covers(clock):
            self._start, rows = self._order.window(clock.images, max(WINDOW, clock.batch))
            self._rows.copy_(torch.from_numpy(rows))
            self._device_start.fill_(self._start)

    def batch(self, clock: Clock) -> Batch:
        """Device part: no synchronisation, no host copy."""
        assert self._covers(clock), "call ready(clock) before batch(clock)"
        position_N = clock.position_N()
        rows_N = self._rows.index_select(0, position_N - self._device_start)
        images_NCHW = self._images_NCHW.index_select(0, rows_N)
        images_NCHW = finish(images_NCHW, position_N, *self._finish)
        labels = None if self._labels is None else self._labels.index_select(0, rows_N)
        return Batch(images_NCHW, labels, position_N)

    def close(self) -> None:
        """Let go of the images."""
        self._images_NCHW = None


class Mapped(HostFed):
    """Images memory-mapped on the host, each batch gathered there and copied over."""

    name = "resident"

    def __init__(
        self,
        dataset: Dataset,
        pack: Pack,
        data: Data,
        clock: Clock,
        seed: int,
        key: Tensor,
        memory_format: torch.memory_format,
    ) -> None:
        super().__init__(dataset, data, clock, key, memory_format)
        self.skipped = len(pack.skipped)
        self._labels = labels_on(_shown_labels(dataset, pack), clock.device)
        self._order = Order(len(dataset), seed)
        self._packed_NCHW = torch.from_numpy(pack.images_NCHW)
        self._pin = clock.device.type == "cuda"
        with pack.path.open("rb") as file:  # read ahead: random first touches are slow on a disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def fetch(self, clock: Clock) -> tuple[Tensor, Tensor]:
        first = clock.images + clock.rank * self._share
        rows = torch.from_numpy(self._order.rows(np.arange(first, first + self._share)))
        shape = (self._share, *self._packed_NCHW.shape[1:])
        images_NCHW = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin)
        return torch.index_select(self._packed_NCHW, 0, rows, out=images_NCHW), rows

    def close(self) -> None:
        """Let go of the map."""
        self._packed_NCHW = None


def open_resident(
    dataset: Dataset,
    data: Data,
    path: Path,
    clock: Clock,
    seed: int,
    key: Tensor,
    memory_format: torch.memory_format,
    say: Callable[[str], None],
) -> OnDevice | Mapped:
    """Build or load the packed cache at `path` and put it where it fits.

    Raises BadImage at a corrupt image, CacheUnusable if the cache folder cannot be written.
    """
    pack = open_pack(dataset, data, path, say, progress=clock.rank == 0)
    if pack.skipped:
        say(f"{len(pack.skipped):,} corrupt images skipped: " + "; ".join(pack.skipped[:5]))
    fits, why = _fits(packed_bytes(dataset), clock.device)
    kind = OnDevice if fits else Mapped
    pipeline = kind(dataset, pack, data, clock, seed, key, memory_format)
    pipeline.choice = f"resident: {packed_bytes(dataset) / 1e6:,.1f} MB packed, {why}"
    return pipeline


def _fits(size: int, device: torch.device) -> tuple[bool, str]:
    """Whether the images go wholly on the device, and why."""
    if device.type != "cuda":
        return True, "memory-mapped"
    free = torch.cuda.mem_get_info(device)[0]
    limit = f"{SHARE_OF_MEMORY:.0%} of the {free / 1e9:,.1f} GB free on {device}"
    if size <= SHARE_OF_MEMORY * free:
        return True, f"on the device (within {limit})"
    return False, f"memory-mapped on the host (more than {limit})"


def _shown_labels(dataset: Dataset, pack: Pack) -> np.ndarray | None:
    return None if dataset.labels is None else dataset.labels[pack.rows]
