"""The data part of a recipe: which dataset, at which size, fed how."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

UNPAIRED = ("horse2zebra", "style_transfer", "unpaired", "synthetic_unpaired")
PAIRED = ("facades", "pairs", "synthetic_pairs")
"""Datasets of two domains, and of side-by-side pairs."""


def cache_home() -> Path:
    """Where what is made once is kept: the variable SADDLE_CACHE, else ~/.cache/saddle."""
    return Path(os.environ.get("SADDLE_CACHE") or Path.home() / ".cache" / "saddle")


@dataclass(frozen=True)
class Data:
    """Dataset and pipeline."""

    name: str = "digits"
    """Dataset: digits, mnist, fashion_mnist, cifar10, celeba, lsun, birds, horse2zebra, facades,
    style_transfer, folder (also a zip or tar shards), unpaired (trainA, trainB; or content, style),
    pairs (side by side), tiles (cut from large images), synthetic, synthetic_unpaired,
    synthetic_pairs or synthetic_captions (computed)."""
    resolution: int = 64
    """Height and width in pixels; images are resized (shorter side) and centre-cropped to it."""
    channels: Literal[1, 3] = 3
    """Channels of the images that the networks see: 1 grey, 3 RGB."""
    batch: int = 64
    """Images per iteration over all ranks together."""
    crop: int | None = None
    """Centre crop in source pixels before resizing; none takes the largest centred square."""
    load: int | None = None
    """Side to which images are resized before a random square of `resolution` is cut from them."""
    window: tuple[int, int] | None = None
    """Values of 16-bit grey pixels that become black and white; none takes 0 and 65535."""
    scale: int | None = None
    """Hand out each image also smaller by this factor (bicubic, antialiased), as its pair."""
    balanced: bool = False
    """Show all classes equally often."""
    without: tuple[int, ...] = ()
    """Classes that are left out of training; held-out images are of all classes."""
    flip: bool = False
    """Mirror each image with probability one half."""
    root: Path | None = None
    """Folder that holds the datasets; default: the variable SADDLE_DATA, else ./data."""
    path: Path | None = None
    """Folder of this very dataset, in place of its usual place under root (needed for `folder`)."""
    pipeline: Literal["auto", "resident", "dali", "ffcv", "torchvision", "synthetic"] = "auto"
    """resident decodes once into a packed uint8 cache, ffcv into a .beton; dali and torchvision
    decode each image each time; synthetic is one batch of noise, to measure speed without data."""
    beton: Literal["raw", "jpeg"] = "raw"
    """Form of ffcv's .beton: pixels at the stored size, or JPEGs that are decoded each time."""
    workers: int = 2
    """Processes that decode (torchvision, and all caches while they are made), or threads (dali,
    ffcv)."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do at a corrupt image: stop and name it, or skip and count it."""
    download: bool = False
    """Fetch the dataset if it is missing (torchvision: mnist, fashion_mnist, cifar10, celeba)."""
    cache: Path | None = None
    """Folder of packed caches; default: the variable SADDLE_CACHE, else ~/.cache/saddle."""

    def has_pairs(self) -> bool:
        """Whether an image comes with another one."""
        return self.scale is not None or self.name in (*UNPAIRED, *PAIRED)

    def root_folder(self) -> Path:
        """Where datasets are looked for."""
        return self.root or Path(os.environ.get("SADDLE_DATA") or "data")

    def cache_folder(self) -> Path:
        """Where packed caches are kept."""
        return self.cache or cache_home()
