"""Which row of the dataset is image number p of a run's endless stream? The one sampler.

A function of (seed, p) alone: ranks, backends and resumed runs agree without any stored state.
"""

import numpy as np

KEPT_EPOCHS = 4


class Order:
    """Row of stream position p = permutation(seed, epoch p // n)[p % n]."""

    def __init__(self, n: int, seed: int) -> None:
        assert n > 0, "an empty dataset has no order"
        self.n, self.seed = n, seed
        self._epochs: dict[int, np.ndarray] = {}

    def epoch(self, epoch: int) -> np.ndarray:
        """The rows of one epoch in their order, int64 (n,)."""
        if epoch not in self._epochs:
            while len(self._epochs) >= KEPT_EPOCHS:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.n)
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
