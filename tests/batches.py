"""Batches of a small folder of images, through the pipelines as a run opens them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kernels import philox
from pipelines.batch import Batch, Clock
from pipelines.datasets import find
from pipelines.open import Pipeline, open_pipeline
from pipelines.settings import Data

KEY = philox.make_key(5)
CPU = torch.device("cpu")


def folder_of_22(tmp_path: Path) -> Data:
    """A folder of 22 PNGs in two classes, at batch 8, flipped."""
    rng = np.random.default_rng(0)
    for i in range(22):
        path = tmp_path / "set" / f"class{i % 2}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (14, 20, 3), dtype=np.uint8)).save(path)
    return Data(
        name="folder",
        path=tmp_path / "set",
        cache=tmp_path / "cache",
        resolution=12,
        batch=8,
        flip=True,
        workers=0,
    )


def clock_of(data: Data, images: int = 0, rank: int = 0, world: int = 1) -> Clock:
    """A clock at a place in the stream."""
    return Clock(data.batch, CPU, images, rank, world)


def opened(data: Data, clock: Clock, say: object = lambda _: None) -> Pipeline:
    """The pipeline of a run with seed 3."""
    return open_pipeline(find(data), data, clock, 3, KEY.to(clock.device), say=say)


def some(data: Data, count: int, images: int = 0, **place: int) -> list[Batch]:
    """Batches from a place in the stream on."""
    clock = clock_of(data, images, **place)
    pipeline = opened(data, clock)
    batches = []
    for _ in range(count):
        pipeline.ready(clock)
        batches.append(pipeline.batch(clock))
        clock.advance()
    pipeline.close()
    return batches
