"""One batch of noise, again and again: what a run costs when its data costs nothing."""

from dataclasses import replace

import torch

from pipelines.batch import Batch, Clock
from pipelines.feed import Spec


class Synthetic:
    """The same finished images each time; labels and captions as the dataset's first rows have."""

    name = "synthetic"
    choice = "one batch of noise, for measuring speed"
    skipped = 0

    def __init__(self, spec: Spec) -> None:
        self.images, device = spec.dataset.images, spec.clock.device
        share = spec.clock.batch // spec.clock.world_size
        noise = torch.Generator().manual_seed(0)
        shape = (share, *spec.dataset.fit.stored)
        images_NHWC = torch.randint(0, 256, shape, dtype=torch.uint8, generator=noise)
        places_N = torch.arange(share, device=device)
        rows_N = places_N % len(spec.dataset)
        spec.finish.ready(spec.clock)
        position_N = spec.clock.position_N()
        self._batch = spec.finish(images_NHWC.to(device), places_N, rows_N, position_N)

    def ready(self, clock: Clock) -> None:
        """Nothing to do."""

    def batch(self, clock: Clock) -> Batch:
        """The noise, at the clock's position."""
        return replace(self._batch, position_N=clock.position_N())

    def close(self) -> None:
        """Nothing to let go of."""
