"""What the ranks of real runs tell each other, counted: torchrun ... -m tests.counted FOLDER RUN...

RUN is a recipe and flags in one word. Each is trained some iterations by the engine's own loop;
rank 0 prints, as JSON, what the iterations of one period of its step reduced: [kind, bytes] of
every collective in order.
"""

import json
import shlex
import sys

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from bench.scale_one import reducers
from engine import recipe, world
from engine.describe import cost
from engine.start import Training, begin
from engine.train import loop
from pipelines.datasets import find
from pipelines.missing import COMPUTED

FLAGS = "--data.batch 8 --compile off --device cpu --steps 9999999 --sync-bn off"
QUIET = "--log-every 99 --sample-every 99 --checkpoint-every 99 --metrics.every-kimg 0"
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")
COLLECTIVES += ("broadcast", "all_gather_object", "broadcast_object_list", "barrier")
FIRST = 2  # iteration that is counted first; DDP sorts its buckets anew after the first ones


class Enough(Exception):
    """The last counted iteration is over."""


class Ledger:
    """[kind, bytes] of every collective of the current iteration."""

    def __init__(self) -> None:
        self.entries: list[list] = []
        self.inside = False  # a hook: what it calls is counted already
        for name in COLLECTIVES:
            setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name, collective):
        def counted(*args, **kwargs):
            if not self.inside:
                tensor = args[1] if "gather" in name else args[0] if args else None
                self.entries.append([name, getattr(tensor, "nbytes", 0)])
            return collective(*args, **kwargs)

        return counted

    def watch(self, player) -> None:
        """Count the buckets of a player's DDP under the player's name."""

        def hook(state, bucket):
            self.entries.append([player.name, bucket.buffer().nbytes])
            self.inside = True
            future = allreduce_hook(state, bucket)
            self.inside = False
            return future

        (ddp,) = reducers([player])
        ddp.register_comm_hook(None, hook)


def counted(t: Training, ledger: Ledger) -> list[list]:
    """What the iterations of a period reduced, up to the beginning of the next."""
    step, algorithm, done = t.session.step, t.session.recipe.step, []
    period = algorithm.period()
    t.session.clock.seek(algorithm.settles() * t.session.clock.batch)
    first = FIRST if period == 1 else 2 * period  # each player's buckets are sorted by then
    for player in t.session.players.values():
        ledger.watch(player)

    def marked(batch):
        done.append(ledger.entries)
        ledger.entries = []
        if len(done) == first + period:
            raise Enough
        return step(batch)

    t.session.step = marked
    try:
        with t.exits:
            loop(t)
    except Enough:
        return [entry for entries in done[first:] for entry in entries]


def main(folder: str, *runs: str) -> None:
    """Count all runs and print them."""
    ledger, found = Ledger(), {}
    world.stop = lambda: None  # one process group for all runs: a second one does not come up
    for run in runs:
        name, *flags = shlex.split(run)
        computed = COMPUTED.get(recipe.load(name).data.name, "synthetic")
        quick = [*shlex.split(FLAGS), *shlex.split(QUIET), "--data.name", computed]
        flags = [*quick, "--runs", folder, *flags]
        command = recipe.parse(name, flags)
        device = world.choose_device("cpu")
        t = begin(command, name, find(command.recipe.data), device, cost(command.recipe))
        found[run] = counted(t, ledger)
    if world.environment()[0] == 0:
        sys.stdout.write(f"{json.dumps(found)}\n")
        sys.stdout.flush()
    world.leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
