"""Which pipeline feeds this run, and why?"""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pipelines import beton, dali, ffcv
from pipelines.batch import Batch, Clock
from pipelines.feed import Spec
from pipelines.finish import Finish
from pipelines.heap import keep_freed_memory
from pipelines.order import Balanced, Order
from pipelines.pack import load, pack_path, packed_bytes
from pipelines.resident import fits, open_resident
from pipelines.settings import Data
from pipelines.sources import Dataset, EncodedSet
from pipelines.synthetic import Synthetic
from pipelines.torchvision import Torchvision

SHARE_OF_DISK = 0.5
"""Part of the free disk that a packed cache may take unasked."""
SHARE_OF_HOST = 0.5
"""Part of the available host memory that mapped images may take: beyond it they are read again from
the disk, in random order."""


class Pipeline(Protocol):
    """Batches of one rank, wherever the clock points; the clock is all the state there is.

    images: images in an epoch. skipped: corrupt images met, each replaced by the next good row.
    choice: one line that says what feeds the run and why.
    """

    name: str
    images: int
    skipped: int
    choice: str

    def ready(self, clock: Clock) -> None:
        """Host part of an iteration: may wait, copy and raise BadImage."""

    def batch(self, clock: Clock) -> Batch:
        """Device part: tensor operations only; a CUDA graph can capture it."""

    def close(self) -> None:
        """Stop workers and let go of memory."""


class TwoDomains:
    """Two unpaired domains, each with a pipeline, an order and flips of its own; the second's
    images are the first's `pair_NCHW`."""

    def __init__(self, first: Pipeline, second: Pipeline) -> None:
        self._both = first, second
        self.name, self.images, self.choice = first.name, first.images, first.choice

    @property
    def skipped(self) -> int:
        """Corrupt images of both."""
        return sum(pipeline.skipped for pipeline in self._both)

    def ready(self, clock: Clock) -> None:
        """Host part of both."""
        for pipeline in self._both:
            pipeline.ready(clock)

    def batch(self, clock: Clock) -> Batch:
        """Device part of both."""
        first, second = (pipeline.batch(clock) for pipeline in self._both)
        return replace(first, pair_NCHW=second.images_NCHW)

    def close(self) -> None:
        """Close both."""
        for pipeline in self._both:
            pipeline.close()


def open_pipeline(
    dataset: Dataset,
    data: Data,
    clock: Clock,
    seed: int,
    key: Tensor,
    say: Callable[[str], None] = print,
    before: str | None = None,
) -> Pipeline:
    """Open the pipeline that `data.pipeline` asks for; `key` is a Philox key on clock.device,
    `before` the pipeline that `auto` chose when the run began.

    Raises BadImage, CacheUnusable, or ValueError naming a setting.
    """
    if clock.batch % clock.world_size:
        raise ValueError(f"data.batch={clock.batch} does not divide by {clock.world_size} ranks")
    name, why = choose(dataset, data, clock.device, before)
    if clock.device.type == "cpu":
        keep_freed_memory()
    first = _open(name, dataset, data, clock, seed, key, say, 0)
    if dataset.second is not None:
        try:
            second = _open(name, dataset.second, data, clock, seed, key, say, 1)
        except BaseException:
            first.close()
            raise
        first = TwoDomains(first, second)
    first.choice = f"{name}: {first.choice or why}"
    return first


def _open(
    name: str,
    dataset: Dataset,
    data: Data,
    clock: Clock,
    seed: int,
    key: Tensor,
    say: Callable[[str], None],
    domain: int,
) -> Pipeline:
    """The pipeline of one domain."""
    order = _order(dataset, data, seed, domain)
    finish = Finish(dataset, data, key, clock.device, domain)
    spec = Spec(dataset, data, clock, order, finish, say)
    match name:
        case "resident":
            return open_resident(spec, pack_path(dataset, data))
        case "ffcv":
            return ffcv.open_ffcv(spec)
        case "dali":
            return dali.open_dali(spec)
        case "torchvision":
            return Torchvision(spec)
        case _:
            return Synthetic(spec)


def _order(dataset: Dataset, data: Data, seed: int, domain: int) -> Order:
    if not data.balanced:
        return Order(len(dataset), seed, domain)
    if dataset.labels is None:
        raise ValueError(
            f"--data.balanced needs classes, which {dataset.name} has not: leave it out"
        )
    return Balanced(dataset.labels, seed, domain)


def choose(
    dataset: Dataset, data: Data, device: torch.device, before: str | None = None
) -> tuple[str, str]:
    """(name, why) of the pipeline that serves. Raises ValueError if the one that is asked for
    cannot."""
    if data.pipeline != "auto":
        if obstacle := _impossible(data.pipeline, dataset, data):
            raise ValueError(obstacle)
        return data.pipeline, f"asked for by --data.pipeline {data.pipeline}"
    if before and not _impossible(before, dataset, data):
        return before, "as when the run began"
    against = []
    checks = (("resident", _not_resident), ("ffcv", _not_ffcv), ("dali", _not_dali))
    for name, obstacle in checks:
        why = obstacle(dataset, data, device)
        if not why:
            fits = f"chosen by auto: {packed_bytes(dataset) / 1e6:,.1f} MB packed fits"
            return name, fits if name == "resident" else "; ".join(["chosen by auto", *against])
        against.append(f"not {name}: {why}")
    return "torchvision", "; ".join(against)


def _impossible(name: str, dataset: Dataset, data: Data) -> str:
    """Why a pipeline cannot serve this dataset at all; empty where it can."""
    if name == "ffcv":
        return beton.missing()
    if name == "dali":
        wrong = f"--data.pipeline dali decodes image files, and {dataset.name} has none: "
        other = "" if isinstance(dataset, EncodedSet) else wrong + "use resident"
        return other or dali.missing()
    return ""


def _not_resident(dataset: Dataset, data: Data, device: torch.device) -> str:
    """What stands against decoding once, else ""; where nothing does, that beats all else."""
    path, size = pack_path(dataset, data), packed_bytes(dataset)
    host = _available_memory()
    if not (device.type == "cuda" and fits(size, device)[0]) and size > SHARE_OF_HOST * host:
        most = f"{SHARE_OF_HOST:.0%} of the {host / 1e9:,.1f} GB of memory available"
        return f"{size / 1e9:,.1f} GB packed is over {most}"
    if load(path, dataset) is not None:
        return ""
    there = _existing(path.parent)
    if not (there.is_dir() and os.access(there, os.W_OK)):
        return f"cannot keep a packed cache in {path.parent} (--data.cache names another folder)"
    free = shutil.disk_usage(there).free
    if size > SHARE_OF_DISK * free:
        most = f"{SHARE_OF_DISK:.0%} of the {free / 1e9:,.1f} GB free in {path.parent}"
        return f"{size / 1e9:,.1f} GB packed is over {most} (--data.cache names another folder)"
    return ""


def _not_ffcv(dataset: Dataset, data: Data, _device: torch.device) -> str:
    if beton.load_beton(beton.beton_path(dataset, data), dataset) is None:
        return "no .beton is prepared"
    return beton.missing()


def _not_dali(dataset: Dataset, data: Data, device: torch.device) -> str:
    if device.type != "cuda":
        return "no GPU to decode on"
    return _impossible("dali", dataset, data)


def _available_memory() -> int:
    """Bytes of host memory that are free or can be freed."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return folder if folder.exists() else _existing(folder.absolute().parent)
