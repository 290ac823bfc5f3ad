"""The compile boundary: which functions are compiled, decided once with its reason.

The unit is an update's loss function (forward and loss, one graph); backward and optimizer stay
outside. `rehearse` runs one iteration and undoes it, so that compilation happens before training,
on one local rank first: the others then take its cache.
"""

import math
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.world import Ranks
from pipelines.settings import cache_home

# Compiling a small network pair, and measuring what came out, costs up to a minute and a half of
# two CPU cores, and gains a twentieth in the mean (bench/bench_recipes.py).
WORTHWHILE_S = 1800.0
CPU_FLOPS = 5e10  # per core and second, small layers included: only an order of magnitude


class CompileError(RuntimeError):
    """`compile=required`, and something cannot be compiled."""


@dataclass
class Compiler:
    """Wraps loss functions; `active` and `reason` are said once and stored with the run."""

    active: bool
    reason: str
    required: bool = False
    units: dict[Callable, str] = field(default_factory=dict)  # every function that came through
    kept_eager: set[str] = field(default_factory=set)  # names of those that are faster so
    _compiled: dict[Callable, Callable] = field(default_factory=dict)

    def __call__(self, fn: Callable) -> Callable:
        """`fn` or its compiled form."""
        self.units.setdefault(fn, getattr(getattr(fn, "func", fn), "__name__", str(fn)))
        if not self.active or self.units[fn] in self.kept_eager:
            return fn
        if fn not in self._compiled:
            compiled = torch.compile(fn, fullgraph=True, dynamic=False)
            self._compiled[fn] = _unsplit(compiled) if _second_order(fn) else compiled
            # Dynamo wraps every partial in one and the same code, whose graphs it limits to 8.
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, 8 + len(self._compiled))
        return self._compiled[fn]

    def fall_back(self, reason: str) -> None:
        """Run eager from now on; raises CompileError where compilation is required."""
        if self.required:
            raise CompileError(f"compile=required, but {reason}")
        self.active, self.reason = False, reason


def second_order(fn: Callable) -> Callable:
    """Mark a loss function that holds a gradient of a network (decorator)."""
    fn.second_order = True
    return fn


def _second_order(fn: Callable) -> bool:
    return getattr(getattr(fn, "func", fn), "second_order", False)


def _unsplit(compiled: Callable) -> Callable:
    """One graph under DDP too: split into DDP's buckets, as Dynamo does to overlap communication,
    a function with torch.func.grad inside fails ("Cannot access storage of TensorWrapper")."""

    def call(*args: Any) -> Any:
        with torch._dynamo.config.patch(optimize_ddp=False):
            return compiled(*args)

    return call


def keep_compiled() -> Path:
    """The folder of compiled code: what TORCHINDUCTOR_CACHE_DIR says, or else one that outlives a
    restart of the machine, unlike PyTorch's own choice."""
    place = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(cache_home() / "compiled")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = place
    return Path(place)


def missing_toolchain() -> str:
    """What Inductor lacks to compile for a CPU here; empty if nothing."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        return "no C++ compiler (install g++)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "no Python headers (install python3-dev)"
    return ""


def choose_compile(setting: str, device: torch.device, flops: float, obstacle: str) -> Compiler:
    """The policy for a setting (auto, off, required).

    flops: those of the whole run on this rank. obstacle: why this recipe cannot be compiled, or
    empty. Raises CompileError if compilation is required and cannot be had.
    """
    if setting == "off":
        return Compiler(False, "as asked")
    keep_compiled()
    compiler = Compiler(True, "as asked", required=setting == "required")
    if device.type == "cpu":
        obstacle = obstacle or missing_toolchain()
    if obstacle:
        compiler.fall_back(obstacle)
        return compiler
    if setting == "auto":
        compiler.active, compiler.reason = _repays(device, flops)
    return compiler


def _repays(device: torch.device, flops: float) -> tuple[bool, str]:
    if device.type == "cuda":
        return True, "GPU"
    long = seconds(device, flops)
    said = f"a run of about {long / 60:.0f} min" if long >= 60 else f"a run of about {long:.0f} s"
    if long < WORTHWHILE_S:
        return False, f"{said} on this CPU is too short to repay compiling"
    return True, f"{said} on this CPU"


def seconds(device: torch.device, flops: float) -> float:
    """How long so many FLOPs take on a CPU, by order of magnitude; of a GPU nothing is known."""
    return flops / (CPU_FLOPS * torch.get_num_threads()) if device.type == "cpu" else math.inf


def rehearse(
    iteration: Callable[[], Any],
    compiler: Compiler,
    ranks: Ranks,
    say: Callable[[str], None],
    together: bool = False,
) -> None:
    """Compile by running `iteration` once, local rank 0 first.

    The iteration must leave no trace and tell no rank anything (`Session.rehearsing`). If it
    fails to compile on any rank, all run eager. together: all ranks at once, for an iteration that
    gathers parameters from all of them.
    """
    failure = ""
    for turn in (True, False):
        if (together and turn) or (not together and turn == (ranks.local_rank == 0)):
            failure = _attempt(iteration)
        ranks.barrier()
    if failures := [f for f in ranks.gather(failure) if f]:
        compiler.fall_back(f"compilation failed: {failures[0]}")
        say(f"compile: eager ({compiler.reason})")


def graphs() -> tuple[int, int]:
    """Graphs that this process compiled, and graphs that it took from the cache."""
    from torch._dynamo.utils import counters

    seen = counters["inductor"]
    return seen["fxgraph_cache_miss"], seen["fxgraph_cache_hit"]


def _attempt(iteration: Callable[[], Any]) -> str:
    from torch._dynamo.exc import TorchDynamoException

    try:
        iteration()
    except TorchDynamoException as error:
        return str(error).strip().split("\n", 1)[0][:300]
    return ""
