"""The file layouts that datasets come in: idx, CIFAR's batches, CelebA's lists, image folders."""

import csv
import gzip
import math
import os
import pickle
import zlib
from pathlib import Path

import numpy as np

from pipelines.images import BadImage

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
ARRAY_PARTS = frozenset(
    {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }
)
"""All that the pickle of a numpy array needs to import."""
SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val", "valid")}


def idx_file(folder: Path, stem: str, dimensions: int) -> Path | None:
    """The idx file of a stem ("train-images") in a folder, plain or gzipped, if it is there."""
    names = (f"{stem}-idx{dimensions}-ubyte", f"{stem}.idx{dimensions}-ubyte")
    paths = (folder / f"{name}{end}" for end in ("", ".gz") for name in names)
    return next((path for path in paths if path.is_file()), None)


def read_idx(path: Path) -> np.ndarray:
    """uint8 array of an idx file (http://yann.lecun.com/exdb/mnist); BadImage if it is broken."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadImage.of(path, error) from error
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise BadImage.of(path, "not an idx file of unsigned bytes")
    head = 4 + 4 * content[3]
    shape = tuple(int(size) for size in np.frombuffer(content[4:head], ">u4"))
    if len(content) - head != math.prod(shape):
        found = f"{len(content) - head:,} bytes of data where {shape} needs {math.prod(shape):,}"
        raise BadImage.of(path, found)
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of numpy arrays and plain containers; refuses to import anything else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in ARRAY_PARTS:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        # numpy 2 warns at the old name, which CIFAR's files of 2009 carry
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_cifar(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (n, 3, 32, 32) and int64 (n,) of CIFAR-10's batch files, in the order given."""
    images, labels = [], []
    for path in paths:
        with path.open("rb") as file:
            try:
                batch = _ArraysOnly(file, encoding="latin1").load()
                images.append(np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32))
                labels.append(np.asarray(batch["labels"], np.int64))
            except (pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError) as error:
                raise BadImage.of(path, error) from error
        if len(images[-1]) != len(labels[-1]):
            raise BadImage.of(path, f"{len(images[-1])} images but {len(labels[-1])} labels")
    return np.concatenate(images), np.concatenate(labels)


def read_partition(folder: Path) -> dict[str, int] | None:
    """CelebA's split by file stem (0 train, 1 valid, 2 test), from .txt or .csv; None if absent."""
    for name, delimiter in (("list_eval_partition.txt", " "), ("list_eval_partition.csv", ",")):
        if (folder / name).is_file():
            with (folder / name).open(newline="") as file:
                rows = [row for row in csv.reader(file, delimiter=delimiter) if len(row) >= 2]
            return {Path(row[0]).stem: int(row[-1]) for row in rows if row[-1].strip().isdigit()}
    return None


def read_attributes(folder: Path) -> tuple[tuple[str, ...], dict[str, list[bool]]] | None:
    """CelebA's attributes: their names, and each image's by file stem; None if there is no list."""
    for name, delimiter in (("list_attr_celeba.txt", " "), ("list_attr_celeba.csv", ",")):
        if (folder / name).is_file():
            with (folder / name).open(newline="") as file:
                rows = [
                    [field for field in row if field]
                    for row in csv.reader(file, delimiter=delimiter)
                ]
            rows = [row for row in rows if len(row) > 1]  # the first line may be their number
            names = [field for field in rows[0] if field != "image_id"]
            whole = (row for row in rows[1:] if len(row) == len(names) + 1)
            return tuple(names), {Path(row[0]).stem: [v == "1" for v in row[1:]] for row in whole}
    return None


def list_images(folder: Path) -> np.ndarray:
    """Relative names of the images below a folder, bytes (n,), sorted; hidden files left out."""
    found, seen = [], set()
    for here, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(here) in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(os.path.realpath(here))
        folders[:] = [name for name in folders if not name.startswith(".")]
        wanted = (f for f in files if f.lower().endswith(SUFFIXES) and not f.startswith("."))
        found += [os.path.relpath(os.path.join(here, name), folder) for name in wanted]
    return np.array(sorted(os.fsencode(name) for name in found), dtype=np.bytes_)


def class_labels(names: np.ndarray) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels int64 (n,) and class names from the first folder of each name.

    (None, ()) if an image lies outside a class folder or there are fewer than two of them.
    """
    parts = [bytes(name).split(b"/", 1) for name in names]
    if any(len(part) < 2 for part in parts):
        return None, ()
    classes, labels = np.unique([part[0] for part in parts], return_inverse=True)
    if len(classes) < 2:
        return None, ()
    return labels.astype(np.int64), tuple(os.fsdecode(bytes(name)) for name in classes)


def empty_classes(folder: Path, classes: tuple[str, ...]) -> list[str]:
    """Sub-folders that would be classes if they held images."""
    subs = (sub.name for sub in folder.iterdir() if sub.is_dir() and sub.name[:1] != ".")
    return sorted(set(subs) - set(classes))


def split_folder(folder: Path, split: str) -> Path | None:
    """Sub-folder of a split, the folder itself if it has no splits, or None if it lacks this one.

    train/, test/, val/ count as splits only if there is no other sub-folder: beside car/ and
    plane/, train/ is a class.
    """
    if not folder.is_dir():
        return folder if split == "train" else None
    subs = {sub.name for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith(".")}
    known = {name for names in SPLIT_FOLDERS.values() for name in names}
    if "train" not in subs or not subs <= known:
        return folder if split == "train" else None
    return next((folder / name for name in SPLIT_FOLDERS[split] if name in subs), None)
