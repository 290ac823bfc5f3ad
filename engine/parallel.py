"""How the ranks share a player's parameters, gradients and optimizer: nothing else knows which way.

`Alone` wraps nothing; `Replicated` is DDP; `Sharded` is FSDP2 (`engine/zero.py` has DeepSpeed).
All that an update does with its own network happens in one forward of `Root`, so that several
passes and penalties are one unit for the reducer and the sharder.
"""

import copy
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from engine.networks.planar import Planar
from engine.optimizer import Guarded
from engine.world import Ranks

NEVER = 2**31 - 1  # iterations


class Root(nn.Module):
    """forward(fn, *args) = fn(network, *args)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, fn: Callable, *args: Any) -> Any:
        return fn(self.network, *args)


class Piece(NamedTuple):
    """This rank's consecutive part of a tensor that is spread over the ranks in their order."""

    values: Tensor
    """(n,), a view of what is trained."""
    begin: int
    """Place of its first value in the whole, flattened."""
    shape: torch.Size
    """Of the whole."""

    def whole(self) -> Tensor:
        """The whole tensor; every rank calls it."""
        flat = self.values.new_zeros(self.shape.numel())
        flat[self.begin : self.begin + len(self.values)] = self.values
        dist.all_reduce(flat)
        return flat.view(self.shape)


State = dict[str, Tensor | Piece]
"""Tensors of a run by a path of names; a Piece where this rank has a part only."""


class Alone:
    """One rank: the network as it is."""

    spread = False  # this rank trains a part of the parameters
    sharded = False  # the network's parameters are spread over the ranks
    memory_format = torch.channels_last

    def __init__(self, network: nn.Module, ranks: Ranks) -> None:
        self.network, self.ranks = network, ranks
        self.root: Callable = Root(network)
        self.optimizer: Guarded

    def trained(self) -> list[Tensor]:
        """What the optimizer is to step."""
        return [p for p in self.network.parameters() if p.requires_grad]

    def engage(self, optimizer: Guarded, accumulate: int) -> None:
        """Take the optimizer, made for `trained()`."""
        self.optimizer = optimizer

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Round forward and backward; gradients are reduced over ranks with the last one."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient."""
        loss.backward()

    def step(self, scaler: torch.amp.GradScaler | None) -> None:
        """Step the optimizer and forget the gradients."""
        if scaler:
            self.optimizer.scaled = True
            scaler.unscale_(self.optimizer)
            scaler.step(self.optimizer)
            scaler.update()
        else:
            self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The network with all its parameters, to be called as it is; every rank enters."""
        yield self.network

    @contextmanager
    def rehearsal(self) -> Iterator[nn.Module]:
        """The root to call where nothing is to reach another rank."""
        yield self.root

    # -- state -------------------------------------------------------------------------------------

    def parameters(self) -> State:
        """The network's parameters by name."""
        return {name: p.detach() for name, p in self.network.named_parameters()}

    def moments(self) -> State:
        """The optimizer's state, NAME/exp_avg and so on; empty before the first step."""
        names = {id(p): name for name, p in self.network.named_parameters()}
        return {
            f"{names[id(p)]}/{key}": value
            for p, state in self.optimizer.state.items()
            for key, value in state.items()
        }

    def make_moments(self) -> None:
        """Make the optimizer's state as before a first step, for a checkpoint to be put into."""
        for p in self._stepped():
            self.optimizer.state[p] = self.optimizer.fresh(p)

    @torch.no_grad()
    def restart(self) -> None:
        """Bring the optimizer's state, where it has any, back to that before a first step."""
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    @torch.no_grad()
    def clamp(self, bound: float) -> None:
        """Clip every trained value to [-bound, bound]."""
        stepped = self._stepped()
        torch._foreach_clamp_min_(stepped, -bound)
        torch._foreach_clamp_max_(stepped, bound)

    def _stepped(self) -> list[Tensor]:
        """What the optimizer steps."""
        return self.optimizer.param_groups[0]["params"]

    def loaded(self) -> None:
        """Called after the values of `parameters()` were overwritten."""


