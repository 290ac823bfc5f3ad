"""The reference pipeline: every image decoded each time, by the workers of a torch DataLoader.

Workers ignore SIGINT and SIGTERM, which a terminal or a scheduler sends to the whole job, so that
the parent can finish its step and save. In return it is us who must see to their end: `close`, or
the finalizer when it is not called, or a watch on the parent when that is killed.
"""

from collections.abc import Iterator
from multiprocessing import (
    active_children,
    get_context,
    set_forkserver_preload,
)
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from pipelines.batch import Clock
from pipelines.feed import HostFed, Spec
from pipelines.index import open_index
from pipelines.order import Order
from pipelines.pack import say_skipped
from pipelines.sources import EncodedSet
from pipelines.workers import Decoder, as_it_is, begin_worker, shielded


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

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        dataset, data, clock = spec.dataset, spec.data, spec.clock
        known = open_index(dataset, data).bad if isinstance(dataset, EncodedSet) else {}
        say_skipped(known, spec.say)
        spec.order.replace(known)
        self._bad, self.skipped = set(known), len(known)
        self._slices = Slices(spec.order, clock)
        options = {}
        if data.workers:
            # fork is unsafe beside CUDA and threads; spawn imports torch in each worker (3.5 s for
            # two), a fork server that has it once (1.0 s, and 0.05 s for each loader after that)
            set_forkserver_preload(["__main__", "torch"])
            options = {
                "multiprocessing_context": get_context("forkserver"),
                "persistent_workers": True,
                "worker_init_fn": begin_worker,
            }
        self._loader = DataLoader(
            Decoder(dataset, data.on_error == "skip"),
            batch_sampler=self._slices,
            collate_fn=as_it_is,
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
        with shielded():
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
                self.spec.say(f"corrupt image skipped: {cause}")
        self.skipped = len(self._bad)
        return decoded.images_NHWC, decoded.rows_N

    def close(self) -> None:
        """Stop the workers: the iterator does when nothing refers to it; what is left is killed."""
        self._iterator = self._loader = None
        self._kill()


def _kill(workers: list[BaseProcess]) -> None:
    """The end of workers that nobody closed: torch's own way is SIGTERM, which they ignore, and
    without this a pipeline left in a reference cycle makes the interpreter hang at its exit."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()
