"""What more processes cost: where the time of an iteration goes, and weak scaling.

    pytest bench/bench_scaling.py --benchmark-only

Real torchrun processes, as many as there are GPUs; two on a CPU, one thread each as the one that
they are compared with. Every rank has the same batch. Of the iteration with reductions,

    data       is what a rank waited for its batch,
    idle       what it would wait for the slowest without any reduction: iterations without them
               start at one barrier, and arrivals at their end are compared,
    exposed    communication: what the iteration takes longer than one without reductions, in turns,
    compute    the rest.

launch/scaling.py's prediction stands beside it: from the time of one process and the time of an
all-reduce alone.
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.brief import params, taken
from bench.side_by_side import Turns, note
from engine import recipe
from engine.sharing import choose_sync_bn
from launch.links import H100, local
from launch.scaling import communication
from launch.volume import trace

ROOT = Path(__file__).parents[1]
BATCHES = {"dcgan_celeba": 16, "vae_mnist": 100}  # images on each rank
BRIEF = ["dcgan_celeba"]
TURNS, ROUNDS = 3, 4
BUCKET = 25 * 2**20


def worlds() -> list[int]:
    """Numbers of processes to measure."""
    gpus = torch.cuda.device_count()
    return [1, *(n for n in (2, 4, 8) if n <= max(gpus, 1 if gpus else 2))]


def measure(name: str, ranks: int, cache: Path) -> dict:
    """What one start of so many processes measured."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *launch, "-m", "bench.scale_one", name, str(BATCHES[name])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SADDLE_CACHE": str(cache)}
    done = subprocess.run(
        [*command, str(ROUNDS)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def measured(tmp_path_factory, whole) -> dict[str, dict[int, list[dict]]]:
    """Every recipe's measurements by the number of processes, in turns."""
    cache = tmp_path_factory.mktemp("cache")
    found = {name: {n: [] for n in worlds()} for name in taken(BATCHES, BRIEF, whole)}
    for _ in range(TURNS):
        for name, by_ranks in found.items():
            for ranks, turns in by_ranks.items():
                turns.append(measure(name, ranks, cache))
    return found


def split(turn: dict) -> dict[str, float]:
    """Seconds of the median iteration, and where they go; means over ranks."""
    reduced, alone = np.array(turn["reduced"]), np.array(turn["alone"])  # (ranks, iterations, 2)
    total = np.median(reduced[:, :, 1].max(0))
    slowest = alone[:, :, 1].max(0)
    data = np.median(reduced[:, :, 0])
    idle = np.median((slowest - alone[:, :, 1]).mean(0))
    # in a world of one both kinds of iteration are the same, and differ by noise
    exposed = total - np.median(slowest) if len(reduced) > 1 else 0.0
    parts = {"data": data, "idle": idle, "exposed": exposed}
    parts["compute"] = total - sum(parts.values())
    return {"total": float(total)} | {name: float(s) for name, s in parts.items()}


def median(turns: list[dict[str, float]]) -> dict[str, float]:
    """The turn whose total is the median one."""
    return sorted(turns, key=lambda t: t["total"])[len(turns) // 2]


def link(turns: list[dict]) -> tuple[float, float]:
    """(bytes per second, seconds) so that seconds + bytes / bytes per second fits the all-reduces
    of all turns best, relative errors counting alike."""
    sizes = [int(size) for size in turns[0]["reductions"]]
    seconds = [statistics.median(t["reductions"][str(size)] for t in turns) for size in sizes]
    slope, latency = np.polyfit(sizes, seconds, 1, w=1 / np.array(seconds))
    return 1 / slope, max(latency, 0.0)


def predicted(name: str, ranks: int, alone_s: float, turns: list[dict]) -> tuple[float, dict]:
    """Seconds of an iteration by the model, and the link it was given: on a CPU the measured one,
    among GPUs that of the H100."""
    given = recipe.load(name)
    given = replace(given, data=replace(given.data, batch=ranks * BATCHES[name]))
    work = trace(name, given, choose_sync_bn(given, ranks)[0])
    if torch.cuda.is_available():
        return alone_s + communication(work, H100, ranks, alone_s, BUCKET)[1], {}
    bandwidth, latency = link(turns)
    exposed = communication(work, local(bandwidth, latency, ranks), ranks, alone_s, BUCKET)[1]
    return alone_s + exposed, {"link_bytes_per_s": bandwidth, "link_latency_s": latency}


@pytest.mark.parametrize("ranks", worlds())
@pytest.mark.parametrize("name", params(BATCHES, BRIEF))
def bench_scaling(benchmark, measured, row, name, ranks):
    alone = median([split(t) for t in measured[name][1]])
    turns = measured[name][ranks]
    found = median([split(t) for t in turns])
    facts = {f"{part}_s": seconds for part, seconds in found.items()}
    facts |= {"ranks": ranks, "batch_each": BATCHES[name]}
    facts["images_per_s"] = ranks * BATCHES[name] / found["total"]
    facts["weak_efficiency"] = alone["total"] / found["total"]
    shares = {p: found[p] / found["total"] for p in ("compute", "exposed", "data", "idle")}
    line = " ".join(f"{part} {share:5.1%}" for part, share in shares.items())
    line = f"{name:13} x{ranks} {1e3 * found['total']:8.2f} ms  {line}"
    if ranks > 1:
        seconds, given = predicted(name, ranks, alone["total"], turns)
        ratio = seconds / found["total"]
        facts |= given | {"predicted_s": seconds, "predicted_to_measured": ratio}
        line += f"  weak efficiency {facts['weak_efficiency']:.2f}  predicted {ratio:.2f} x"
    benchmark.extra_info |= facts
    totals = {n: [split(t)["total"] for t in each] for n, each in measured[name].items()}
    beside = Turns("1 process", {f"{n} process{'es' * (n > 1)}": s for n, s in totals.items()})
    variant = f"{ranks} process{'es' * (ranks > 1)}"
    note(benchmark, beside.beside(variant, facts["images_per_s"], "images/s"))
    row(line)
    benchmark.pedantic(lambda: None, rounds=1)  # the figures are those above
