"""What memory does a recipe need? Counted without data, on the meta device.

Activations are the slope of the peak of live tensor memory over the size of a micro-batch, so that
whatever does not grow with it (weights, their gradients) drops out. Every tensor counts, those
that wait for the backward pass and those that pass by: the hooks of saved tensors, which see the
first kind alone, are refused inside `torch.func.grad`, where penalties take theirs.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from engine.describe import example_batch, without_data
from engine.player import Player
from engine.settings import Recipe

SMALL, LARGE = 256, 512
"""Micro-batches whose peaks are compared: large enough that activations outweigh the weights'
temporaries, and free, since nothing is held."""


@dataclass(frozen=True)
class State:
    """Bytes of what a player keeps between iterations, on one device and unsharded."""

    parameters: int  # buffers (running statistics) included
    gradients: int
    optimizer: int
    average: int

    @property
    def stored(self) -> int:
        """What a checkpoint holds of it."""
        return self.parameters + self.optimizer + self.average

    @property
    def held(self) -> int:
        """What training holds of it."""
        return self.stored + self.gradients


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors made below it that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:  # a view, or written in place
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size


def activation_bytes(recipe: Recipe, classes: int = 0) -> float:
    """Bytes that one image of a micro-batch adds to the peak of an iteration: the largest over its
    updates, eager, without the workspaces of libraries.

    Counted in float32; under bf16 or fp16 half of that, which leaves out the little that autocast
    keeps in float32.
    """
    small, large = (_peak(recipe, classes, images) for images in (SMALL, LARGE))
    share = 0.5 if recipe.precision in ("bf16", "fp16") else 1.0
    return share * (large - small) / (LARGE - SMALL)


def state_bytes(recipe: Recipe, classes: int = 0) -> dict[str, State]:
    """What each player keeps, by its name, once its optimizer has made a step."""
    session = without_data(recipe, 1, classes)
    return {name: _state(player) for name, player in session.players.items()}


def _state(player: Player) -> State:
    trained = _bytes(player.parameters)
    moments = [m for p in player.parameters for m in player.optimizer.fresh(p).values()]
    average = player.average.network.state_dict().values() if player.average else ()
    return State(
        parameters=_bytes(player.network.state_dict().values()),
        gradients=trained,
        optimizer=_bytes(moments),
        average=_bytes(average),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _peak(recipe: Recipe, classes: int, images: int) -> int:
    """Largest sum of what one iteration holds at a time, of so many images a micro-batch."""
    session = without_data(recipe, images, classes)
    peak = 0
    with session.rehearsing():
        for iteration in recipe.step.kinds():
            session.clock.seek(iteration * session.clock.batch)
            with LiveBytes() as live:
                session.step(example_batch(session.recipe, session.clock.batch))
            peak = max(peak, live.peak)
    return peak


def free_memory() -> int:
    """Bytes of host memory that are free or can be freed, within what a container may take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable:"))
    return min([kib * 1024, *_cgroup_rooms()])


def _cgroup_rooms(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What each memory limit above this process leaves (version 2 of control groups)."""
    entry = Path("/proc/self/cgroup").read_text().splitlines()[-1].split(":")[-1].lstrip("/")
    rooms, folder = [], root / entry
    for place in (folder, *folder.parents):
        limit, used = place / "memory.max", place / "memory.current"
        if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
            rooms.append(int(limit.read_text()) - int(used.read_text()) + _file_cache(place))
    return rooms


def _file_cache(place: Path) -> int:
    """Bytes of a group's memory that are copies of files, given back on demand."""
    for line in (place / "memory.stat").read_text().splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0
