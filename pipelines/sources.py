"""What a dataset is to a pipeline: rows that decode to uint8 (C, H, W), from whatever source.

Sources pickle small (names are one byte array, no list of strings), because each worker process
of the torchvision pipeline holds one.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.images import Fit, read, size_of


@dataclass
class Dataset(ABC):
    """A dataset on disk, opened at a recipe's channels and resolution.

    labels: int64 (n,) or None. classes: their names, or (). note: what a user should know about
    this copy ("subset: 8,000 of 202,599 images"), or "". attributes: uint8 (n, a) of 0 and 1, or
    None; attribute_names: theirs.
    """

    name: str
    split: str
    fit: Fit
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    note: str = ""
    attributes: np.ndarray | None = field(default=None, kw_only=True)
    attribute_names: tuple[str, ...] = field(default=(), kw_only=True)

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def decode(self, row: int) -> np.ndarray:
        """uint8 (C, H, W); raises BadImage naming the file, ValueError if the crop is too large."""

    @abstractmethod
    def describe(self, row: int) -> str:
        """File name, or the like, for messages."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of what identifies the content, before any resizing."""


@dataclass
class FileSet(Dataset):
    """Image files; names are paths relative to `folder`, a numpy array of bytes (n,)."""

    folder: Path = Path()
    names: np.ndarray = None

    def __post_init__(self) -> None:
        """Find an impossible crop now, from the first header, and not after the compile."""
        size = None if self.fit.crop is None else size_of(self.path(0))
        if size is not None:
            self.fit.crop_of(size, self.describe(0))

    def path(self, row: int) -> Path:
        """Where the image of a row lies."""
        return self.folder / os.fsdecode(bytes(self.names[row]))

    def __len__(self) -> int:
        return len(self.names)

    def decode(self, row: int) -> np.ndarray:
        path = self.path(row)
        return self.fit(read(path, self.fit.channels), str(path))

    def describe(self, row: int) -> str:
        return str(self.path(row))

    def fingerprint(self) -> str:
        """From names, sizes and modification times: 200,000 files take about a second."""
        digest = hashlib.sha256()
        for name in self.names:
            stat = os.stat(os.path.join(os.fsencode(self.folder), bytes(name)))
            digest.update(b"%s\0%d\0%d\n" % (bytes(name), stat.st_size, stat.st_mtime_ns))
        return digest.hexdigest()


@dataclass
class ArraySet(Dataset):
    """Images that already are one array, uint8 (n, C, H, W)."""

    images_NCHW: np.ndarray = None

    def __len__(self) -> int:
        return len(self.images_NCHW)

    def decode(self, row: int) -> np.ndarray:
        pixels_CHW = self.images_NCHW[row]
        if pixels_CHW.shape == self.fit.shape and self.fit.crop in (None, self.fit.resolution):
            return pixels_CHW
        pixels = pixels_CHW[0] if len(pixels_CHW) == 1 else pixels_CHW.transpose(1, 2, 0)
        return self.fit(Image.fromarray(pixels), self.describe(row))

    def describe(self, row: int) -> str:
        return f"{self.name} {self.split} image {row}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.images_NCHW.shape).encode())
        digest.update(np.ascontiguousarray(self.images_NCHW).data)
        return digest.hexdigest()


@dataclass
class Synthetic(Dataset):
    """Images computed from their row: a blob of the class's colour and place on a gradient.

    Ten classes, so that a network has something to learn and a label something to say.
    """

    start: int = 0
    count: int = 0

    def __post_init__(self) -> None:
        self.labels = np.arange(self.count, dtype=np.int64) % 10
        self.classes = tuple(f"blob {i}" for i in range(10))

    def __len__(self) -> int:
        return self.count

    def decode(self, row: int) -> np.ndarray:
        rng = np.random.default_rng([20, self.start + row])
        side = (np.arange(self.fit.resolution) + 0.5) / self.fit.resolution
        x_W, y_H = side[None, :], side[:, None]
        turn = 2 * np.pi * (self.labels[row] / 10)
        centre_x, centre_y = 0.5 + 0.22 * np.array([np.cos(turn), np.sin(turn)])
        centre_x, centre_y = np.array([centre_x, centre_y]) + rng.normal(0, 0.03, 2)
        distance = (x_W - centre_x) ** 2 + (y_H - centre_y) ** 2
        blob = np.exp(-distance / (2 * rng.uniform(0.08, 0.14) ** 2))
        tilt = rng.uniform(0, 2 * np.pi)
        ramp = 0.35 + 0.3 * (np.cos(tilt) * (x_W - 0.5) + np.sin(tilt) * (y_H - 0.5))
        hue = 0.5 + 0.5 * np.cos(turn + 2 * np.pi * np.arange(3) / 3)
        colour = hue if self.fit.channels == 3 else np.array([1.0])
        pixels = ramp[None] * (1 - blob) + colour[:, None, None] * blob
        return np.round(255 * pixels.clip(0, 1)).astype(np.uint8)

    def describe(self, row: int) -> str:
        return f"synthetic {self.split} image {row}"

    def fingerprint(self) -> str:
        return f"synthetic-1-{self.start}-{self.count}"
