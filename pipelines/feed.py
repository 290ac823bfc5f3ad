"""How images that lie on the host reach the device: buffers of fixed address, filled by `ready`."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.batch import Batch, Clock
from pipelines.finish import Finish
from pipelines.order import Order
from pipelines.settings import Data
from pipelines.sources import Dataset


@dataclass(frozen=True)
class Spec:
    """What every pipeline is opened with; `clock` says the rank, the device and where to begin."""

    dataset: Dataset
    data: Data
    clock: Clock
    order: Order
    finish: Finish
    say: Callable[[str], None]


class Staging:
    """Two buffers on the GPU that a side stream fills in turn, so that a copy runs beside the step
    before it; what the step reads is then filled from one of them, on the device."""

    def __init__(self, images_NHWC: Tensor) -> None:
        self._stream = torch.cuda.Stream(images_NHWC.device)
        self._buffers = [torch.empty_like(images_NHWC) for _ in range(2)]
        self._taken = [torch.cuda.Event() for _ in range(2)]
        self._turn = 0

    def copy(self, source_NHWC: Tensor, target_NHWC: Tensor) -> None:
        """Have `target` filled from pinned memory; nothing waits but the main stream."""
        main = torch.cuda.current_stream(target_NHWC.device)
        buffer, taken = self._buffers[self._turn], self._taken[self._turn]
        self._turn = 1 - self._turn
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(taken)
            # the host allocator keeps a pinned block until the copy on this stream is done
            buffer.copy_(source_NHWC, non_blocking=True)
        main.wait_stream(self._stream)
        target_NHWC.copy_(buffer)
        taken.record(main)


class HostFed(ABC):
    """A pipeline whose `ready` copies one rank's slice into place; `batch` only reads it there.

    skipped: corrupt images met so far.
    """

    name: str
    choice = ""
    skipped = 0

    def __init__(self, spec: Spec) -> None:
        self.spec, self.images = spec, spec.dataset.images
        clock, device = spec.clock, spec.clock.device
        self._share = clock.batch // clock.world_size
        shape = (self._share, *spec.dataset.fit.stored)
        self._images_NHWC = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._rows_N = torch.zeros(self._share, dtype=torch.int64, device=device)
        self._places_N = torch.arange(self._share, device=device)
        self._staging = Staging(self._images_NHWC) if device.type == "cuda" else None
        self._held: int | None = None

    @abstractmethod
    def fetch(self, clock: Clock) -> tuple[Tensor, Tensor]:
        """uint8 (share, *fit.stored) and the rows they show, int64 (share,), on the host or the
        device; for any place of the stream, usually the next. Raises BadImage or OSError."""

    def ready(self, clock: Clock) -> None:
        """Host part: have the clock's batch in the device buffers."""
        self.spec.finish.ready(clock)
        if self._held == clock.images:
            return
        images_NHWC, rows_N = self.fetch(clock)
        if self._staging and images_NHWC.device.type == "cpu":
            self._staging.copy(images_NHWC, self._images_NHWC)
        elif self._images_NHWC.device.type == "cpu":
            self._images_NHWC = images_NHWC  # no graph is captured on a CPU: no copy is needed
        else:
            self._images_NHWC.copy_(images_NHWC, non_blocking=True)
        self._rows_N.copy_(rows_N, non_blocking=True)
        self._held = clock.images

    def batch(self, clock: Clock) -> Batch:
        """Device part: no synchronisation, no host copy."""
        assert self._held == clock.images, "call ready(clock) before batch(clock)"
        position_N = clock.position_N()
        return self.spec.finish(self._images_NHWC, self._places_N, self._rows_N, position_N)

    @abstractmethod
    def close(self) -> None:
        """Let go of what `fetch` reads from."""
