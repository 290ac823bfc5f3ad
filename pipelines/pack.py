"""The packed cache: a dataset decoded once to uint8 (n, H, W, C) in an .npy file, memory-mapped.

The name carries a digest of the content and the settings; the .json beside it is written last, so
a half-written cache is never taken, and one that was killed goes on where it was. A row whose image
is corrupt (`--data.on-error=skip`) holds the next row that decodes, which is also what every other
pipeline serves in its place.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipelines.decoding import Decoding, decode_all
from pipelines.images import BadImage
from pipelines.journal import Journal
from pipelines.order import shown
from pipelines.settings import Data
from pipelines.sources import Dataset, EncodedSet

FORMAT = 2


class CacheUnusable(Exception):
    """The cache folder cannot be written, or holds a file of someone else's; the message names it
    and the setting."""


@dataclass(frozen=True)
class Pack:
    """images_NHWC: uint8, memory-mapped. rows: the row that each row shows, int64 (n,). skipped:
    the corrupt rows and what is wrong with them."""

    path: Path
    images_NHWC: np.ndarray
    rows: np.ndarray
    skipped: dict[int, str]


def cache_name(dataset: Dataset, data: Data, form: str) -> Path:
    """Where what is made of a dataset at these settings lies, without suffix; `form`: what it is
    and of which version."""
    fit = dataset.fit
    identity = [form, dataset.stamp(), *fit.stored, fit.crop, fit.window]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    name = f"{dataset.name}-{dataset.split}-{fit.side}x{fit.channels}-{digest}"
    return data.cache_folder() / name


def pack_path(dataset: Dataset, data: Data) -> Path:
    """Where the packed cache of a dataset at these settings lies, built or not."""
    return cache_name(dataset, data, f"packed-{FORMAT}").with_suffix(".npy")


def packed_bytes(dataset: Dataset) -> int:
    """Size of the packed images."""
    return len(dataset) * math.prod(dataset.fit.stored)


def open_pack(
    dataset: Dataset, data: Data, path: Path, say: Callable[[str], None], progress: bool
) -> Pack:
    """The packed cache, built if need be by one process while others wait for it.

    Raises BadImage at a corrupt image unless `data.on_error` is skip, and CacheUnusable.
    """
    pack = load(path, dataset)
    if pack is None:
        with lock(path, say):
            pack = load(path, dataset)
            if pack is None:
                refuse_foreign(path)
                _build(dataset, data, path, say, progress)
                pack = load(path, dataset)
    if pack is None:
        raise CacheUnusable(f"{path} is not as it was written; remove it or change --data.cache")
    if pack.skipped and data.on_error == "stop":
        raise BadImage(next(iter(pack.skipped.values())))
    return pack


def load(path: Path, dataset: Dataset) -> Pack | None:
    """The cache at a path, or None if it is absent, half-written or not of this shape."""
    shape = (len(dataset), *dataset.fit.stored)
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        if about["format"] != FORMAT or about["bytes"] != path.stat().st_size:
            return None
        # copy on write: torch wants writable memory, and nothing writes to it
        images_NHWC = np.load(path, mmap_mode="c", allow_pickle=False)
        bad = {int(row): cause for row, cause in about["skipped"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if images_NHWC.shape != shape or images_NHWC.dtype != np.uint8:
        return None
    return Pack(path, images_NHWC, shown(len(dataset), set(bad)), bad)


def refuse_foreign(path: Path) -> None:
    """CacheUnusable if a file is there that has no note of ours beside it."""
    if path.exists() and not path.with_suffix(".json").exists():
        raise CacheUnusable(
            f"{path} is there but was not made here (no {path.stem}.json beside it): move it away "
            "or name another folder by --data.cache"
        )


def _build(
    dataset: Dataset, data: Data, path: Path, say: Callable[[str], None], progress: bool
) -> None:
    """Decode everything to a temporary file, then give it its name; the lock is held."""
    n, size = len(dataset), packed_bytes(dataset)
    header = _header(n, dataset.fit.stored)
    began = time.perf_counter()
    with naming(path.parent):
        journal = Journal.open(path, header, size)
    done = int(rows_done(journal, n).sum())
    try:
        _check_space(path.parent, size * (n - done) // n)
        where = f"{done:,} of them there already from a killed packing" if done else "once"
        say(f"packing {n:,} images of {dataset.name} into {path} ({size / 1e6:,.0f} MB), {where}")
        _write(dataset, data, journal, len(header), progress)
        found = sorted((int(r), why) for fact in journal.facts for r, why in fact["bad"].items())
        bad = dict(found)
        if len(bad) == n:
            raise BadImage(f"every image of {dataset.name} is corrupt; the first: {bad[0]}")
        with naming(path.parent):
            journal.finish()
        _mend(journal.path, len(header), shown(n, set(bad)), dataset)
        publish(path, journal.path, dataset, {"format": FORMAT, "skipped": bad})
    except Exception:
        journal.remove()  # a kill leaves it, to go on from; what went wrong may have been mended
        raise
    journal.remove()
    seconds = time.perf_counter() - began
    say(f"packed {n:,} images in {seconds:,.1f} s ({(n - done) / seconds:,.0f} images/s)")


def _header(n: int, stored: tuple[int, int, int]) -> bytes:
    header = io.BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": (n, *stored)}
    np.lib.format.write_array_header_1_0(header, about)
    return header.getvalue()


def _check_space(folder: Path, size: int) -> None:
    with naming(folder):
        free = shutil.disk_usage(folder).free
        if free < size:
            text = f"{size / 1e6:,.0f} MB wanted, {free / 1e6:,.0f} MB free"
            raise OSError(errno.ENOSPC, text)


def _write(dataset: Dataset, data: Data, journal: Journal, start: int, progress: bool) -> None:
    """Write the rows that are not yet there. Raises BadImage if all images are corrupt."""
    todo = np.flatnonzero(~rows_done(journal, len(dataset)))
    work = Decoding(dataset, data.on_error == "skip", journal.path, start)
    with naming(data.cache_folder()), bar(len(dataset), progress) as advance:
        advance(len(dataset) - len(todo))
        workers = data.workers if isinstance(dataset, EncodedSet) else 1
        for fact in decode_all(work, todo, workers):
            journal.note(fact)
            advance(fact["rows"][1] - fact["rows"][0])


def rows_done(journal: Journal, n: int) -> np.ndarray:
    """bool (n,): the rows that are in the file."""
    there = np.zeros(n, bool)
    for fact in journal.facts:
        there[slice(*fact["rows"])] = True
    return there


def _mend(path: Path, start: int, shows: np.ndarray, dataset: Dataset) -> None:
    """Put the next good image in the place of each bad one."""
    row_bytes = math.prod(dataset.fit.stored)
    with naming(path.parent), path.open("r+b") as file:
        for row in np.flatnonzero(shows != np.arange(len(shows))):
            file.seek(start + int(shows[row]) * row_bytes)
            pixels = file.read(row_bytes)
            file.seek(start + int(row) * row_bytes)
            file.write(pixels)
        file.flush()
        os.fsync(file.fileno())


def publish(path: Path, temporary: Path, dataset: Dataset, facts: dict[str, Any]) -> None:
    """Rename a finished file into place, with the .json beside it that makes it count."""
    about = {
        "source": dataset.describe(0),
        "count": len(dataset),
        "bytes": temporary.stat().st_size,
        **facts,
    }
    note = path.with_suffix(".json.tmp")
    with naming(path.parent):
        with note.open("w") as file:
            json.dump(about, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        # the note first: a kill between the two leaves a note without its file, and no file without
        # a note, which would pass for someone else's
        path.unlink(missing_ok=True)
        os.replace(note, path.with_suffix(".json"))
        os.replace(temporary, path)


def say_skipped(skipped: dict[int, str], say: Callable[[str], None]) -> None:
    """Tell of the corrupt images, once."""
    if skipped:
        some = "; ".join(list(skipped.values())[:5])
        say(f"{len(skipped):,} corrupt images skipped: {some}")


@contextlib.contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Turn an error of the cache's disk into one that names the folder and the setting."""
    try:
        yield
    except OSError as error:
        cause = error.strerror or error
        text = f"cannot write the packed cache in {folder}: {cause}"
        raise CacheUnusable(
            f"{text}; --data.cache (or SADDLE_CACHE) names another folder"
        ) from error


@contextlib.contextmanager
def lock(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One builder at a time. flock: the kernel lets go of it when a builder is killed."""
    with naming(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_suffix(".lock").open("w")
    with file:
        with naming(path.parent):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process that packs {path.name}")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def bar(total: int, progress: bool, doing: str = "packing") -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal; elsewhere nothing, the lines before and after suffice."""
    if not (progress and sys.stderr.isatty()):
        yield lambda _: None
        return
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown_bar:
        task = shown_bar.add_task(doing, total=total)
        yield lambda count: shown_bar.advance(task, count)
