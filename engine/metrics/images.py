"""Images to measure, as uint8: rows of a dataset, and what a generator made."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pipelines.datasets import BadImage, Dataset
from pipelines.pack import load, pack_path
from pipelines.settings import Data


def decode(dataset: Dataset, data: Data, rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """uint8 (N, C, H, W) on the host, and the rows that they are: corrupt ones are left out if
    `data.on_error` is skip, and raise BadImage otherwise."""
    packed = load(pack_path(dataset, data), dataset)
    if packed is not None and (not packed.skipped or data.on_error == "skip"):
        rows = rows[packed.rows[rows] == rows]
        return torch.from_numpy(dataset.fit.shown(packed.images_NHWC[rows])), rows
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = list(pool.map(lambda row: _decode(dataset, row, data.on_error), rows.tolist()))
    whole = [i for i, pixels in enumerate(decoded) if pixels is not None]
    if not whole:
        raise BadImage(f"every image of {dataset.name} that was to be measured is corrupt")
    stored_NHWC = np.stack([decoded[i] for i in whole])
    return torch.from_numpy(dataset.fit.shown(stored_NHWC)), rows[whole]


def _decode(dataset: Dataset, row: int, on_error: str) -> np.ndarray | None:
    try:
        return dataset.decode(row)
    except BadImage:
        if on_error == "skip":
            return None
        raise


def quantised(images_NCHW: Tensor) -> Tensor:
    """uint8 images as a file would hold them, from float images in [-1, 1]."""
    return ((images_NCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
