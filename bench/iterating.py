"""Whole iterations of a session on one batch, as the training loop runs them."""

from dataclasses import dataclass, replace

import torch

from engine.iteration import SETTLED, WARM_UP, CudaGraph, Iteration, own_stream
from engine.session import Session
from engine.stats import Stats
from pipelines.batch import Batch, Clock


@dataclass(frozen=True)
class Fixed:
    """A pipeline that hands out one batch, at the clock's position."""

    held: Batch

    def ready(self, clock: Clock) -> None:
        """Nothing to do."""

    def batch(self, clock: Clock) -> Batch:
        """The batch."""
        return replace(self.held, position_N=clock.position_N())


def iterating(live: Session, batch: Batch, captured: bool = False) -> Iteration:
    """The session's iterations; captured: as CUDA graphs, which are recorded here. Such a session
    is built after `on_own_stream`."""
    graph = CudaGraph if captured else None
    iterate = Iteration(live, Fixed(batch), Stats(live.ranks), graph)
    if captured:
        for _ in range(SETTLED + (WARM_UP + 1) * live.recipe.step.period()):
            iterate()
    return iterate


def on_own_stream(device: torch.device, captured: bool) -> None:
    """What a run does before it builds the session whose iterations it will capture."""
    if captured:
        own_stream(device)
