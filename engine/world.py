"""Ranks: this process's place among them, the process group, and what ranks tell each other.

A world of one rank has no process group.
"""

import atexit
import datetime
import os
import sys
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from launch import environment as launcher

TIMEOUT = datetime.timedelta(minutes=30)  # must outlast the slowest rank's first compilation


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks, and its device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """Through which they talk; the default one if none is given."""

    def aside(self) -> "Ranks":
        """The same ranks, talking of host objects through a process group of their own."""
        if self.world_size == 1:
            return self
        return replace(self, device=torch.device("cpu"), group=dist.new_group(backend="gloo"))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks (host objects; synchronises)."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's value on every rank (host objects; synchronises)."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device, group=self.group)
        return box[0]

    def concatenated(self, values: Tensor) -> Tensor:
        """Every rank's device tensor, of one shape, along its first axis in the order of ranks."""
        if self.world_size == 1:
            return values
        whole = values.new_empty((self.world_size * len(values), *values.shape[1:]))
        dist.all_gather_into_tensor(whole, values.contiguous())
        return whole

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather(None)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks of a device tensor, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks of a device tensor, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values


def environment() -> tuple[int, int, int]:
    """(rank, local rank, world size) as the launcher set them."""
    return launcher.place()


def choose_device(setting: str) -> torch.device:
    """The device of a setting (auto, cpu, cuda); raises ValueError for a GPU that is not there."""
    if setting == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but PyTorch finds no GPU here; use --device cpu or auto")
    cpu = setting == "cpu" or (setting == "auto" and launcher.accelerate_wants_cpu())
    if cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", environment()[1] % torch.cuda.device_count())


def start(device: torch.device) -> Ranks:
    """Join the process group (gloo for control and CPUs, NCCL for GPUs) and give this place.

    Raises ValueError where it cannot be known where the others are.
    """
    launcher.set_meeting_place()
    rank, local_rank, world_size = environment()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    return Ranks(rank, local_rank, world_size, device)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End the process with this exit code.

    One of several ranks goes without the interpreter's finalization: there, about one time in 50 on
    a busy machine, threads of a process group that was left already abort it ("terminate called
    without an active exception", torch 2.15 with gloo).
    """
    if environment()[2] > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
