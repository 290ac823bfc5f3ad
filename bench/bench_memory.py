"""What does a rank hold, and at most, in each way of sharing? Measured against the sums of bytes.

P is the size of the parameters in float32, n the number of ranks, b a bucket of DeepSpeed's
(launch/zero*.json) in P. Held between iterations: DDP 4 P (parameters, gradients in its buckets,
two moments); FSDP2 3 P/n; ZeRO-1 and -2 P + 3 P/n (a copy of what is stepped beside the
parameters) and two buckets; ZeRO-3 5 P/n (this rank's gradients too) and two buckets. At most: DDP
no more; FSDP2 gathers the parameters and makes whole gradients before it spreads them, 2 P + 4 P/n;
ZeRO-1 makes whole gradients, 2 P + 4 P/n; ZeRO-2 lets them go bucket by bucket, but its step copies
this rank's, P + 5 P/n and two buckets; ZeRO-3 5 P/n, two buckets for gradients and two for the
parameters in use and those of the next layers.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from bench.brief import params
from bench.side_by_side import Beside, note

ROOT = Path(__file__).parents[1]
RANKS = max(2, torch.cuda.device_count())
BUCKET = (
    4
    * json.loads((ROOT / "launch" / "zero2.json").read_text())["zero_optimization"][
        "reduce_bucket_size"
    ]
)
HELD: dict[str, Callable[[int, float], float]] = {
    "ddp": lambda n, b: 4,
    "fsdp2": lambda n, b: 3 / n,
    "deepspeed-zero1": lambda n, b: 1 + 3 / n + 2 * b,
    "deepspeed-zero2": lambda n, b: 1 + 3 / n + 2 * b,
    "deepspeed-zero3": lambda n, b: 5 / n + 2 * b,
}
PEAK: dict[str, Callable[[int, float], float]] = {
    "ddp": lambda n, b: 4,
    "fsdp2": lambda n, b: 2 + 4 / n,
    "deepspeed-zero1": lambda n, b: 2 + 4 / n,
    "deepspeed-zero2": lambda n, b: 1 + 5 / n + 2 * b,
    "deepspeed-zero3": lambda n, b: 5 / n + 4 * b,
}


@cache
def measure(way: str) -> tuple[float, float, float]:
    """Held between iterations, and at most, in P, and P in bytes: the process's resident memory,
    less what it was before the network was there."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += [f"--nproc_per_node={RANKS}", "-m", "bench.memory_one", way]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # what is freed is given back
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("{"))
    found = json.loads(line)
    size = 4 * found["parameters"]
    return max(found["held"]) / size, max(found["peak"]) / size, size


@pytest.mark.parametrize("way", params(HELD, ["ddp", "fsdp2"]))
def bench_memory(benchmark, row, way):
    """Beside what DDP holds."""
    base, (held, peak, size) = measure("ddp"), measure(way)
    wanted = {"held": HELD[way](RANKS, BUCKET / size), "peak": PEAK[way](RANKS, BUCKET / size)}
    benchmark.extra_info |= {"ranks": RANKS, "held_p": held, "peak_p": peak, "predicted": wanted}
    both = zip(("held", "at most"), (held, peak), base[:2], strict=True)
    figures = [Beside("ddp", f"{way}, {kind}", "P", p, ddp / p, None) for kind, p, ddp in both]
    note(benchmark, *figures)
    row(
        f"{way:15}  held {held:4.2f} P, predicted {wanted['held']:4.2f}    at most {peak:4.2f} P, "
        f"predicted {wanted['peak']:4.2f}    (P = {size / 2**20:,.0f} MiB, {RANKS} ranks)"
    )
    benchmark.pedantic(lambda: None, rounds=1)
