"""Feeds one pipeline for some epochs and prints what the first and the later ones cost, as JSON: a
process of its own, so that CPU time and memory are the pipeline's.

    python -m bench.feed_one PIPELINE FOLDER CACHE EPOCHS THREADS

PIPELINE is `tutorial` (ImageFolder, PIL, DataLoader), `synthetic`, `resident`, `torchvision`,
`dali`, `ffcv` or `ffcv-jpeg`. A batch is 64 images of 64x64, mirrored at random, in [-1, 1].
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

from kernels import philox
from pipelines.batch import Clock
from pipelines.datasets import find
from pipelines.open import open_pipeline
from pipelines.settings import Data

BATCH, SIDE = 64, 64


def tutorial(folder: Path, workers: int) -> tuple[int, Iterator]:
    """Batches of the PyTorch DCGAN tutorial's loader, epoch after epoch, and an epoch's number."""
    from torchvision import datasets
    from torchvision import transforms as t

    steps = [t.Resize(SIDE), t.CenterCrop(SIDE), t.RandomHorizontalFlip(), t.ToTensor()]
    steps.append(t.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    images = datasets.ImageFolder(str(folder), t.Compose(steps))
    loader = torch.utils.data.DataLoader(
        images, BATCH, shuffle=True, drop_last=True, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip

    def endless() -> Iterator:
        while True:
            yield from loader

    return len(loader), endless()


def ours(name: str, folder: Path, cache: Path, threads: int) -> tuple[int, Iterator, Callable]:
    """Batches of one of our pipelines, an epoch's number of them, and how to close it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, _, form = name.partition("-")
    data = Data(name="folder", path=folder, cache=cache, resolution=SIDE, batch=BATCH, flip=True,
                workers=threads, pipeline=name, beton=form or "raw")  # fmt: skip
    clock = Clock(BATCH, device)
    key = philox.make_key(0, device=device)
    pipeline = open_pipeline(find(data), data, clock, 0, key, say=lambda _: None)

    def endless() -> Iterator:
        while True:
            pipeline.ready(clock)
            yield pipeline.batch(clock)
            clock.advance()

    return pipeline.images // BATCH, endless(), pipeline.close


def cpu_seconds() -> float:
    """Of this process and those that it started."""
    times = [p.cpu_times() for p in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(t.user + t.system for t in times)


def memory() -> int:
    """Bytes that only this process and those it started hold: mapped files are the system's."""
    me = psutil.Process()
    return sum(p.memory_full_info().uss for p in (me, *me.children(recursive=True)))


def main(name: str, folder: str, cache: str, epochs: str, threads: str) -> None:
    torch.set_num_threads(1)
    began, spent = time.perf_counter(), cpu_seconds()
    close = None
    if name == "tutorial":
        length, batches = tutorial(Path(folder), int(threads) - 1)
    else:
        length, batches, close = ours(name, Path(folder), Path(cache), int(threads) - 1)
    found = {}
    for name, count in (("first", 1), ("later", int(epochs) - 1)):
        for _ in range(count * length):
            next(batches)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, used = time.perf_counter() - began, cpu_seconds() - spent
        images = count * length * BATCH
        found[name] = {"images": images, "seconds": seconds, "cpu_seconds": used}
        found[name]["memory"] = memory()
        began, spent = time.perf_counter(), cpu_seconds()
    if close:
        close()
    kept = sum(p.stat().st_size for p in Path(cache).rglob("*") if p.is_file())
    print(json.dumps(found | {"disk": kept}))


if __name__ == "__main__":
    main(*sys.argv[1:])
