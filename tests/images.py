"""Images of noise: folders of files, and tensors."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image


def images(folder: Path, count: int, size: tuple[int, int], seed: int, suffix: str = "png") -> str:
    """Write `count` images of noise, (height, width); gives the folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.{suffix}")
    return str(folder)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Float32 in [-1, 1], of this shape."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
