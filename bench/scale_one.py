"""One rank of a measurement of scaling: torchrun ... -m bench.scale_one RECIPE BATCH ROUNDS

Trains RECIPE with BATCH images on each rank, on computed images from the packed cache, and prints
seconds as JSON on rank 0. Iterations start together, at a barrier. They take turns with ones in
which the ranks reduce no gradients (DDP's no_sync): the difference is communication. Among several
ranks an all-reduce of some sizes is timed, too.
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from engine import recipe, session, world
from engine.compile import Compiler
from engine.player import Player
from engine.precision import choose_precision
from engine.stats import synchronize
from pipelines.datasets import find
from pipelines.open import open_pipeline

ITERATIONS, WARM_UP = 3, 3
SIZES = [4, 2**16, 2**20, 2**22, 2**24]
REDUCTIONS = 15


def reducers(players: Iterable[Player]) -> list[DistributedDataParallel]:
    """Every DDP of some players, wherever they keep it."""
    found = []
    for player in players:
        parts = [*vars(player).values()]
        parts += [v for part in parts for v in getattr(part, "__dict__", {}).values()]
        found += [part for part in parts if isinstance(part, DistributedDataParallel)]
    return found


@contextmanager
def unreduced(live: session.Session) -> Iterator[None]:
    """No gradient is reduced inside."""
    with ExitStack() as stack:
        for ddp in reducers(live.players.values()):
            stack.enter_context(ddp.no_sync())
        yield


def meet(ranks: world.Ranks) -> None:
    """Start together."""
    if ranks.world_size > 1:
        dist.barrier()


def iterate(live: session.Session, pipeline, times: int) -> list[tuple[float, float]]:
    """(seconds waited for the batch, seconds of all) of each of some iterations."""
    seconds = []
    for _ in range(times):
        synchronize(live.clock.device)
        meet(live.ranks)
        began = time.perf_counter()
        pipeline.ready(live.clock)
        batch = pipeline.batch(live.clock)
        waited = time.perf_counter() - began
        live.step(batch)
        live.clock.advance()
        synchronize(live.clock.device)
        seconds.append((waited, time.perf_counter() - began))
    return seconds


def reductions(ranks: world.Ranks) -> dict[int, float]:
    """Median seconds of an all-reduce by its bytes; the slowest rank counts."""
    found = {}
    for size in SIZES if ranks.world_size > 1 else ():
        values = torch.zeros(size // 4, device=ranks.device)
        seconds = []
        for _ in range(REDUCTIONS):
            synchronize(ranks.device)
            meet(ranks)
            began = time.perf_counter()
            dist.all_reduce(values)
            synchronize(ranks.device)
            seconds.append(time.perf_counter() - began)
        slowest = [max(turn) for turn in zip(*ranks.gather(seconds), strict=True)]
        found[size] = sorted(slowest)[REDUCTIONS // 2]
    return found


def main(name: str, batch: str, rounds: str) -> None:
    """Measure and print."""
    device = world.choose_device("auto")
    ranks = world.start(device)
    given = recipe.load(name)
    data = replace(given.data, name="synthetic", batch=int(batch) * ranks.world_size)
    given = replace(given, data=data)
    compiler = Compiler(device.type == "cuda", "bench")
    live = session.start(given, ranks, choose_precision("auto", device), compiler, 10**6)
    pipeline = open_pipeline(find(data), data, live.clock, 0, live.key, lambda _: None)
    iterate(live, pipeline, WARM_UP)
    reduced, alone = [], []
    for _ in range(int(rounds)):
        reduced += iterate(live, pipeline, ITERATIONS)
        with unreduced(live):
            alone += iterate(live, pipeline, ITERATIONS)
    found = {"reduced": ranks.gather(reduced), "alone": ranks.gather(alone)}
    found["reductions"] = reductions(ranks)
    pipeline.close()
    if ranks.rank == 0:
        print(json.dumps(found), flush=True)
    world.stop()
    world.leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
