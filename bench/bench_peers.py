"""What a training loop costs: a bare one, accelerate's, Lightning's and ours around one DCGAN.

    pytest bench/bench_peers.py --benchmark-only

Each loop is a process of its own (peers.py says what it does); they take turns in blocks of
iterations, the others waiting, and each block is compared with the bare loop's of the same round.

    ratio      time of an iteration over that of the bare loop,
    overhead   time of an iteration less that of the bare loop's computing: what loop, data, logs
               and an engine's own care add; below zero where its own computing is faster,
    outside    time spent outside the computing of its own, as a share.

Beside the time of the clock stands that of the processor, of all threads: with one thread on a CPU
it holds on a busy machine, too. All are medians of the rounds, ± the distance of their quartiles.
The narrow networks are there to show what a loop costs, the usual ones to show how little that is.
Ours puts real and fake images through the discriminator as one batch, which the others' code, as
usual, does not: `outside` is of the loop alone.
"""

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.peers import BATCHES, LOOPS, SIDES
from bench.side_by_side import Turns, note

ROOT = Path(__file__).parents[1]
BLOCKS = {"narrow": (50, 12), "usual": (10, 10)}
"""Iterations of a block, and rounds."""
PACKAGES = ("accelerate", "lightning")
Blocks = dict[str, list[dict[str, float]]]


def missing(name: str) -> bool:
    """Whether a loop's package is not here."""
    return name in PACKAGES and importlib.util.find_spec(name) is None


def versions(name: str) -> str:
    """A loop's name, with its package's version."""
    return f"{name} {version(name)}" if name in PACKAGES else name


class Worker:
    """A process that trains by one loop, block by block, when it is told to."""

    def __init__(self, name: str, size: str, folder: Path) -> None:
        block, rounds = BLOCKS[size]
        folder.mkdir()
        self.name, self.said = name, folder / "said"
        command = [sys.executable, "-m", "bench.peers", name, size, str(folder)]
        with open(self.said, "w") as said:
            self.process = subprocess.Popen(
                [*command, str(block), str(rounds + 1)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )

    def train(self) -> dict[str, float]:
        """What an iteration of the next block took."""
        with suppress(BrokenPipeError):  # what it said last is shown below
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"{self.name} ended: {self.said.read_text()[-3000:]}"
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def take_turns(size: str, folder: Path) -> Blocks:
    """Every loop's blocks, less the first, in rounds that begin with another loop each time."""
    with ExitStack() as stack:
        workers = []
        for name in LOOPS:
            if not missing(name):
                workers.append(stack.enter_context(Worker(name, size, folder / name)))
                workers[-1].train()
        found: Blocks = {worker.name: [] for worker in workers}
        for number in range(BLOCKS[size][1]):
            first = number % len(workers)
            for worker in workers[first:] + workers[:first]:
                found[worker.name].append(worker.train())
    return found


def figures(found: Blocks, name: str) -> dict[str, float]:
    """Of one loop: milliseconds of an iteration and what is made of them, by both clocks."""
    made = {}
    for unit, prefix in (("seconds", ""), ("cpu", "cpu_")):
        own, bare, computing = (
            np.array([block[part] for block in found[loop]])
            for loop, part in ((name, unit), ("bare", unit), ("bare", f"inside_{unit}"))
        )
        inside = np.array([block[f"inside_{unit}"] for block in found[name]])
        low, median, high = np.quantile(own, (0.25, 0.5, 0.75))
        made |= {
            f"{prefix}milliseconds": 1000 * median,
            f"{prefix}spread": (high - low) / median,
            f"{prefix}ratio_to_bare": np.median(own / bare),
            f"{prefix}overhead_ms": 1000 * np.median(own - computing),
            f"{prefix}share_outside": np.median(1 - inside / own),
        }
    return {key: float(value) for key, value in made.items()}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Every loop's blocks by size, each measured once."""
    known: dict[str, Blocks] = {}

    def of(size: str) -> Blocks:
        if size not in known:
            known[size] = take_turns(size, tmp_path_factory.mktemp(size))
        return known[size]

    return of


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("size", SIDES)
def bench_loop(benchmark, measured, row, size, name):
    if missing(name):
        pytest.skip(f"{name} is not installed: pip install 'saddle[test]'")
    f = figures(measured(size), name)
    known = {"batch": BATCHES[size], "resolution": SIDES[size], "loop": versions(name)}
    threads = os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())
    benchmark.extra_info |= known | f | {"threads": int(threads)}
    costs = {loop: [b["seconds"] for b in measured(size)[loop]] for loop in {"bare", name}}
    note(benchmark, Turns("bare", costs).beside(name, f["milliseconds"], "ms"))
    said = [
        f"{what:3} {f[f'{prefix}milliseconds']:7.2f} ms ±{f[f'{prefix}spread']:4.0%} "
        f"{f[f'{prefix}ratio_to_bare']:5.2f}x overhead {f[f'{prefix}overhead_ms']:6.2f} ms "
        f"outside {f[f'{prefix}share_outside']:5.1%}"
        for what, prefix in (("", ""), ("CPU", "cpu_"))
    ]
    row("   ".join([f"{size:6} {versions(name):17}", *said]))
    benchmark.pedantic(lambda: None, rounds=1)  # the figures are those above
