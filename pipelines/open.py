"""Which pipeline feeds this run, and why?"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pipelines.batch import Batch, Clock
from pipelines.pack import load, pack_path, packed_bytes
from pipelines.resident import open_resident
from pipelines.settings import Data
from pipelines.sources import Dataset
from pipelines.torchvision import Torchvision

SHARE_OF_DISK = 0.5
"""Part of the free disk that a packed cache may take unasked."""


class Pipeline(Protocol):
    """Batches of one rank, wherever the clock points; the clock is all the state there is.

    images: images in an epoch. skipped: corrupt images met, each replaced by the next good row
    (resident knows all of them at once, torchvision those seen so far). choice: one line that says
    what feeds the run and why.
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


def open_pipeline(
    dataset: Dataset,
    data: Data,
    clock: Clock,
    seed: int,
    key: Tensor,
    memory_format: torch.memory_format = torch.channels_last,
    say: Callable[[str], None] = print,
) -> Pipeline:
    """Open the pipeline that `data.pipeline` asks for; `key` is a Philox key on clock.device.

    Raises BadImage, CacheUnusable, or ValueError naming a setting.
    """
    if clock.batch % clock.world_size:
        raise ValueError(f"data.batch={clock.batch} does not divide by {clock.world_size} ranks")
    why = f"asked for by --data.pipeline {data.pipeline}"
    if data.pipeline != "torchvision":
        path = pack_path(dataset, data)
        obstacle = _obstacle(dataset, path) if data.pipeline == "auto" else ""
        if not obstacle:
            return open_resident(dataset, data, path, clock, seed, key, memory_format, say)
        why = f"{obstacle} (--data.cache names another folder)"
    pipeline = Torchvision(dataset, data, clock, seed, key, memory_format, say)
    pipeline.choice = f"torchvision: {why}"
    return pipeline


def _obstacle(dataset: Dataset, path: Path) -> str:
    """What stands against resident, else "": decoding once beats decoding for ever."""
    if load(path, dataset) is not None:
        return ""
    there = _existing(path.parent)
    if not os.access(there, os.W_OK):
        return f"cannot keep a packed cache in {path.parent}"
    size, free = packed_bytes(dataset), shutil.disk_usage(there).free
    if size > SHARE_OF_DISK * free:
        most = f"{SHARE_OF_DISK:.0%} of the {free / 1e9:,.1f} GB free in {path.parent}"
        return f"{size / 1e9:,.1f} GB packed is over {most}"
    return ""


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return folder if folder.exists() else _existing(folder.absolute().parent)
