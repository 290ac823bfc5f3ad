"""What a dataset is to a pipeline: rows that decode to uint8 (H, W, C), from whatever source.

Sources pickle small (names are one byte array, no list of strings), because each worker process
of the torchvision pipeline holds one.
"""

import hashlib
import os
import stat
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from pipelines.images import Box, Fit, Unreadable, pixels_of, size_of

ENDS = 8192, 64
"""Bytes of a file's beginning and end that tell what it is and whether it is whole."""


@dataclass(frozen=True)
class Captions:
    """Texts of each row as numbers of words.

    tokens_NKL: int16, K captions of at most L words a row, 0 after the last. lengths_NK: int16.
    words: what each number means; words[0] is the end.
    """

    tokens_NKL: np.ndarray
    lengths_NK: np.ndarray
    words: tuple[str, ...]

    def of(self, rows: np.ndarray) -> "Captions":
        """Those of some rows, int64 (any,)."""
        return Captions(self.tokens_NKL[rows], self.lengths_NK[rows], self.words)


@dataclass
class Dataset(ABC):
    """A dataset on disk, opened at a recipe's channels and resolution.

    labels: int64 (n,) or None. classes: their names, or (). note: what a user should know about
    this copy ("subset: 8,000 of 202,599 images"), or "". attributes: uint8 (n, a) of 0 and 1, or
    None; attribute_names: theirs. captions: of each row, or None. second: the images of another
    domain, which go with these in no order, or None.
    """

    name: str
    split: str
    fit: Fit
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    note: str = ""
    attributes: np.ndarray | None = field(default=None, kw_only=True)
    attribute_names: tuple[str, ...] = field(default=(), kw_only=True)
    captions: Captions | None = field(default=None, kw_only=True)
    second: "Dataset | None" = field(default=None, kw_only=True)

    @property
    def images(self) -> int:
        """Images in an epoch: of the larger domain, if there are two."""
        return max(len(self), len(self.second) if self.second else 0)

    @property
    def words(self) -> tuple[str, ...]:
        """The vocabulary of the captions; empty where there are none."""
        return self.captions.words if self.captions else ()

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def decode(self, row: int) -> np.ndarray:
        """uint8 `fit.stored`; raises BadImage naming the file, ValueError if the crop is too
        large."""

    @abstractmethod
    def describe(self, row: int) -> str:
        """File name, or the like, for messages."""

    @abstractmethod
    def digest(self, times: bool) -> str:
        """Hex digest of what identifies the content, before any resizing; times: of when its files
        were written, too."""

    def fingerprint(self) -> str:
        """Digest of the content, also in a copy."""
        return self.digest(times=False)

    def stamp(self) -> str:
        """Digest that files written over in place change too, for what is made of them."""
        return self.digest(times=True)

    def identity(self, times: bool = False) -> str:
        """Digest of the whole, a second domain included."""
        if self.second is None:
            return self.digest(times)
        both = self.digest(times) + self.second.digest(times)
        return hashlib.sha256(both.encode()).hexdigest()


@dataclass
class EncodedSet(Dataset):
    """Encoded image files. boxes: int32 (n, 4), the part of each image that counts (left, top,
    right, bottom), or None."""

    boxes: np.ndarray | None = field(default=None, kw_only=True)

    @abstractmethod
    def encoded(self, row: int) -> bytes:
        """The file's content; raises Unreadable naming it."""

    def ends(self, row: int) -> tuple[int, bytes, bytes]:
        """Size in bytes, first and last bytes (ENDS) of a file."""
        content = self.encoded(row)
        return len(content), content[: ENDS[0]], content[-ENDS[1] :]

    def box(self, row: int) -> Box | None:
        """The part of a row's image that counts."""
        return None if self.boxes is None else tuple(int(edge) for edge in self.boxes[row])

    def decode(self, row: int) -> np.ndarray:
        return self.fit(self.encoded(row), self.describe(row), self.box(row))


