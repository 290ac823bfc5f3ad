"""A whole dataset decoded into a file, by this process and as many others as are worth starting.

Processes, not threads: of an image's 0.25 ms so much is Python that two threads are slower than
one. They need some seconds to start, in which this process decodes, as it does afterwards.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
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
AHEAD = 8
"""Chunks per process that may be done before the one whose turn it is."""
PATIENCE_S = 6.0
"""Seconds of work, alone, from which on other processes are started, judged by a tenth of
that."""
MANY = 20_000
"""Images from which on they are started at once: no machine decodes so many in less."""


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


def decode_all(work: Callable[[range], Any], todo: np.ndarray, workers: int) -> Iterator[Any]:
    """Decode the rows `todo`, int64 and rising, by `workers` processes, this one among them; what
    `work`, which is pickled, makes of each chunk, in order. Raises what it raises."""
    waiting, ahead, starting = deque(chunks(todo)), deque(), None
    starter = ThreadPoolExecutor(1)
    began, alone = 0.0, 0
    if workers > 1 and len(todo) >= MANY:
        starting = starter.submit(_pool, work, workers - 1)
    try:
        while waiting or ahead:
            while ahead and (ahead[0].done() or not waiting or len(ahead) > AHEAD * workers):
                yield ahead.popleft().result()
            pool = starting.result() if starting and starting.done() else None
            theirs = sum(not future.done() for future in ahead)
            while pool and waiting and theirs < 2 * (workers - 1):
                ahead.append(pool.submit(_in_worker, waiting.popleft()))
                theirs += 1
            if not waiting:
                continue
            ahead.append(Future())
            ahead[-1].set_result(work(waiting.popleft()))
            alone += 1
            began = time.perf_counter() if alone == 1 else began  # the first one waits for imports
            spent = time.perf_counter() - began
            long = min(10 * spent, spent / max(1, alone - 1) * len(waiting)) > PATIENCE_S
            if starting is None and workers > 1 and long:
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


def _pool(work: Callable[[range], Any], processes: int) -> ProcessPoolExecutor:
    """Processes that are ready to work: takes seconds, so a thread waits for it."""
    set_forkserver_preload(["__main__", "pipelines.images"])
    pool = ProcessPoolExecutor(
        processes, get_context("forkserver"), initializer=_begin, initargs=(work,)
    )
    with shielded():
        pool.submit(_nothing).result()
    return pool


_work: Callable[[range], Any] | None = None


def _begin(work: Callable[[range], Any]) -> None:
    global _work
    begin_worker(0)
    _work = work


def _nothing() -> None:
    """The first task of all: done once a process is there."""


def _in_worker(rows: range) -> Any:
    return _work(rows)
