"""LSUN (Yu et al. 2015): a folder of images or an LMDB for each category and split.

lsun/bedroom_train/**/*.webp, lsun/bedroom_val/...       (hashed folders at any depth)
lsun/bedroom_train_lmdb/data.mdb, lsun/bedroom_val_lmdb  (values are encoded images)
"""

import hashlib
import io
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines import layouts
from pipelines.images import BadImage, Fit, size_of
from pipelines.kept import kept
from pipelines.missing import DatasetMissing, NoSplit, missing_text
from pipelines.settings import Data
from pipelines.sources import EncodedSet, FileSet

FOLDER = re.compile(r"(?P<category>.+)_(?P<split>train|val)(?P<lmdb>_lmdb)?")
SPLITS = {"train": "train", "test": "val"}
Sources = dict[tuple[str, str, bool], Path]
"""By category, split ("train" or "val") and whether it is an LMDB."""

_environments: dict[str, tuple[tuple[int, int, int], object]] = {}
"""Open LMDBs of this process by path, with inode, size and time: LMDB forbids to open one twice."""
_opening = threading.Lock()


@dataclass
class LmdbSet(EncodedSet):
    """Images that are values of LMDBs.

    databases: paths, bytes (d,). stamps: int64 (d, 2), size and time in ns when they were listed.
    keys: bytes (n,). numbers: int32 (n,), the database of each.
    """

    databases: np.ndarray = None
    stamps: np.ndarray = None
    keys: np.ndarray = None
    numbers: np.ndarray = None

    def __post_init__(self) -> None:
        """Find an impossible crop now, and not after the compile."""
        if self.fit.crop is not None and (size := size_of(io.BytesIO(self.encoded(0)))):
            self.fit.squares(size, self.describe(0))

    def __len__(self) -> int:
        return len(self.keys)

    def describe(self, row: int) -> str:
        path = os.fsdecode(bytes(self.databases[self.numbers[row]]))
        return f"{path}: {os.fsdecode(bytes(self.keys[row]))}"

    def encoded(self, row: int) -> bytes:
        number = self.numbers[row]
        path = Path(os.fsdecode(bytes(self.databases[number])))
        if _stamp(path) != tuple(self.stamps[number]):
            raise OSError(f"{path} has changed since this run listed it: start the run again")
        try:
            with _environment(path).begin(buffers=False) as transaction:
                content = transaction.get(bytes(self.keys[row]))
        except _lmdb().Error as error:
            raise BadImage.of(self.describe(row), error) from error
        if content is None:
            raise BadImage.of(self.describe(row), "the database has no such key any more")
        return content

    def digest(self, times: bool) -> str:
        """From names and sizes of the databases, and their keys."""
        digest = hashlib.sha256()
        for path in self.databases:
            digest.update(os.path.basename(bytes(path)) + b"\0")
        for part in (self.stamps[:, : 1 + times], self.keys, self.numbers):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


def open_lsun(data: Data, split: str, fit: Fit) -> EncodedSet:
    """The images of all categories in root/lsun or `data.path`, which may also be one category's
    folder. Several categories are classes. Raises DatasetMissing, NoSplit, BadImage, and
    ValueError if LMDBs are there and lmdb is not installed."""
    home = data.root_folder() / "lsun" if data.path is None else data.path
    sources = _sources(home)
    if not sources:
        wanted = "<category>_train/ or <category>_train_lmdb/data.mdb"
        raise DatasetMissing(missing_text(data, looked=(wanted, [home])))
    chosen = [(key, path) for key, path in sources.items() if key[1] == SPLITS[split]]
    if not chosen:
        raise NoSplit(f"lsun in {home} has no {split} images (no <category>_{SPLITS[split]})")
    if len({lmdb for (_, _, lmdb), _ in chosen}) > 1:
        names = ", ".join(path.name for _, path in chosen)
        raise ValueError(f"{home} holds folders and LMDBs ({names}): move one kind away")
    categories = sorted({category for category, _, _ in sources})
    open_paths = _open_databases if chosen[0][0][2] else _open_folders
    dataset, numbers = open_paths(data, split, fit, [path for _, path in chosen])
    if len(categories) > 1:
        labels = np.array([categories.index(category) for (category, _, _), _ in chosen])
        dataset.labels, dataset.classes = labels[numbers].astype(np.int64), tuple(categories)
    lacking = sorted(set(categories) - {category for (category, _, _), _ in chosen})
    dataset.note = f"no {split} images of {', '.join(lacking)}" if lacking else ""
    return dataset


