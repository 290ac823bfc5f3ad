"""The data part of a recipe: which dataset, at which size, fed how."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Data:
    """Dataset and pipeline."""

    name: str = "digits"
    """Dataset: digits, mnist, fashion_mnist, cifar10, celeba, folder or synthetic."""
    resolution: int = 64
    """Height and width in pixels; images are resized (shorter side) and centre-cropped to it."""
    channels: Literal[1, 3] = 3
    """Channels of the images that the networks see: 1 grey, 3 RGB."""
    batch: int = 64
    """Images per iteration over all ranks together."""
    crop: int | None = None
    """Centre crop in source pixels before resizing; none takes the largest centred square."""
    flip: bool = False
    """Mirror each image with probability one half."""
    root: Path | None = None
    """Folder that holds the datasets; default: the variable SADDLE_DATA, else ./data."""
    path: Path | None = None
    """Folder of this very dataset, in place of its usual place under root (needed for `folder`)."""
    pipeline: Literal["auto", "resident", "torchvision"] = "auto"
    """resident decodes once into a packed uint8 cache; torchvision decodes each image each time."""
    workers: int = 2
    """Decoding processes (torchvision) or threads (building the resident cache)."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do at a corrupt image: stop and name it, or skip and count it."""
    download: bool = False
    """Fetch the dataset if it is missing (torchvision: mnist, fashion_mnist, cifar10, celeba)."""
    cache: Path | None = None
    """Folder of packed caches; default: the variable SADDLE_CACHE, else ~/.cache/saddle."""

    def root_folder(self) -> Path:
        """Where datasets are looked for."""
        return self.root or Path(os.environ.get("SADDLE_DATA") or "data")

    def cache_folder(self) -> Path:
        """Where packed caches are kept."""
        home = Path.home() / ".cache" / "saddle"
        return self.cache or Path(os.environ.get("SADDLE_CACHE") or home)
