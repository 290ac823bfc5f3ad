"""Which real images stand beside a model's own? Held-out ones in an order fixed by the seed.

Shapes: N images, C channels, H height, W width.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kernels import philox
from pipelines.batch import Batch, Clock
from pipelines.datasets import BadImage, Dataset, DatasetMissing, NoSplit, decode_some, find
from pipelines.open import open_pipeline
from pipelines.order import Order
from pipelines.settings import Data

UNUSABLE = (NoSplit, DatasetMissing, BadImage, ValueError, OSError)
"""What a split that is not trained on may raise; a picture or figure of it is not worth a run."""


def originals(data: Data, seed: int, count: int) -> tuple[Tensor, str]:
    """Up to `count` images (N, C, H, W) in [-1, 1], on the host, and which they are.

    Held-out ones, or training images where the dataset has no others. Raises DatasetMissing, and
    BadImage unless `data.on_error` is skip.
    """
    try:
        dataset, label = find(data, "test"), "held-out images"
    except NoSplit as reason:
        dataset, label = find(data), f"training images ({reason})"
    return in_random_order(dataset, data, seed, count), label


def held_out_batch(data: Data, device: torch.device, count: int) -> Batch:
    """Up to `count` images on the device, with all that a pipeline hands out with them: held-out
    ones, or training images where the dataset has no others that can be used."""
    data = replace(data, flip=False, download=False, balanced=False)
    try:
        dataset = find(data, "test")
    except UNUSABLE:
        dataset = find(data)
    clock = Clock(min(count, dataset.images), device)
    data = replace(data, batch=clock.batch)
    key = philox.make_key(0, device=device)
    pipeline = open_pipeline(dataset, data, clock, 0, key, say=lambda text: None)
    try:
        pipeline.ready(clock)
        return pipeline.batch(clock)
    finally:
        pipeline.close()


def in_random_order(dataset: Dataset, data: Data, seed: int, count: int) -> Tensor:
    """Up to `count` images (N, C, H, W) in [-1, 1] of a dataset, on the host."""
    rows_N = Order(len(dataset), seed).rows(np.arange(len(dataset))).tolist()
    images_NCHW = decode_some(dataset, rows_N, count, data.on_error == "skip")
    return torch.from_numpy(images_NCHW).float() / 127.5 - 1


def rows_over_rows(above_NCHW: Tensor, below_NCHW: Tensor, columns: int) -> Tensor:
    """A row of the first, under it the same row of the second, and so on; black fills the end."""
    fill = above_NCHW.new_full((-len(above_NCHW) % columns, *above_NCHW.shape[1:]), -1)
    pairs = [torch.cat([x, fill]).unflatten(0, (-1, columns)) for x in (above_NCHW, below_NCHW)]
    return torch.stack(pairs, 1).flatten(0, 2)
