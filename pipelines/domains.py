"""Datasets of two images at a time: unpaired domains, side-by-side pairs; and tiles.

Layouts: CycleGAN's trainA, trainB, testA, testB (Zhu et al. 2017); pix2pix's train, val, test with
both images in one file (Isola et al. 2017); a folder of large images (DIV2K and the like).
"""

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pipelines import layouts
from pipelines.images import BadImage, Fit, decode, size_of
from pipelines.missing import DatasetMissing, NoSplit, missing_text
from pipelines.settings import Data
from pipelines.sources import Dataset, FileSet

IMAGES = "images (" + " ".join(layouts.SUFFIXES) + ")"


def open_unpaired(data: Data, split: str, fit: Fit, places: tuple[str, ...]) -> FileSet:
    """Domain A, with domain B as its `second`, images of any sizes: folders `<split>A` and
    `<split>B`; or `content` and `style`, each of images or with a folder of each split."""
    roots = _roots(data, places)
    for root in roots:
        if (root / "trainA").is_dir() or (root / "trainB").is_dir():
            folders = {letter: root / f"{split}{letter}" for letter in "AB"}
            return _both(data.name, split, fit, root, folders)
        if (root / "content").is_dir() or (root / "style").is_dir():
            parts = {part: root / part for part in ("content", "style")}
            folders = {part: layouts.split_folder(x, split) for part, x in parts.items()}
            return _both(data.name, split, fit, root, folders)
    looked = ("trainA/ and trainB/, or content/ and style/, with " + IMAGES, roots)
    raise DatasetMissing(missing_text(data, looked=looked))


def _both(name: str, split: str, fit: Fit, root: Path, folders: dict[str, Path | None]) -> FileSet:
    """The domains by their names; a folder that is None lacks the split."""
    domains = []
    for part, folder in folders.items():
        names = layouts.list_images(folder) if folder else []
        if not len(names):
            if split != "train":
                where = f"{folder.name}/ is empty" if folder else f"no {split}/ in {part}/"
                raise NoSplit(f"{name} in {root} has no {split} images ({where})")
            raise DatasetMissing(f"{folder} holds no {IMAGES}: both domains are needed")
        domains.append(FileSet(f"{name}-{part}", split, fit, folder=folder, names=names))
    first, second = domains
    first.second = second
    counts = zip(folders, (f"{len(first):,} images", f"{len(second):,}"), strict=True)
    first.note = ", ".join(f"{part}: {count}" for part, count in counts) + ", unpaired"
    return first


def open_pairs(data: Data, split: str, fit: Fit, places: tuple[str, ...]) -> FileSet:
    """Images that hold a pair: the left half is the image, the right half its partner."""
    folder, names = _files(data, split, places, IMAGES + " of two halves")
    note = "pairs: left half and right half"
    fit = replace(fit, halves=True)
    return FileSet(data.name, split, fit, note=note, folder=folder, names=names)


@dataclass
class Domains(Dataset):
    """The images of two domains as one dataset, whose classes say of which they are."""

    parts: tuple[Dataset, ...] = ()

    @classmethod
    def of(cls, dataset: Dataset) -> "Domains":
        """The dataset, and then its second."""
        parts = dataset, dataset.second
        labels = np.repeat(np.arange(2, dtype=np.int64), [len(part) for part in parts])
        return cls(dataset.name, dataset.split, dataset.fit, labels, ("A", "B"), parts=parts)

    def __len__(self) -> int:
        return len(self.labels)

    def _at(self, row: int) -> tuple[Dataset, int]:
        first = len(self.parts[0])
        return self.parts[int(row >= first)], row - first * (row >= first)

    def decode(self, row: int) -> np.ndarray:
        part, own = self._at(row)
        return part.decode(own)

    def describe(self, row: int) -> str:
        part, own = self._at(row)
        return part.describe(own)

    def digest(self, times: bool) -> str:
        return self.parts[0].identity(times)


@dataclass
class TileSet(FileSet):
    """Squares of large images, nothing resized. boxes: where each is in its file."""

    _last: threading.local = field(default_factory=threading.local, repr=False)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_last": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state | {"_last": threading.local()}

    def decode(self, row: int) -> np.ndarray:
        """The tile; the file it is from is kept, since the tiles of one follow each other."""
        name = self.describe(row)
        if getattr(self._last, "name", None) != name:
            content = self.encoded(row)
            self._last.pixels_HWC = decode(content, name, self.fit.channels, self.fit.window)
            self._last.name = name
        return self.fit.resized(self._last.pixels_HWC, name, self.box(row))


def open_tiles(data: Data, split: str, fit: Fit, places: tuple[str, ...]) -> TileSet:
    """All tiles of `data.load` (or `data.resolution`) pixels of the images of a folder, evenly
    spread so that they cover each image and overlap as little as they must."""
    return _tiled(data, split, fit, *_files(data, split, places, IMAGES))


def _tiled(data: Data, split: str, fit: Fit, folder: Path, files: np.ndarray) -> TileSet:
    names, boxes, small = [], [], 0
    for file in files:
        path = folder / file.decode()
        size = size_of(path)
        if size is None:
            raise BadImage.of(path, "not an image")
        here = [(x, y, x + fit.side, y + fit.side) for y in _starts(size[1], fit.side)
                for x in _starts(size[0], fit.side)]  # fmt: skip
        small += not here
        names += [file] * len(here)
        boxes += here
    if not boxes:
        raise ValueError(
            f"every image in {folder} is smaller than {fit.side} pixels: give a smaller "
            f"--data.{'load' if data.load else 'resolution'}"
        )
    note = f"{len(boxes):,} tiles of {fit.side} pixels from {len(files) - small:,} images"
    note += f"; {small} smaller images left out" if small else ""
    tiles = np.array(boxes, np.int32)
    return TileSet(
        data.name, split, fit, note=note, folder=folder, names=np.array(names), boxes=tiles
    )


def _starts(length: int, side: int) -> list[int]:
    """Where the tiles along one edge begin: none if it is too short."""
    if length < side:
        return []
    count = -(-length // side)
    return np.linspace(0, length - side, count).round().astype(int).tolist()


def _files(data: Data, split: str, places: tuple[str, ...], wanted: str) -> tuple[Path, np.ndarray]:
    """The first place that has images of a split: its folder and their names."""
    roots = _roots(data, places)
    for root in roots:
        folder = layouts.split_folder(root, split)
        if folder is None:
            raise NoSplit(
                f"{data.name} in {root} has no {split} images (no {split}/ beside train/)"
            )
        names = layouts.list_images(folder)
        if len(names):
            return folder, names
    raise DatasetMissing(missing_text(data, looked=(wanted, roots)))


def _roots(data: Data, places: tuple[str, ...]) -> list[Path]:
    if data.path is not None:
        return [data.path]
    return [data.root_folder() / place for place in places]