@dataclass
class FileSet(EncodedSet):
    """Image files; names are paths relative to `folder`, a numpy array of bytes (n,)."""

    folder: Path = Path()
    names: np.ndarray = None

    def __post_init__(self) -> None:
        """Find an impossible crop now, from the first header, and not after the compile."""
        size = None if self.fit.crop is None else size_of(self.path(0))
        if size is not None:
            self.fit.squares(size, self.describe(0), self.box(0))

    def path(self, row: int) -> Path:
        """Where the image of a row lies."""
        return Path(self.describe(row))

    def __len__(self) -> int:
        return len(self.names)

    def encoded(self, row: int) -> bytes:
        try:
            with _open(self.describe(row)) as file:
                return file.read()
        except OSError as error:
            raise Unreadable.of(self.describe(row), error) from error

    def ends(self, row: int) -> tuple[int, bytes, bytes]:
        try:
            with _open(self.describe(row)) as file:
                size = os.fstat(file.fileno()).st_size
                head = os.pread(file.fileno(), ENDS[0], 0)
                return size, head, os.pread(file.fileno(), ENDS[1], max(size - ENDS[1], 0))
        except OSError as error:
            raise Unreadable.of(self.describe(row), error) from error

    def describe(self, row: int) -> str:
        return os.path.join(self.folder, os.fsdecode(bytes(self.names[row])))

    def digest(self, times: bool) -> str:
        """From names and sizes: 200,000 files take about a second."""
        digest = hashlib.sha256(b"" if self.boxes is None else self.boxes.tobytes())
        for name in map(bytes, self.names):
            try:
                found = os.stat(os.path.join(os.fsencode(self.folder), name))
            except OSError:  # a link to nowhere, say: reading it will tell
                digest.update(b"%s\0none\n" % name)
                continue
            when = b"\0%d" % found.st_mtime_ns if times else b""
            digest.update(b"%s\0%d%s\n" % (name, found.st_size, when))
        return digest.hexdigest()


def _open(path: str) -> BinaryIO:
    """A regular file, unbuffered: anything else, as a pipe, may wait for ever. Raises OSError."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError("not a regular file")
    return os.fdopen(number, "rb", buffering=0)


@dataclass
class ArraySet(Dataset):
    """Images that already are one array, uint8 (n, H, W, C)."""

    images_NHWC: np.ndarray = None

    def __len__(self) -> int:
        return len(self.images_NHWC)

    def decode(self, row: int) -> np.ndarray:
        pixels_HWC, channels = self.images_NHWC[row], self.fit.channels
        if pixels_HWC.shape[2] != channels:
            pixels_HWC = pixels_of(Image.fromarray(pixels_HWC.squeeze()), channels)
        return self.fit.resized(pixels_HWC, self.describe(row))

    def describe(self, row: int) -> str:
        return f"{self.name} {self.split} image {row}"

    def digest(self, times: bool) -> str:
        digest = hashlib.sha256(repr(self.images_NHWC.shape).encode())
        digest.update(np.ascontiguousarray(self.images_NHWC).data)
        return digest.hexdigest()


@dataclass
class Synthetic(Dataset):
    """Images computed from their row: a blob of the class's colour and place on a gradient.

    Ten classes, so that a network has something to learn and a label something to say. negative:
    in colours turned round; the right half of a pair is the negative of its left.
    """

    start: int = 0
    count: int = 0
    negative: bool = False

    def __post_init__(self) -> None:
        self.labels = np.arange(self.count, dtype=np.int64) % 10
        self.classes = tuple(f"blob {i}" for i in range(10))

    def __len__(self) -> int:
        return self.count

    def decode(self, row: int) -> np.ndarray:
        pixels_HWC = self._picture(row)
        if self.fit.halves:
            return np.concatenate([pixels_HWC, 255 - pixels_HWC], 1)
        return 255 - pixels_HWC if self.negative else pixels_HWC

    def _picture(self, row: int) -> np.ndarray:
        rng = np.random.default_rng([20, self.start + row])
        side = (np.arange(self.fit.side) + 0.5) / self.fit.side
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
        return np.round(255 * pixels.clip(0, 1)).astype(np.uint8).transpose(1, 2, 0)

    def describe(self, row: int) -> str:
        return f"synthetic {self.split} image {row}"

    def digest(self, times: bool) -> str:
        return f"synthetic-1-{self.start}-{self.count}{'-negative' * self.negative}"
