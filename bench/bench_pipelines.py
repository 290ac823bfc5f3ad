"""What feeding costs: every pipeline beside the PyTorch tutorial's ImageFolder and DataLoader.

    pytest bench/bench_pipelines.py --benchmark-only

64x64 faces at batch 64, mirrored, in [-1, 1], from JPEGs of CelebA's 178x218 pixels: its own where
SADDLE_DATA has them, brought to that size, else pictures made here. Each feeder is a process of its
own with one decoding thread; images per CPU-second count all threads and child processes, which
holds on a busy machine, too. Then a real training run fed by each pipeline, in turns with one whose
data costs nothing.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.brief import long, params, taken
from bench.side_by_side import Beside, Turns, interquartile, note
from engine import recipe, session, world
from engine.compile import Compiler, missing_toolchain
from engine.precision import choose_precision
from engine.stats import synchronize
from pipelines.datasets import find
from pipelines.open import open_pipeline
from pipelines.settings import Data

ROOT = Path(__file__).parents[1]
FEEDERS = ("tutorial", "torchvision", "dali", "ffcv-jpeg", "ffcv", "resident", "synthetic")
EPOCHS, MADE = {"ffcv": 20, "resident": 20, "synthetic": 20}, 2000
SIZE, CELEBA = (178, 218), 202_599
PASSES = 8  # of pure decoding, long enough for a machine that is not quiet
FED = ("resident", "ffcv", "torchvision", "dali")
BRIEF = ("tutorial", "torchvision", "resident")
TURNS, ROUNDS, ITERATIONS = 3, 8, 3


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    """An ImageFolder of JPEGs in one class."""
    folder = tmp_path_factory.mktemp("faces")
    (folder / "all").mkdir()
    real = Path(os.environ.get("SADDLE_DATA", ".")) / "celeba" / "img_align_celeba"
    if real.is_dir():
        for path in sorted(real.glob("*.jpg"))[:MADE]:
            with Image.open(path) as image:
                face = image.resize(SIZE, Image.Resampling.BICUBIC)
            face.save(folder / "all" / path.name, quality=75)
        return folder
    rng = np.random.default_rng(0)
    for i in range(MADE):
        coarse = Image.fromarray(rng.integers(0, 256, (14, 12, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC)).astype(int)
        noisy = (picture + rng.normal(0, 6, picture.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / "all" / f"{i:06}.jpg", quality=75)
    return folder


@pytest.fixture(scope="module")
def fed(faces, tmp_path_factory, whole) -> dict[str, list[dict]]:
    """What each feeder cost, some times, in turns."""
    found = {name: [] for name in taken(FEEDERS, BRIEF, whole)}
    for _ in range(TURNS):
        for name in found:
            cache = tmp_path_factory.mktemp(name)
            command = [sys.executable, "-m", "bench.feed_one", name]
            command += [str(faces), str(cache), str(EPOCHS.get(name, 3)), "1"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, done.stderr[-3000:]
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def rate(costs: list[dict], unit: str) -> tuple[float, float]:
    """Images per second (or CPU-second) in the first epoch, and in the later ones together: the
    medians of the turns."""
    rates = ([c[part]["images"] / c[part][unit] for c in costs] for part in ("first", "later"))
    first, later = map(statistics.median, rates)
    return first, later


@pytest.mark.parametrize("name", params(FEEDERS, BRIEF))
def bench_feeding(benchmark, fed, row, name):
    first, later = rate(fed[name], "cpu_seconds")
    cost = fed[name][-1]
    spent = {n: [c["later"] for c in costs] for n, costs in fed.items()}
    turns = Turns(
        "tutorial", {n: [c["cpu_seconds"] / c["images"] for c in each] for n, each in spent.items()}
    )
    facts = {
        "first_epoch_images_per_cpu_s": first,
        "images_per_cpu_s": later,
        "ratio_to_tutorial": turns.ratio(name),
        "images_per_s": rate(fed[name], "seconds")[1],
        "memory_mib": cost["later"]["memory"] / 2**20,
        "memory_growth_mib": (cost["later"]["memory"] - cost["first"]["memory"]) / 2**20,
        "disk_mib": cost["disk"] / 2**20,
    }
    benchmark.extra_info |= facts
    note(benchmark, turns.beside(name, later, "images/CPU-s"))
    row(
        f"{name:12} {first:9,.0f} then {later:9,.0f} images/CPU-s {facts['ratio_to_tutorial']:6.1f}"
        f" x tutorial {facts['memory_mib']:6,.0f} MiB {facts['disk_mib']:6,.1f} MiB on disk"
    )
    benchmark.pedantic(lambda: None, rounds=1)  # the figures are those above


def decode_all(data: Data, rows: list[int]) -> None:
    """Decode some rows, and nothing else."""
    dataset = find(data)
    for number in rows:
        dataset.decode(number)


@long
def bench_preparation(benchmark, faces, row, tmp_path):
    """Packing as many images as CelebA has, as a share of what all cores decode if they do nothing
    else; the start of the processes and the reading back at the end are in it."""
    cores = len(os.sched_getaffinity(0))
    many = tmp_path / "many" / "all"
    many.mkdir(parents=True)
    paths = sorted((faces / "all").iterdir())
    for i in range(CELEBA):
        (many / f"{i:06}.jpg").symlink_to(paths[i % len(paths)])
    data = Data(name="folder", path=faces, resolution=64)
    parts = [PASSES * list(range(i, len(paths), cores)) for i in range(cores)]
    command = [sys.executable, "-m", "pipelines.prepare", str(many), "--workers", str(cores)]
    command += ["--cache", str(tmp_path / "cache")]
    pure = []
    with ProcessPoolExecutor(cores) as pool:
        list(pool.map(decode_all, [data] * cores, [list(range(64))] * cores))  # start and warm up
        for after in (False, True):
            if after:
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            began = time.perf_counter()
            list(pool.map(decode_all, [data] * cores, parts))
            pure.append(PASSES * len(paths) / (time.perf_counter() - began))
    packing = next(x for x in done.stdout.splitlines() if x.startswith("packed "))
    packed = float(packing.rsplit("(", 1)[1].split()[0].replace(",", ""))
    share = packed / statistics.mean(pure)
    spread = interquartile([packed / speed for speed in pure])
    note(benchmark, Beside("pure decoding", "prepare", "images/s", packed, share, spread))
    benchmark.extra_info |= {"images_per_s": packed, "share_of_pure_decoding": share}
    row(f"preparation  {packed:9,.0f} images/s on {cores} cores, {share:.2f} of pure decoding")
    benchmark.pedantic(lambda: None, rounds=1)


def train(live, pipeline, iterations: int) -> None:
    """Some iterations of the loop."""
    for _ in range(iterations):
        pipeline.ready(live.clock)
        live.step(pipeline.batch(live.clock))
        live.clock.advance()


@pytest.fixture(scope="module")
def trained(faces, device, tmp_path_factory, whole):
    """Seconds of an iteration of dcgan_celeba under each pipeline, in rounds that take turns."""
    given = recipe.load("dcgan_celeba")
    cache = tmp_path_factory.mktemp("trained")
    data = replace(given.data, name="folder", path=faces, cache=cache, batch=64, flip=True)
    given = replace(given, data=data)
    compiler = Compiler(device.type == "cuda" or not missing_toolchain(), "bench")
    ranks = world.Ranks(0, 0, 1, device)
    live = session.start(given, ranks, choose_precision("auto", device), compiler, 10**6)
    dataset = find(data)
    feeds = {}
    for name in ("synthetic", *taken(FED, ["resident"], whole)):
        one = replace(data, pipeline=name)
        feeds[name] = open_pipeline(dataset, one, live.clock, 0, live.key, lambda _: None)
    seconds = {name: [] for name in feeds}
    for turn in range(ROUNDS + 1):
        for name, pipeline in feeds.items():
            # the jump of the clock begins a stream anew: its queues fill in the first iteration
            train(live, pipeline, 1)
            synchronize(device)
            began = time.perf_counter()
            train(live, pipeline, ITERATIONS)
            synchronize(device)
            if turn:
                seconds[name].append((time.perf_counter() - began) / ITERATIONS)
    for pipeline in feeds.values():
        pipeline.close()
    return seconds


@pytest.mark.parametrize("name", params(FED, ["resident"]))
def bench_training(benchmark, trained, row, name):
    turns = Turns("synthetic", trained)
    share, speed = turns.ratio(name), 64 / turns.median(name)
    benchmark.extra_info |= {"images_per_s": speed, "share_of_synthetic": share}
    note(benchmark, turns.beside(name, speed, "images/s"))
    row(f"dcgan_celeba fed by {name:12} {speed:8.1f} images/s, {share:.3f} of synthetic data")
    benchmark.pedantic(lambda: None, rounds=1)
