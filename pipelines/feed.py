"""How images that lie on the host reach the device: buffers of fixed address, filled by `ready`."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import Batch, Clock
from pipelines.finish import finish
from pipelines.settings import Data
from pipelines.sources import Dataset


class HostFed(ABC):
    """A pipeline whose `ready` copies one rank's slice into place; `batch` only reads it there."""

    name: str
    choice = ""
    skipped = 0

    def __init__(
        self,
        dataset: Dataset,
        data: Data,
        clock: Clock,
        key: Tensor,
        memory_format: torch.memory_format,
    ) -> None:
        self.images = len(dataset)
        self._share = clock.batch // clock.world_size
        self._finish = (key, data.flip, memory_format)
        device, shape = clock.device, (self._share, *dataset.fit.shape)
        self._images_NCHW = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._rows_N = torch.zeros(self._share, dtype=torch.int64, device=device)
        self._labels = labels_on(dataset.labels, device)
        self._held: int | None = None

    @abstractmethod
    def fetch(self, clock: Clock) -> tuple[Tensor, Tensor]:
        """uint8 (share, C, H, W) and the rows they show, int64 (share,), both on the host."""

    def ready(self, clock: Clock) -> None:
        """Host part: have the clock's batch in the device buffers."""
        if self._held != clock.images:
            images_NCHW, rows_N = self.fetch(clock)
            # pinned sources may go at once: the host allocator keeps a block until its copy is done
            self._images_NCHW.copy_(images_NCHW, non_blocking=True)
            self._rows_N.copy_(rows_N, non_blocking=True)
            self._held = clock.images

    def batch(self, clock: Clock) -> Batch:
        """Device part: no synchronisation, no host copy."""
        assert self._held == clock.images, "call ready(clock) before batch(clock)"
        position_N = clock.position_N()
        images_NCHW = finish(self._images_NCHW, position_N, *self._finish)
        labels = None if self._labels is None else self._labels.index_select(0, self._rows_N)
        return Batch(images_NCHW, labels, position_N)

    @abstractmethod
    def close(self) -> None:
        """Let go of what `fetch` reads from."""


def labels_on(labels: np.ndarray | None, device: torch.device) -> Tensor | None:
    """All labels of a dataset on the device, int64 (n,): 1.6 MB for CelebA."""
    return None if labels is None else torch.from_numpy(labels).to(device)
