"""The resident pipeline: the packed images wholly on the device, or memory-mapped on the host."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import Batch, Clock
from pipelines.feed import HostFed, Spec
from pipelines.pack import Pack, open_pack, packed_bytes, say_skipped

SHARE_OF_MEMORY = 0.25
"""Part of the free device memory that images may take; the networks need the rest."""
WINDOW = 1 << 16
"""Stream positions, at least, that the order on the device covers before it is refreshed."""


class OnDevice:
    """Images and the order of the coming epochs are device tensors: a batch is a gather."""

    name = "resident"
    choice = ""

    def __init__(self, spec: Spec, pack: Pack) -> None:
        self.spec, self.images, self.skipped = spec, spec.dataset.images, len(pack.skipped)
        self._images_NHWC = torch.from_numpy(pack.images_NHWC).to(spec.clock.device)
        clock = spec.clock
        self._start, rows = spec.order.window(clock.images, max(WINDOW, clock.batch))
        self._rows = torch.from_numpy(rows).to(clock.device)
        self._device_start = torch.tensor(self._start, device=clock.device)

    def _covers(self, clock: Clock) -> bool:
        end = self._start + len(self._rows)
        return self._start <= clock.images and clock.images + clock.batch <= end

    def ready(self, clock: Clock) -> None:
        """Host part: refresh the order on the device, in place, once the clock leaves it."""
        self.spec.finish.ready(clock)
        if not self._covers(clock):
            window = self.spec.order.window(clock.images, max(WINDOW, clock.batch))
            self._start, rows = window
            self._rows.copy_(torch.from_numpy(rows))
            self._device_start.fill_(self._start)

    def batch(self, clock: Clock) -> Batch:
        """Device part: no synchronisation, no host copy."""
        assert self._covers(clock), "call ready(clock) before batch(clock)"
        position_N = clock.position_N()
        rows_N = self._rows.index_select(0, position_N - self._device_start)
        return self.spec.finish(self._images_NHWC, rows_N, rows_N, position_N)

    def close(self) -> None:
        """Let go of the images."""
        self._images_NHWC = None


class Mapped(HostFed):
    """Images memory-mapped on the host, each batch gathered there and copied over."""

    name = "resident"

    def __init__(self, spec: Spec, pack: Pack) -> None:
        super().__init__(spec)
        self.skipped = len(pack.skipped)
        self._packed_NHWC = torch.from_numpy(pack.images_NHWC)
        self._pin = spec.clock.device.type == "cuda"
        with pack.path.open("rb") as file:  # read ahead: random first touches are slow on a disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def fetch(self, clock: Clock) -> tuple[Tensor, Tensor]:
        first = clock.images + clock.rank * self._share
        rows = torch.from_numpy(self.spec.order.rows(np.arange(first, first + self._share)))
        shape = (self._share, *self._packed_NHWC.shape[1:])
        images_NHWC = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin)
        return torch.index_select(self._packed_NHWC, 0, rows, out=images_NHWC), rows

    def close(self) -> None:
        """Let go of the map."""
        self._packed_NHWC = None


def open_resident(spec: Spec, path: Path) -> OnDevice | Mapped:
    """Build or load the packed cache at `path` and put it where it fits.

    Raises BadImage at a corrupt image, CacheUnusable if the cache folder cannot be written.
    """
    dataset, device = spec.dataset, spec.clock.device
    pack = open_pack(dataset, spec.data, path, spec.say, progress=spec.clock.rank == 0)
    say_skipped(pack.skipped, spec.say)
    spec.order.replace(pack.skipped)
    on_device, why = fits(packed_bytes(dataset), device)
    pipeline = (OnDevice if on_device else Mapped)(spec, pack)
    pipeline.choice = f"{packed_bytes(dataset) / 1e6:,.1f} MB packed, {why}"
    return pipeline


def fits(size: int, device: torch.device) -> tuple[bool, str]:
    """Whether the images go wholly on the device, and why."""
    if device.type != "cuda":
        return True, "memory-mapped"
    free = torch.cuda.mem_get_info(device)[0]
    limit = f"{SHARE_OF_MEMORY:.0%} of the {free / 1e9:,.1f} GB free on {device}"
    if size <= SHARE_OF_MEMORY * free:
        return True, f"on the device (within {limit})"
    return False, f"memory-mapped on the host (more than {limit})"
