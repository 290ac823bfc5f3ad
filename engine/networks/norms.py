"""When the running statistics of BatchNorm move."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch, as in training, but leaves its running statistics alone:
    for a second forward of the same inputs in one iteration."""
    kind = nn.modules.batchnorm._NormBase
    norms = [m for m in network.modules() if isinstance(m, kind) and m.track_running_stats]
    for m in norms:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in norms:
            m.track_running_stats = True