def _sources(home: Path) -> Sources:
    """Every category's folders; of one category, if `home` is a folder of its own."""
    if not home.is_dir():
        return {}
    single = FOLDER.fullmatch(home.name)
    found: Sources = {}
    for path in sorted(home.absolute().parent.iterdir() if single else home.iterdir()):
        match = FOLDER.fullmatch(path.name)
        if match and path.is_dir() and (not single or match["category"] == single["category"]):
            found[match["category"], match["split"], match["lmdb"] is not None] = path
    if single:  # of the two kinds, the one that was named
        found = {key: path for key, path in found.items() if key[2] == (single["lmdb"] is not None)}
    return found


def _open_folders(
    data: Data, split: str, fit: Fit, paths: list[Path]
) -> tuple[FileSet, np.ndarray]:
    """All images below some folders, and the number of the folder of each."""
    lists = [layouts.list_images(path) for path in paths]
    for path, names in zip(paths, lists, strict=True):
        if not len(names):
            wanted = "images (" + " ".join(layouts.SUFFIXES) + ")"
            raise DatasetMissing(missing_text(data, looked=(wanted, [path])))
    names = [
        os.fsencode(path.name) + b"/" + name
        for path, listed in zip(paths, lists, strict=True)
        for name in listed.tolist()
    ]
    numbers = np.repeat(np.arange(len(paths)), [len(listed) for listed in lists])
    folder, array = paths[0].parent, np.array(names, np.bytes_)
    return FileSet("lsun", split, fit, folder=folder, names=array), numbers


def _open_databases(
    data: Data, split: str, fit: Fit, paths: list[Path]
) -> tuple[LmdbSet, np.ndarray]:
    """All values of some LMDBs, and the number of the LMDB of each."""
    lists = []
    for path in paths:
        if not (path / "data.mdb").is_file():
            raise DatasetMissing(missing_text(data, looked=("data.mdb", [path])))
        make = lambda path=path: {"keys": _list_keys(path)}  # noqa: E731
        lists.append(kept(data.cache_folder(), "lmdb-1", path / "data.mdb", make)["keys"])
        if not len(lists[-1]):
            raise BadImage.of(path, "the database is empty: fetch it again")
    numbers = np.repeat(np.arange(len(paths), dtype=np.int32), [len(keys) for keys in lists])
    dataset = LmdbSet(
        *("lsun", split, fit),
        databases=np.array([os.fsencode(path.absolute()) for path in paths], np.bytes_),
        stamps=np.array([_stamp(path) for path in paths], np.int64),
        keys=np.concatenate(lists),
        numbers=numbers,
    )
    return dataset, numbers


def _list_keys(path: Path) -> np.ndarray:
    """All keys of an LMDB, in its order."""
    try:
        with _environment(path).begin() as transaction:
            keys = list(transaction.cursor().iternext(keys=True, values=False))
    except _lmdb().Error as error:
        raise BadImage.of(path / "data.mdb", error) from error
    return np.array(keys, dtype=np.bytes_)


def _stamp(path: Path) -> tuple[int, int]:
    stat = os.stat(path / "data.mdb")
    return stat.st_size, stat.st_mtime_ns


def _environment(path: Path) -> object:
    """The LMDB at a path, open for reading without locks, one for all threads; a fork inherits it,
    which is safe for want of locks and reader tables."""
    stat = os.stat(path / "data.mdb")
    state, key = (stat.st_ino, stat.st_size, stat.st_mtime_ns), str(path.resolve())
    opened = _environments.get(key)
    if opened is not None and opened[0] == state:
        return opened[1]
    with _opening:
        opened = _environments.get(key)
        if opened is None or opened[0] != state:
            if opened is not None:
                opened[1].close()
            options = {"readonly": True, "lock": False, "readahead": False}
            _environments[key] = opened = (state, _lmdb().open(key, **options))
    return opened[1]


def _lmdb() -> object:
    try:
        import lmdb
    except ImportError:
        raise ValueError(
            "LSUN's LMDBs are read with the package lmdb: pip install 'saddle[lsun]'"
        ) from None
    return lmdb
