"""Processes that decode: how they are started and end, and the torchvision pipeline's work in them.

Imports little, for each process pays for it at its start.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import parent_process, resource_tracker
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.images import BadImage
from pipelines.sources import Dataset

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


class Decoded(NamedTuple):
    """What a worker hands over; an error travels as a value, to be raised without its trace."""

    images_NHWC: Tensor
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
        pixels_NHWC = np.zeros((len(rows), *self.dataset.fit.stored), np.uint8)
        shown, skipped, error = np.array(rows, np.int64), {}, None
        try:
            for place, row in enumerate(rows):
                pixels_NHWC[place], shown[place] = self._decode(row, skipped)
        except (BadImage, OSError, ValueError) as caught:  # an impossible crop is a ValueError
            error = caught
        return Decoded(torch.from_numpy(pixels_NHWC), torch.from_numpy(shown), skipped, error)

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


def as_it_is(decoded: Decoded) -> Decoded:
    """The DataLoader is to collate nothing."""
    return decoded


def begin_worker(_worker: int) -> None:
    """In a worker: ignore the signals, which are the parent's affair, and leave when it is gone."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """torch watches the parent process id, which here is the fork server's: that one lives as long
    as a worker does, so both would outlive a killed parent for ever (seen with torch 2.15)."""
    parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
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
