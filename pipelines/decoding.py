"""A whole dataset decoded into a file, by this process and as many others as are worth starting.

Processes, not threads: of an image's 0.25 ms so much is Python that two threads are slower than
one. They need some seconds to start, in which this process decodes, as it does afterwards.
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from multiprocessing import get_context, set_forkserver_preload
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipelines.images import BadImage
from pipelines.journal import put
from pipelines.sources import Dataset
from pipelines.workers import begin_worker, shielded

CHUNK = 64
"""Images decoded at a time."""
PATIENCE_S = 6.0
"""Seconds of work, alone, from which on other processes are started."""


class Decoding:
    """Writes chunks of rows to their places in a file whose images begin at `start`."""

    def __init__(self, dataset: Dataset, skip: bool, path: Path, start: int) -> None:
        self.dataset, self.skip, self.path, self.start = dataset, skip, path, start
        self._file: BinaryIO | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def __call__(self, rows: range) -> dict[str, Any]:
        """Decode and write; what the journal is to note: place, CRC, rows, and the bad ones.

        Raises BadImage unless bad images are skipped, ValueError for a crop, OSError of the disk.
        """
        pixels_NHWC = np.zeros((len(rows), *self.dataset.fit.stored), np.uint8)
        bad = {}
        for place, row in enumerate(rows):
            try:
                pixels_NHWC[place] = self.dataset.decode(row)
            except BadImage as error:
                if not self.skip:
                    raise
                bad[row] = str(error)
        if self._file is None:
            self._file = self.path.open("r+b", buffering=0)
        place = self.start + rows.start * math.prod(self.dataset.fit.stored)
        fact = put(self._file, place, pixels_NHWC.data)
        return fact | {"rows": [rows.start, rows.stop], "bad": bad}


def decode_all(work: Decoding, todo: np.ndarray, workers: int) -> Iterator[dict[str, Any]]:
    """Decode the rows `todo`, int64 and rising, by `workers` processes, this one among them; the
    facts of each chunk, in no order."""
    waiting, pending, starting = deque(chunks(todo)), set(), None
    starter = ThreadPoolExecutor(1)
    began, alone = time.perf_counter(), 0
    try:
        while waiting or pending:
            pool = starting.result() if starting and starting.done() else None
            done = {future for future in pending if future.done()}
            pending -= done
            yield from (future.result() for future in done)
            while pool and waiting and len(pending) < 2 * (workers - 1):
                pending.add(pool.submit(_in_worker, waiting.popleft()))
            if not waiting:
                wait(pending, return_when=FIRST_COMPLETED)
                continue
            yield work(waiting.popleft())
            alone += 1
            seconds = (time.perf_counter() - began) / alone * len(waiting)
            if starting is None and workers > 1 and seconds > PATIENCE_S:
                starting = starter.submit(_pool, work, workers - 1)
    finally:
        starter.shutdown()
        if starting:
            starting.result().shutdown(cancel_futures=True)


def chunks(todo: np.ndarray) -> list[range]:
    """Runs of at most CHUNK consecutive rows."""
    breaks = np.flatnonzero(np.diff(todo) != 1) + 1
    runs = [run for run in np.split(todo, breaks) if len(run)]
    return [
        range(int(run[i]), int(run[min(i + CHUNK, len(run)) - 1]) + 1)
        for run in runs
        for i in range(0, len(run), CHUNK)
    ]


def _pool(work: Decoding, processes: int) -> ProcessPoolExecutor:
    """Processes that are ready to work: takes seconds, so a thread waits for it."""
    set_forkserver_preload(["__main__", "torch", "torchvision"])
    pool = ProcessPoolExecutor(
        processes, get_context("forkserver"), initializer=_begin, initargs=(work,)
    )
    with shielded():
        pool.submit(_nothing).result()
    return pool


_work: Decoding | None = None


def _begin(work: Decoding) -> None:
    global _work
    begin_worker(0)
    _work = work


def _nothing() -> None:
    """The first task of all: done once a process is there."""


def _in_worker(rows: range) -> dict[str, Any]:
    return _work(rows)
