"""The wrapped forward of a player, and how its ranks share parameters and gradients.

A world of one rank wraps nothing.
"""

import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine.world import Ranks


class Root(nn.Module):
    """forward(fn, *args) = fn(network, *args): all that an update does with its own network happens
    in one forward of the wrapper, so several passes and penalties are one unit for the reducer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, fn: Callable, *args: Any) -> Any:
        return fn(self.network, *args)


def wrap(network: nn.Module, ranks: Ranks) -> Root | DistributedDataParallel:
    """The callable unit of a player: its Root, under DDP when there are several ranks.

    Buffers are not broadcast between forwards: that breaks a second forward in one update.
    """
    root = Root(network)
    if ranks.world_size == 1 or not any(p.requires_grad for p in network.parameters()):
        return root
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    no_sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    bucket = float(os.environ.get("SADDLE_BUCKET_MB", 25))
    return DistributedDataParallel(
        root, gradient_as_bucket_view=True, bucket_cap_mb=bucket, **{no_sync: False}
    )


def local_gradients(root: nn.Module, reduce: bool) -> AbstractContextManager:
    """Context round forward and backward of a micro-batch: ranks reduce only if `reduce`."""
    if reduce or not isinstance(root, DistributedDataParallel):
        return nullcontext()
    return root.no_sync()
