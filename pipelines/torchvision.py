"""The reference pipeline: every image decoded each time, by the workers of a torch DataLoader.

Workers ignore SIGINT and SIGTERM, which a terminal or a scheduler sends to the whole job, so that
the parent can finish its step and save. In return it is us who must see to their end: `close`, or
the finalizer when it is not called, or a watch on the parent when that is killed.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import (
    active_children,
    get_context,
    parent_process,
    resource_tracker,
    set_forkserver_preload,
)
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pipelines.batch import Clock
from pipelines.feed import HostFed
from pipelines.images import BadImage
from pipelines.order import Order
from pipelines.settings import Data
from pipelines.sources import Dataset

SIGNALS = {signal.SIGINT, signal.SIGTERM}


class Decoded(NamedTuple):
    """What a worker hands over; an error travels as a value, to be raised without its trace."""

    images_NCHW: Tensor
    rows_N: Tensor
    skipped: dict[int, str]
    error: Exception | None


class Decoder:
    """The DataLoader's dataset: a list of rows to one Decoded."""

    def __init__(self, dataset: Dataset, skip: bool) -> None:
        self.dataset, self.skip = dataset, skip

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, rows: list[int]) -> Decoded:
        pixels_NCHW = np.zeros((len(rows), *self.dataset.fit.shape), np.uint8)
        shown, skipped, error = np.array(rows, np.int64), {}, None
        try:
            for place, row in enumerate(rows):
                pixels_NCHW[place], shown[place] = self._decode(row, skipped)
        # an unreadable disk and an impossible crop, beside a corrupt image
        except (BadImage, OSError, ValueError) as caught:
            error = caught
        return Decoded(torch.from_numpy(pixels_NCHW), torch.from_numpy(shown), skipped, error)

    def _decode(self, row: int, skipped: dict[int, str]) -> tuple[np.ndarray, int]:
        """Pixels of a row, or of the next that decodes, as in the packed cache."""
        for step in range(len(self.dataset)):
            shown = (row + step) % len(self.dataset)
            try:
                return self.dataset.decode(shown), shown
            except BadImage as error:
                if not self.skip:
                    raise
                skipped[shown] = str(error)
        raise BadImage(f"every image of {self.dataset.name} is corrupt; one: {skipped[row]}")


class Slices:
    """The DataLoader's batch sampler: this rank's rows, batch after batch, without end."""

    def __init__(self, order: Order, clock: Clock) -> None:
        self.order, self.start, self.batch = order, clock.images, clock.batch
        share = clock.batch // clock.world_size
        self.slice_N = np.arange(share) + clock.rank * share

    def __iter__(self) -> Iterator[list[int]]:
        position = self.start
        while True:
            yield self.order.rows(position + self.slice_N).tolist()
            position += self.batch


class Torchvision(HostFed):
    """DataLoader workers with prefetch and pinned memory, in the order that all backends share."""

    name = "torchvision"

    def __init__(
        self,
        dataset: Dataset,
        data: Data,
        clock: Clock,
        seed: int,
        key: Tensor,
        memory_format: torch.memory_format,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(dataset, data, clock, key, memory_format)
        self._say, self._bad = say, set()
        self._slices = Slices(Order(len(dataset), seed), clock)
        options = {}
        if data.workers:
            # fork is unsafe beside CUDA and threads; spawn imports torch in each worker (3.5 s for
            # two), a fork server that has it once (1.0 s, and 0.05 s for each loader after that)
            set_forkserver_preload(["__main__", "torch"])
            options = {
                "multiprocessing_context": get_context("forkserver"),
                "persistent_workers": True,
                "worker_init_fn": _begin_worker,
            }
        self._loader = DataLoader(
            Decoder(dataset, data.on_error == "skip"),
            batch_sampler=self._slices,
            collate_fn=_as_it_is,
            num_workers=data.workers,
            pin_memory=clock.device.type == "cuda",
            **options,
        )
        before = set(active_children())
        self._restart(clock.images)
        workers = [worker for worker in active_children() if worker not in before]
        self._kill = Finalize(self, _kill, (workers,), exitpriority=10)

    def _restart(self, images: int) -> None:
        self._slices.start = self._next = images
        with _shielded():
            self._iterator = iter(self._loader)

    def fetch(self, clock: Clock) -> tuple[Tensor, Tensor]:
        if clock.images != self._next:
            self._restart(clock.images)
        decoded = next(self._iterator)
        self._next = clock.images + clock.batch
        if decoded.error is not None:
            raise decoded.error
        for row, cause in decoded.skipped.items():
            if row not in self._bad:
                self._bad.add(row)
                self._say(f"corrupt image skipped: {cause}")
        self.skipped = len(self._bad)
        return decoded.images_NCHW, decoded.rows_N

    def close(self) -> None:
        """Stop the workers: the iterator does when nothing refers to it; what is left is killed."""
        self._iterator = self._loader = None
        self._kill()


def _as_it_is(decoded: Decoded) -> Decoded:
    return decoded


def _begin_worker(_worker: int) -> None:
    """In a worker: ignore the signals, which are the parent's affair, and leave when it is gone."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """torch watches the parent process id, which here is the fork server's: that one lives as long
    as a worker does, so both would outlive a killed parent for ever (seen with torch 2.15)."""
    parent_process().join()
    os._exit(1)


def _kill(workers: list[BaseProcess]) -> None:
    """The end of workers that nobody closed: torch's own way is SIGTERM, which they ignore, and
    without this a pipeline left in a reference cycle makes the interpreter hang at its exit."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()


@contextlib.contextmanager
def _shielded() -> Iterator[None]:
    """Block the signals while processes start, for these inherit the mask.

    The fork server above all: its workers leave when it dies. The resource tracker goes first,
    because starting it unblocks the signals.
    """
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
