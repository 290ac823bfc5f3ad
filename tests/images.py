"""Folders of image files."""

from pathlib import Path

import numpy as np
from PIL import Image


def images(folder: Path, count: int, size: tuple[int, int], seed: int, suffix: str = "png") -> str:
    """Write `count` images of noise, (height, width); gives the folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.{suffix}")
    return str(folder)
