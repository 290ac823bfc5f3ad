"""How long from the command to the end of the first step? A plain script's, ours eager, compiled.

    pytest bench/bench_start.py --benchmark-only

DCGAN-64 on computed images, each start a process of its own, by the clock outside: until it says
that its first step is done. The baseline imports torch and takes one iteration of the PyTorch
tutorial; `cold` compiles with an empty cache (once, without --all), `warm` with the one that the
first cold start left; what Python and the file system keep of torch itself is warm for all.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.side_by_side import Turns, note
from engine.compile import missing_toolchain

ROOT = Path(__file__).parents[1]
BATCH, TURNS = 16, 3
VARIANTS = ("plain", "eager", "cold", "warm")


def seconds_to_first_step(command: list[str], **variables: str) -> float:
    """From the start of a process until it says so; it then goes on to its end."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | variables
    began, found = time.monotonic(), None
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found is None and "first step" in line:
            found = time.monotonic() - began
    assert process.wait() == 0 and found is not None, "".join(lines)
    return found


def start(variant: str, cache: Path, runs: Path) -> float:
    """One start."""
    if variant == "plain":
        return seconds_to_first_step(["bench.first_step", str(BATCH)])
    command = ["engine.train", "dcgan_celeba", "--data.name", "synthetic", "--steps", "1"]
    command += ["--data.batch", str(BATCH), "--runs", str(runs)]
    command += ["--compile", "off" if variant == "eager" else "required"]
    caches = {"TORCHINDUCTOR_CACHE_DIR": cache / "inductor", "TRITON_CACHE_DIR": cache / "triton"}
    return seconds_to_first_step(command, **{k: str(v) for k, v in caches.items()})


@pytest.fixture(scope="module")
def starts(device, whole, tmp_path_factory) -> dict[str, list[float]]:
    """Seconds of each way to start, in turns."""
    compiles = device.type == "cuda" or not missing_toolchain()
    seconds = {name: [] for name in (VARIANTS if compiles else VARIANTS[:2])}
    start("plain", Path(), Path())  # reads torch's files
    kept = tmp_path_factory.mktemp("kept")
    for turn in range(TURNS):
        runs = tmp_path_factory.mktemp("runs")
        for name, found in seconds.items():
            if turn and name == "cold" and not whole:
                continue
            empty = turn and name == "cold"
            found.append(start(name, runs / "empty" if empty else kept, runs / name))
    return seconds


@pytest.mark.parametrize("variant", VARIANTS)
def bench_first_step(benchmark, starts, row, variant):
    if variant not in starts:
        pytest.skip(missing_toolchain())
    costs = starts[variant]
    turns = Turns("plain", {"plain": starts["plain"][: len(costs)], variant: costs})
    seconds = turns.median(variant)
    benchmark.extra_info["batch"] = BATCH
    note(benchmark, turns.beside(variant, seconds, "s"))
    row(f"first step {variant:6} {seconds:6.1f} s  {turns.ratio(variant):.2f}x plain")
    benchmark.pedantic(lambda: None, rounds=1)  # the figures are those above
