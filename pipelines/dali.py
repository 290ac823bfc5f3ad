"""The dali pipeline: each image decoded each time by NVIDIA DALI, with nvJPEG where there is a GPU.

Our order and our threads read the files, so that files, zip and tar members and LMDB values are all
alike, and DALI, which can neither skip an image nor go on after a bad one, gets none that the index
or the bytes themselves speak against.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import Clock
from pipelines.dali_graph import AHEAD, Broken, Graph, Source, decodable, missing, raw
from pipelines.feed import HostFed, Spec
from pipelines.images import BadImage
from pipelines.index import Index, open_index
from pipelines.pack import say_skipped
from pipelines.sources import EncodedSet

__all__ = ["Dali", "missing", "open_dali"]

READ_AHEAD = 2
"""Batches that are read, beside those in the graph."""
READERS = 8
"""Threads that read, at most."""


class Coming(NamedTuple):
    """A batch under way: its rows, int64 (share,), and their sources, read in parts."""

    rows: np.ndarray
    parts: list[Future]

    def read(self) -> bool:
        """Whether it can be had without waiting."""
        return all(part.done() for part in self.parts)

    def sources(self) -> list[Source | Exception]:
        """One of each row, or why there is none."""
        return list(chain.from_iterable(part.result() for part in self.parts))


class Reader:
    """Rows to what the graph is fed with; called from several threads."""

    def __init__(self, dataset: EncodedSet, index: Index) -> None:
        self.dataset, self.index = dataset, index

    def __call__(self, rows: np.ndarray) -> list[Source | Exception]:
        return [self._source(int(row)) for row in rows]

    def _source(self, row: int) -> Source | Exception:
        try:
            if self.index.plain_N[row]:
                content = self.dataset.encoded(row)
                width, height = self.index.sizes_N2[row].tolist()
                if decodable(content, (width, height), self.dataset.fit.channels):
                    name, box = self.dataset.describe(row), self.dataset.box(row)
                    return Source(content, self.dataset.fit.squares((width, height), name, box))
            return raw(self.dataset.decode(row))
        # a file that is gone and an impossible crop, beside a corrupt image
        except (BadImage, OSError, ValueError) as error:
            return error


class Dali(HostFed):
    """Batches read and decoded ahead. A break in the stream (another place, or an image that turns
    out bad) drops what is under way and begins anew at that place."""

    name = "dali"

    def __init__(self, spec: Spec, index: Index) -> None:
        super().__init__(spec)
        self.skipped = len(index.bad)
        self._threads = max(spec.data.workers, 1)
        self._read = Reader(spec.dataset, index)
        self._pool = ThreadPoolExecutor(min(self._threads, READERS), "saddle-dali")
        self._reading, self._decoding = deque[Coming](), deque[Coming]()
        self._graph: Graph | None = None
        self._next: int | None = None

    def fetch(self, clock: Clock) -> tuple[Tensor, Tensor]:
        if self._next != clock.images:
            self._drop()
        self._next, taken = None, None
        while taken is None:
            taken = self._take(clock.images)
        self._next = clock.images + clock.batch
        rows_N = torch.from_numpy(self._decoding.popleft().rows)
        try:
            self._advance(self._next)
        except Broken:  # what is wrong comes to light when that batch is asked for, and fed anew
            self._next = None
        return taken, rows_N

    def _take(self, images: int) -> Tensor | None:
        """This batch's images; None if some turned out bad, and others are to be shown."""
        try:
            self._advance(images)
            if not self._decoding:
                self._begin(self._reading[0].sources())
            return self._graph.take()
        except Broken as error:
            bad = self._undecodable(error)
        except BadImage as error:
            bad = self._unread(error)
        self._drop()
        self.spec.order.replace(bad)
        for cause in bad.values():
            self.spec.say(f"corrupt image skipped: {cause}")
        self.skipped += len(bad)
        return None

    def _advance(self, images: int) -> None:
        """Keep the readers and the graph busy from the batch at `images` on, without waiting; what
        could not be read is told when its turn comes."""
        while len(self._reading) < READ_AHEAD:
            under_way = len(self._reading) + len(self._decoding)
            self._reading.append(self._coming(images + under_way * self.spec.clock.batch))
        while len(self._decoding) < AHEAD and self._reading and self._reading[0].read():
            sources = self._reading[0].sources()
            if any(isinstance(source, Exception) for source in sources):
                return
            self._begin(sources)

    def _begin(self, sources: list[Source | Exception]) -> None:
        """Hand the batch that was read first to the graph; raises what its reading raised."""
        for source in sources:
            if isinstance(source, Exception):
                raise source
        if self._graph is None:
            fit, device = self.spec.dataset.fit, self.spec.clock.device
            self._graph = Graph(fit, self._share, self._threads, device)
        self._decoding.append(self._reading.popleft())
        self._graph.feed(sources)

    def _coming(self, images: int) -> Coming:
        first = images + self.spec.clock.rank * self._share
        rows = self.spec.order.rows(np.arange(first, first + self._share))
        parts = np.array_split(rows, min(self._threads, READERS))
        return Coming(rows, [self._pool.submit(self._read, part) for part in parts])

    def _unread(self, error: BadImage) -> dict[int, str]:
        """The rows of the first batch that could not be read; raises unless they may be skipped."""
        if self.spec.data.on_error == "stop":
            raise error
        coming = self._reading[0]
        pairs = zip(coming.rows.tolist(), coming.sources(), strict=True)
        return {row: str(cause) for row, cause in pairs if isinstance(cause, BadImage)}

    def _undecodable(self, failure: Broken) -> dict[int, str]:
        """The rows in the graph that we cannot decode either; raises unless they may be skipped.

        DALI does not say which, and fails for other reasons than corrupt images too.
        """
        dataset, bad = self.spec.dataset, {}
        rows = dict.fromkeys(row for coming in self._decoding for row in coming.rows.tolist())
        for row in rows:
            try:
                dataset.decode(row)
            except BadImage as error:
                bad[row] = str(error)
                if self.spec.data.on_error == "stop":
                    raise error from failure
        if not bad:
            row = self._refused(list(rows))
            what = "these images" if row is None else dataset.describe(row)
            raise BadImage(
                f"DALI cannot decode {what}, but --data.pipeline torchvision can; "
                f"DALI says: {failure}"
            ) from failure
        return bad

    def _refused(self, rows: list[int]) -> int | None:
        """The first row at which DALI fails; None if it does at none of them, alone."""
        graph = Graph(self.spec.dataset.fit, 1, 1, self.spec.clock.device)
        try:
            for row in rows:
                graph.feed(self._read(np.array([row])))
                graph.take()
        except Broken:
            return row
        finally:
            graph.close()
        return None

    def _drop(self) -> None:
        """Forget what is under way."""
        for part in chain.from_iterable(coming.parts for coming in self._reading):
            part.cancel()
        self._reading.clear()
        self._decoding.clear()
        if self._graph is not None:
            self._graph.close()
            self._graph = None

    def close(self) -> None:
        """Stop reading and decoding."""
        self._drop()
        self._pool.shutdown(cancel_futures=True)


def open_dali(spec: Spec) -> Dali:
    """Look at every file, once, and decode from there. Raises BadImage at a corrupt image."""
    assert isinstance(spec.dataset, EncodedSet), "pipelines.open has seen to it"
    index = open_index(spec.dataset, spec.data)
    say_skipped(index.bad, spec.say)
    spec.order.replace(index.bad)
    return Dali(spec, index)
