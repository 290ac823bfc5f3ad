"""Datasets inside archives: StyleGAN's zips, zips of image folders, WebDataset's tar shards.

The archives stay packed: each image is read by its place, so that any order of rows, and a run
resumed in the middle of an epoch, cost no more than a run through them.
"""

import hashlib
import io
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines import captions, layouts
from pipelines.images import BadImage, Fit, size_of
from pipelines.members import NONE, VECTOR, list_members
from pipelines.missing import DatasetMissing, NoSplit, missing_text
from pipelines.settings import Data
from pipelines.sources import ENDS, Captions, EncodedSet

ARCHIVE = re.compile(r".*\.(zip|tar|tgz|tar\.(gz|bz2|xz|zst))", re.IGNORECASE)
"""Names of archives; packed tars too, which are then refused by name and not passed over."""
SPLIT_WORD = re.compile(r"(?:^|[^a-z])(train|test|val)(?:ing|id|idation)?(?![a-z])")
OPEN_FILES = 128
"""Archives that a process keeps open, at most: shards can be thousands."""


class _Open:
    """An open file, closed with the last reference: a thread may still read what another evicts."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@dataclass
class ArchiveSet(EncodedSet):
    """Images in archives.

    archives: paths, bytes (a,). stamps: int64 (a, 2), size and time in ns when they were listed.
    names: of the members, bytes (n,). places: members.PLACE (n,).
    """

    archives: np.ndarray = None
    stamps: np.ndarray = None
    names: np.ndarray = None
    places: np.ndarray = None

    def __post_init__(self) -> None:
        """Find an impossible crop now, and not after the compile."""
        self._open: dict[int, _Open] = {}
        if self.fit.crop is not None and (size := size_of(io.BytesIO(self._stored(0)))):
            self.fit.squares(size, self.describe(0))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return len(self.names)

    def describe(self, row: int) -> str:
        archive = os.fsdecode(bytes(self.archives[self.places["archive"][row]]))
        return f"{archive}: {os.fsdecode(bytes(self.names[row]))}"

    def encoded(self, row: int) -> bytes:
        """The member's content, inflated; BadImage if its checksum is another, OSError if the
        archive has changed."""
        place, content = self.places[row], self._stored(row)
        if place["deflated"]:
            inflate = zlib.decompressobj(-15)
            try:
                content = inflate.decompress(content, int(place["size"]) + 1)
            except zlib.error as error:
                raise BadImage.of(self.describe(row), error) from error
        if len(content) != place["size"] or place["crc"] not in (-1, zlib.crc32(content)):
            raise BadImage.of(self.describe(row), "damaged: length or checksum is not the zip's")
        return content

    def ends(self, row: int) -> tuple[int, bytes, bytes]:
        place = self.places[row]
        if place["deflated"]:
            return super().ends(row)
        size = int(place["size"])
        tail = self._stored(row, max(size - ENDS[1], 0), ENDS[1])
        return size, self._stored(row, 0, ENDS[0]), tail

    def _stored(self, row: int, start: int = 0, count: int | None = None) -> bytes:
        """Bytes of a member as they lie in the archive."""
        place = self.places[row]
        stored, first = int(place["stored"]), int(place["offset"]) + start
        count = stored - start if count is None else min(count, stored - start)
        opened = self._archive(int(place["archive"]))
        content = os.pread(opened.descriptor, count, first)
        if len(content) != count:
            raise OSError(f"{self.describe(row)}: the archive ends before this member does")
        return content

    def _archive(self, number: int) -> _Open:
        """The archive, opened if need be. Without a lock, which a fork could leave locked: two
        threads may open a file twice, and one of the two is closed at once."""
        path = os.fsdecode(bytes(self.archives[number]))
        opened = self._open.get(number) or self._open.setdefault(number, _Open(path))
        for other in list(self._open)[:-OPEN_FILES]:
            self._open.pop(other, None)
        stat = os.fstat(opened.descriptor)
        if (stat.st_size, stat.st_mtime_ns) != tuple(self.stamps[number]):
            raise OSError(f"{path} has changed since this run listed it: start the run again")
        return opened

    def digest(self, times: bool) -> str:
        """From names and sizes of the archives, and what of them is used as what."""
        digest = hashlib.sha256()
        for number in np.unique(self.places["archive"]):
            digest.update(os.path.basename(bytes(self.archives[number])))
            digest.update(self.stamps[number, : 1 + times].tobytes())
        parts = [self.names, self.places, self.labels]
        parts += [] if self.captions is None else [self.captions.tokens_NKL]
        for part in parts:
            digest.update(b"\0" if part is None else np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


def holds_archives(path: Path) -> bool:
    """Whether a path is an archive, or a folder of archives, or of train/ and test/ with such.

    A folder that has image files too, at any depth, is an image folder, beside which someone left
    what it was unpacked from.
    """
    if path.is_file():
        return ARCHIVE.fullmatch(path.name) is not None
    folder = layouts.split_folder(path, "train")
    if folder is None or not _archives(folder):
        return False
    files = (name for _, _, names in os.walk(folder) for name in names)
    return not any(n.lower().endswith(layouts.SUFFIXES) and n[:1] != "." for n in files)


def open_archive(data: Data, split: str, fit: Fit) -> ArchiveSet:
    """The images of the archives at `data.path`. Raises DatasetMissing, NoSplit, and BadImage that
    names the archive and the member at fault."""
    paths, note = _of_split(data.path, "train")
    if not paths:
        wanted = "*.zip or *.tar (train*, test* beside each other, or in train/, test/)"
        raise DatasetMissing(missing_text(data, looked=(wanted, [data.path])))
    whole = _Listed(paths, [], data)
    tests = _of_split(data.path, "test")[0]
    if tests and (split == "test" or whole.captioned):  # words are numbered over both
        whole = _Listed(paths, tests, data)
    if not len(whole.names):
        wanted = "images (" + " ".join(layouts.SUFFIXES) + ")"
        raise DatasetMissing(missing_text(data, looked=(wanted, paths)))
    rows = whole.rows(split)
    if not len(rows):
        raise NoSplit(f"{data.path} has no {split} images (no {split} archives beside train)")
    labels, classes, told = whole.labelled()
    notes = [note, told, whole.lacking(rows)]
    return ArchiveSet(
        *(data.name, split, fit, None if labels is None else labels[rows], classes),
        "; ".join(text for text in notes if text),
        captions=whole.encoded_captions(rows),
        archives=whole.archives,
        stamps=whole.stamps,
        names=whole.names[rows],
        places=whole.places[rows],
    )


class _Listed:
    """The members of several archives, those for tests after the others."""

    def __init__(self, paths: list[Path], tests: list[Path], data: Data) -> None:
        self.tests_from = len(paths) if tests else None
        paths = [*paths, *tests]
        stats = [path.stat() for path in paths]
        self.parts = [list_members(path, data.cache_folder()) for path in paths]
        self.archives = np.array([os.fsencode(path.absolute()) for path in paths], np.bytes_)
        self.stamps = np.array([(s.st_size, s.st_mtime_ns) for s in stats], np.int64)
        self.names = np.concatenate([part.names for part in self.parts])
        self.places = np.concatenate([part.places for part in self.parts])
        counts = [len(part.names) for part in self.parts]
        self.places["archive"] = np.repeat(np.arange(len(paths)), counts)
        self.labels = np.concatenate([part.labels for part in self.parts])
        self.bare = all(part.bare for part in self.parts)
        self.has_caption = np.concatenate([part.captioned for part in self.parts])
        self.captioned = bool(self.has_caption.any())
        self.folders, self.splits = self._folders()

    def name(self, row: int) -> str:
        """Archive and member, for messages."""
        archive = os.fsdecode(bytes(self.archives[self.places["archive"][row]]))
        return f"{archive}: {os.fsdecode(bytes(self.names[row]))}"

    def _folders(self) -> tuple[np.ndarray, list[str] | None]:
        """Names as they count for classes, and the split of each row if folders inside say it."""
        if not self.bare:
            return self.names, None
        names = self.names.tolist()
        if self.tests_from is not None:
            first = int((self.places["archive"] < self.tests_from).sum())
            names = _without_common(names[:first]) + _without_common(names[first:])
            return np.array(names, np.bytes_), None
        names = _without_common(names)
        tops = [name.split(b"/", 1)[0] for name in names]
        known = {os.fsencode(n): s for s, ns in layouts.SPLIT_FOLDERS.items() for n in ns}
        if b"train" not in tops or not set(tops) <= known.keys():
            return np.array(names, np.bytes_), None
        names = [name.split(b"/", 1)[1] for name in names]
        return np.array(names, np.bytes_), [known[top] for top in tops]

    def rows(self, split: str) -> np.ndarray:
        """Rows of a split: by archive if some are for tests, else by the folders train and test
        inside, if there are no others, else all are for training."""
        if self.tests_from is not None:
            return np.flatnonzero((self.places["archive"] >= self.tests_from) == (split == "test"))
        return np.flatnonzero([of == split for of in self.splits or ["train"] * len(self.names)])

    def labelled(self) -> tuple[np.ndarray | None, tuple[str, ...], str]:
        """Labels of all rows, classes, and a note. Class folders count if nothing else is there."""
        if self.bare:
            return *layouts.class_labels(self.folders), ""
        missing = self.labels == NONE
        if missing.all():
            return None, (), ""
        vectors = self.labels == VECTOR
        for some, text in ((missing, "no label"), (vectors, "a list of numbers for a label")):
            if some.any() and not some.all():
                row = int(np.flatnonzero(some)[0])
                raise BadImage.of(self.name(row), f"{text}, where other images have a class")
        if vectors.all():
            return None, (), "labels that are lists of numbers are left out"
        classes = tuple(str(label) for label in range(int(self.labels.max()) + 1))
        return self.labels, classes, ""

    def encoded_captions(self, rows: np.ndarray) -> Captions | None:
        """One caption a row; the words are numbered over all rows, of whatever split."""
        if not self.captioned:
            return None
        if not self.has_caption.all():
            row = int(np.flatnonzero(~self.has_caption)[0])
            raise BadImage.of(self.name(row), "no caption (.txt), where other images have one")
        sentences = [captions.tokens(text) for part in self.parts for text in part.captions()]
        for row, sentence in enumerate(sentences):
            if not sentence:
                raise BadImage.of(self.name(row), "its caption (.txt) has no words: write one")
        words = captions.vocabulary(sentences)
        return captions.encode([[sentences[row]] for row in rows], words)

    def lacking(self, rows: np.ndarray) -> str:
        """A note of samples without an image, in the archives that these rows are from."""
        used = np.unique(self.places["archive"][rows])
        count = sum(int(self.parts[number].lacking) for number in used)
        return f"{count:,} samples without an image are left out" if count else ""


def _without_common(names: list[bytes]) -> list[bytes]:
    """Names without the folders that all of them are in, which say nothing of classes."""
    if not names:
        return names
    # what the first and the last name in order share, all between them share
    common = os.path.commonpath([os.path.dirname(name) for name in (min(names), max(names))])
    return [name[len(common) + 1 :] if common else name for name in names]


def _archives(folder: Path) -> list[Path]:
    """The archives in a folder, sorted by name."""
    paths = folder.iterdir() if folder.is_dir() else ()
    wanted = (p for p in paths if ARCHIVE.fullmatch(p.name) and not p.name.startswith("."))
    return sorted(path for path in wanted if path.is_file())


def _split_of(path: Path) -> str | None:
    """Which split an archive's name says it is."""
    found = SPLIT_WORD.search(path.name.lower())
    return None if found is None else "train" if found[1] == "train" else "test"


def _of_split(path: Path, split: str) -> tuple[list[Path], str]:
    """Archives of a split, by sub-folder or by name, and a note of those that were passed over.

    An archive given by itself is for training; for tests are those beside it that say so, if it
    says that it is not.
    """
    if path.is_file():
        if split == "train":
            return [path], ""
        beside = _archives(path.parent) if _split_of(path) == "train" else []
        return [p for p in beside if p.suffix == path.suffix and _split_of(p) == "test"], ""
    folder = layouts.split_folder(path, "train")
    if folder is not None and folder != path:
        folder = layouts.split_folder(path, split)
        return _archives(folder) if folder else [], ""
    archives = _archives(path)
    splits = [_split_of(archive) for archive in archives]
    if "train" not in splits:
        return archives if split == "train" else [], ""
    others = splits.count(None)
    note = f"{others} archives whose names say neither train nor test are left out"
    chosen = [a for a, of in zip(archives, splits, strict=True) if of == split]
    return chosen, note if others else ""
