"""Which row of the dataset is image number p of a run's endless stream? The one sampler.

A function of (seed, p) alone: ranks, pipelines and resumed runs agree without any stored state.
"""

from collections.abc import Iterable

import numpy as np

from pipelines.images import BadImage

KEPT_EPOCHS = 4


class Order:
    """Row of stream position p = permutation(seed, epoch p // n)[p % n].

    shown: int64 (n,), the row that is shown in a row's place: itself, or for a bad one the next
    that is not. domain: 0, or 1 for the second of two unpaired domains, whose order is another.
    """

    def __init__(self, n: int, seed: int, domain: int = 0) -> None:
        assert n > 0, "an empty dataset has no order"
        self.n, self._seed = n, ([domain] if domain else []) + [seed]
        self.shown, self._bad = np.arange(n), set()
        self._epochs: dict[int, np.ndarray] = {}

    def replace(self, bad: Iterable[int]) -> None:
        """From now on show the next good row in place of these. Raises BadImage if none is left."""
        self._bad |= set(bad)
        if len(self._bad) >= self.n:
            raise BadImage("every image of the dataset is corrupt")
        self.shown = shown(self.n, self._bad)
        self._epochs.clear()

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """The rows of one epoch, int64 (n,)."""
        return rng.permutation(self.n)

    def epoch(self, epoch: int) -> np.ndarray:
        """The rows that one epoch shows, in their order, int64 (n,)."""
        if epoch not in self._epochs:
            while len(self._epochs) >= KEPT_EPOCHS:
                self._epochs.pop(next(iter(self._epochs)))
            rows = self.draw(np.random.default_rng([*self._seed, epoch]))
            self._epochs[epoch] = self.shown[rows] if self._bad else rows
        return self._epochs[epoch]

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Rows of stream positions, int64 (any shape); positions may span many epochs."""
        epochs = positions // self.n
        rows = np.empty(positions.shape, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self.epoch(int(epoch))[positions[here] - epoch * self.n]
        return rows

    def window(self, position: int, count: int) -> tuple[int, np.ndarray]:
        """Whole epochs that cover [position, position + count): their start, and rows int64.

        The length depends on `count` only, so that a window can be refreshed in place.
        """
        epochs = 1 + -(-(count - 1) // self.n)
        first = position // self.n
        return first * self.n, np.concatenate([self.epoch(first + i) for i in range(epochs)])


class Balanced(Order):
    """Every class equally often: each run of K images has one of each of the K classes.

    The rows of a class come in random order, none again in an epoch before all the others of its
    class; a large class shows another random part of itself in each epoch.
    """

    def __init__(self, labels: np.ndarray, seed: int, domain: int = 0) -> None:
        super().__init__(len(labels), seed, domain)
        self._rows = [np.flatnonzero(labels == label) for label in np.unique(labels)]

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        blocks = -(-self.n // len(self._rows))
        order = rng.permuted(np.tile(np.arange(len(self._rows)), (blocks, 1)), axis=1)
        classes = order.flatten()[: self.n]
        drawn = np.empty(self.n, np.int64)
        for label, rows in enumerate(self._rows):
            places = np.flatnonzero(classes == label)
            rounds = -(-len(places) // len(rows))
            again = np.concatenate([rng.permutation(rows) for _ in range(rounds)])
            drawn[places] = again[: len(places)]
        return drawn


def shown(n: int, bad: set[int]) -> np.ndarray:
    """The row that each row shows, int64 (n,): itself, or for a bad one the next that is not."""
    rows = np.arange(n)
    for row in bad:
        while rows[row] in bad:
            rows[row] = (rows[row] + 1) % n
    return rows