class Replicated(Alone):
    """DDP: every rank has everything, gradients are averaged while the backward pass runs.

    Buffers are not broadcast between forwards: that breaks a second forward in one update.
    """

    def __init__(self, network: nn.Module, ranks: Ranks) -> None:
        super().__init__(network, ranks)
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        no_sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        bucket = float(os.environ.get("SADDLE_BUCKET_MB", 25))
        self.root = DistributedDataParallel(
            self.root, gradient_as_bucket_view=True, bucket_cap_mb=bucket, **{no_sync: False}
        )
        # it would time every hundredth iteration, which a captured one cannot be
        self.root._set_ddp_runtime_logging_sample_rate(NEVER)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        if last:
            yield
        else:
            with self.root.no_sync():
                yield

    @contextmanager
    def rehearsal(self) -> Iterator[nn.Module]:
        with self.root.no_sync():
            yield self.root


class Sharded(Alone):
    """FSDP2 on the whole of `Root` (parts of it fail under double backward): parameters, gradients
    and optimizer state are spread over the ranks, whole parameters are there while they are used.

    float32 with autocast, not FSDP2's mixed precision, which breaks BatchNorm. The optimizer steps
    this rank's rows as plain tensors, so that the guard and the moving average are those of one
    rank.
    """

    spread = sharded = True
    memory_format = torch.contiguous_format  # FSDP2 takes no other

    def __init__(self, network: nn.Module, ranks: Ranks) -> None:
        super().__init__(network, ranks)
        self.shell = copy.deepcopy(network).to("meta")
        mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        fully_shard(self.root, mesh=mesh, reshard_after_forward=False)
        self._sharded = dict(network.named_parameters())  # DTensors
        self._rows = {
            name: nn.Parameter(p.detach().to_local(), requires_grad=p.requires_grad)
            for name, p in self._sharded.items()
        }

    def trained(self) -> list[Tensor]:
        return [rows for rows in self._rows.values() if rows.requires_grad]

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self.root.set_requires_gradient_sync(last)
        yield

    def step(self, scaler: torch.amp.GradScaler | None) -> None:
        for name, rows in self._rows.items():
            gradient = self._sharded[name].grad
            rows.grad = None if gradient is None else gradient.to_local()
        super().step(scaler)

    def forget(self) -> None:
        super().forget()
        for p in self._sharded.values():
            p.grad = None

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        self.root.unshard()
        try:
            yield self.network
        finally:
            self.root.reshard()

    @contextmanager
    def rehearsal(self) -> Iterator[nn.Module]:
        with self.whole() as network:
            yield Root(network)

    def parameters(self) -> State:
        return {name: self._piece(name, rows.detach()) for name, rows in self._rows.items()}

    def moments(self) -> State:
        names = {id(rows): name for name, rows in self._rows.items()}
        return {
            f"{names[id(p)]}/{key}": value if key == "step" else self._piece(names[id(p)], value)
            for p, state in self.optimizer.state.items()
            for key, value in state.items()
        }

    def _piece(self, name: str, rows: Tensor) -> Piece:
        """Rows are split as torch.chunk does: all but the last ranks have as many."""
        shape = self._sharded[name].shape
        height, width = shape[0] if shape else 1, shape[1:].numel()
        first = min(self.ranks.rank * -(-height // self.ranks.world_size), height)
        return Piece(rows.view(-1), first * width, shape)


def share(parallel: str, network: nn.Module, ranks: Ranks, planar: bool = False) -> Alone:
    """A network as its ranks share it, by the setting's way; alone where there is one rank or
    nothing to train. planar: weights channel by channel, not channels last."""
    kind = Replicated
    if ranks.world_size == 1 or not any(p.requires_grad for p in network.parameters()):
        kind = Alone
    elif parallel == "fsdp2":
        kind = Sharded
    elif parallel.startswith("deepspeed"):
        from engine.zero import STAGES

        kind = STAGES[parallel]
    network = network.to(memory_format=torch.contiguous_format if planar else kind.memory_format)
    for part in network.modules():
        if isinstance(part, Planar):
            part.settle()
    return kind(network, ranks)
