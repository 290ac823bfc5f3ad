"""When that moves which norms remember from forward to forward."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """Norms work as in training, but leave alone what they remember (BatchNorm its running
    statistics, spectral normalisation its singular vector): for a second forward of the same inputs
    in one iteration."""
    norms = [m for m in network.modules() if getattr(m, "track_running_stats", False)]
    for m in norms:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in norms:
            m.track_running_stats = True
