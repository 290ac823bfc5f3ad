"""Writes checkpoints while training goes on."""

from collections.abc import Callable
from pathlib import Path
from threading import Thread

from engine import checkpoint
from engine.checkpoint import Moment
from engine.stored import CheckpointError
from engine.world import Ranks


class Saver:
    """One checkpoint at a time, written by a thread of each rank.

    The threads talk in a process group of their own: in the training's, their words would come
    between its reductions in another order on each rank.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks.aside()
        self._thread: Thread | None = None
        self._problem: Exception | None = None

    def save(self, moment: Moment, folder: Path, then: Callable[[], None]) -> None:
        """Begin to write what was captured, after the one before it; every rank calls it.

        then: rank 0's work once it is there. Raises what `wait` does.
        """
        self.wait()
        self._thread = Thread(target=self._write, args=(moment, folder, then), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the checkpoint that was begun is written. Raises CheckpointError, on all ranks, if
        it could not be."""
        if self._thread:
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, None
        if problem:
            raise problem

    def close(self) -> None:
        """Let what was begun be finished; a failure was told already, or another one is."""
        if self._thread:
            self._thread.join()

    def _write(self, moment: Moment, folder: Path, then: Callable[[], None]) -> None:
        try:
            checkpoint.write(moment, folder, self._ranks)
            if self._ranks.rank == 0:
                then()
        except (CheckpointError, OSError, RuntimeError) as error:  # RuntimeError: a rank is gone
            self._problem = error
