"""What do samples of DCGAN-64 cost? A batch, and one image: plain PyTorch, ours, compiled, ONNX.

    pytest bench/bench_sampling.py --benchmark-only

The baseline is the eager generator as PyTorch makes it: float32, contiguous. `eager` is the run as
engine.sample opens it, `compiled` that under torch.compile, `onnx` the run's export by onnxruntime,
on the CPU alone. All make the same images. Latents are there before; compilation is excluded.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.side_by_side import Turns, note, take_turns, timed
from engine.compile import missing_toolchain
from engine.export import __main__ as export
from engine.exported import open_export
from engine.session import build_networks
from engine.stats import synchronize
from engine.trained import Trained, open_run

ROOT = Path(__file__).parents[1]
BATCH, ROUNDS = 64, 10
BLOCKS, CALLS = 8, 25  # of single images
TOLERANCE = 1e-2  # of images in [-1, 1]; a GPU convolves in TF32
VARIANTS = ("plain", "eager", "compiled", "onnx")
Sampler = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def run_dir(device, tmp_path_factory):
    """A run of one step: what its samples cost does not depend on how good they are."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--data.name", "synthetic", "--data.batch", "16", "--steps", "1", "--compile", "off"]
    flags += ["--runs", str(folder), "--run", "one", "--device", device.type]
    command = [sys.executable, "-m", "engine.train", "dcgan_celeba", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dcgan_celeba" / "one"


def plain_generator(trained: Trained) -> Sampler:
    """The same weights, as PyTorch lays them out."""
    network = build_networks(trained.recipe)["generator"]
    network.load_state_dict(trained.networks["generator"].state_dict())
    return network.to(trained.device, memory_format=torch.contiguous_format).eval()


@pytest.fixture(scope="module")
def samplers(run_dir, device) -> tuple[dict[str, Sampler], dict[str, str], Trained]:
    """Of each variant what makes images of latents, or why it is not there; and the run."""
    trained, absent = open_run(run_dir, device=device.type), {}
    made = {"plain": plain_generator(trained), "eager": trained.forward}
    if device.type == "cpu" and (reason := missing_toolchain()):
        absent["compiled"] = reason
    else:
        made["compiled"] = torch.compile(trained.forward, dynamic=False)
    missing = [name for name in export.FOR_ONNX if not find_spec(name)]
    if device.type != "cpu" or missing:
        absent["onnx"] = f"needs {', '.join(missing)}" if missing else "runs on the CPU alone"
    else:
        assert export.main([str(run_dir), "--formats", "onnx"]) == 0
        made["onnx"] = open_export(run_dir / "export" / "model.onnx").forward
    return made, absent, trained


def check_equal(made: dict[str, Sampler], z_NL: Tensor) -> None:
    """Every variant makes the images of the first."""
    wanted_NCHW = made["plain"](z_NL)
    for name, run in made.items():
        error = float((run(z_NL) - wanted_NCHW).abs().max())
        assert error < TOLERANCE, f"{name} differs by {error:.2g}"


@pytest.fixture(scope="module")
def batches(samplers, device) -> Turns:
    """Seconds of a batch."""
    made, _, trained = samplers
    z_NL = trained.latents(0, torch.arange(BATCH))
    with torch.no_grad():
        check_equal(made, z_NL)
        runs = {name: partial(run, z_NL) for name, run in made.items()}
        return take_turns("plain", runs, ROUNDS, partial(timed, device=device), 2)


@pytest.mark.parametrize("variant", VARIANTS)
def bench_batch(benchmark, samplers, batches, row, variant):
    if reason := samplers[1].get(variant):
        pytest.skip(reason)
    speed = BATCH / batches.median(variant)
    benchmark.extra_info["batch"] = BATCH
    note(benchmark, batches.beside(variant, speed, "images/s"))
    row(f"samples, batch {BATCH} {variant:9} {speed:9.1f} images/s  {batches.ratio(variant):5.2f}x")
    benchmark.pedantic(lambda: None, rounds=1)  # the figures are those above


def calls(run: Callable[[], Tensor], device: torch.device) -> list[float]:
    """Seconds of some calls, each to its end."""
    seconds = []
    for _ in range(CALLS):
        began = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds


@pytest.fixture(scope="module")
def singles(samplers, device) -> dict[int, Turns]:
    """Percentiles of the seconds of one image, in blocks of calls that take turns."""
    made, _, trained = samplers
    z_NL, blocks = trained.latents(0, torch.arange(1)), {name: [] for name in made}
    with torch.no_grad():
        check_equal(made, z_NL)
        for _ in range(1 + BLOCKS):
            for name, run in made.items():
                blocks[name].append(calls(partial(run, z_NL), device))
    return {
        percent: Turns(
            "plain",
            {n: [float(np.percentile(b, percent)) for b in bs[1:]] for n, bs in blocks.items()},
        )
        for percent in (50, 95)
    }


@pytest.mark.parametrize("variant", VARIANTS)
def bench_latency(benchmark, samplers, singles, row, variant):
    if reason := samplers[1].get(variant):
        pytest.skip(reason)
    figures = [
        replace(found, variant=f"{variant}, p{percent}")
        for percent, turns in singles.items()
        for found in [turns.beside(variant, 1e3 * turns.median(variant), "ms")]
    ]
    note(benchmark, *figures)
    row(
        "one sample "
        + "   ".join(f"{f.variant} {f.value:7.2f} ms {f.ratio:5.2f}x" for f in figures)
    )
    benchmark.pedantic(lambda: None, rounds=1)
