"""The packed cache: a dataset decoded once to uint8 (n, C, H, W) in an .npy file, memory-mapped.

The name carries a digest of the content and the settings; the .json beside it is written last, so
a half-written cache is never taken. A row whose image is corrupt (`--data.on-error=skip`) holds
the next row that decodes, which is also what the torchvision pipeline serves in its place.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipelines.images import BadImage
from pipelines.settings import Data
from pipelines.sources import Dataset

FORMAT = 1
CHUNK = 64
"""Images a thread decodes at a time."""


class CacheUnusable(Exception):
    """The cache folder cannot be written; the message names it and the setting."""


@dataclass(frozen=True)
class Pack:
    """images_NCHW: uint8, memory-mapped. rows: the row that each row shows, int64 (n,)."""

    path: Path
    images_NCHW: np.ndarray
    rows: np.ndarray
    skipped: tuple[str, ...]


def pack_path(dataset: Dataset, data: Data) -> Path:
    """Where the packed cache of a dataset at these settings lies, built or not."""
    fit = dataset.fit
    identity = [FORMAT, dataset.fingerprint(), *fit.shape, fit.crop]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    name = f"{dataset.name}-{dataset.split}-{fit.resolution}x{fit.channels}-{digest}.npy"
    return data.cache_folder() / name


def packed_bytes(dataset: Dataset) -> int:
    """Size of the packed images."""
    return len(dataset) * math.prod(dataset.fit.shape)


def open_pack(
    dataset: Dataset, data: Data, path: Path, say: Callable[[str], None], progress: bool
) -> Pack:
    """The packed cache, built if need be by one process while others wait for it.

    Raises BadImage at a corrupt image unless `data.on_error` is skip, and CacheUnusable.
    """
    pack = load(path, dataset)
    if pack is None:
        with _lock(path, say):
            pack = load(path, dataset)
            if pack is None:
                _build(dataset, data, path, say, progress)
                pack = load(path, dataset)
    if pack is None:
        raise CacheUnusable(f"{path} is not as it was written; remove it or change --data.cache")
    if pack.skipped and data.on_error == "stop":
        raise BadImage(pack.skipped[0])
    return pack


def load(path: Path, dataset: Dataset) -> Pack | None:
    """The cache at a path, or None if it is absent, half-written or not of this shape."""
    shape = (len(dataset), *dataset.fit.shape)
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        if about["format"] != FORMAT or about["bytes"] != path.stat().st_size:
            return None
        # copy on write: torch wants writable memory, and nothing writes to it
        images_NCHW = np.load(path, mmap_mode="c", allow_pickle=False)
        bad = {int(row): cause for row, cause in about["skipped"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if images_NCHW.shape != shape or images_NCHW.dtype != np.uint8:
        return None
    return Pack(path, images_NCHW, _shown(len(dataset), bad), tuple(bad.values()))


def _shown(n: int, bad: dict[int, str]) -> np.ndarray:
    """The row that each row shows, int64 (n,): itself, or for a bad one the next that is not."""
    rows = np.arange(n)
    for row in bad:
        while rows[row] in bad:
            rows[row] = (rows[row] + 1) % n
    return rows


def _build(
    dataset: Dataset, data: Data, path: Path, say: Callable[[str], None], progress: bool
) -> None:
    """Decode everything to a temporary file, then give it its name; the lock is held."""
    n, size = len(dataset), packed_bytes(dataset)
    temporary = path.with_suffix(".npy.tmp")
    began = time.perf_counter()
    with _naming(path.parent):
        free = shutil.disk_usage(path.parent).free
        if free < size:
            text = f"{size / 1e6:,.0f} MB wanted, {free / 1e6:,.0f} MB free"
            raise OSError(errno.ENOSPC, text)
    say(f"packing {n:,} images of {dataset.name} into {path} ({size / 1e6:,.0f} MB), once")
    try:
        with _naming(path.parent):
            file = temporary.open("w+b")
        with file:
            bad = _write(dataset, data, file, progress)
            with _naming(path.parent):
                file.flush()
                os.fsync(file.fileno())
        _publish(dataset, path, temporary, bad)
    finally:
        temporary.unlink(missing_ok=True)
    seconds = time.perf_counter() - began
    say(f"packed {n:,} images in {seconds:,.1f} s ({n / seconds:,.0f} images/s)")


def _write(dataset: Dataset, data: Data, file: BinaryIO, progress: bool) -> dict[int, str]:
    """Write header and rows; return the bad rows with what is wrong, all of it in row order."""
    n, row_bytes, bad = len(dataset), math.prod(dataset.fit.shape), {}
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, *dataset.fit.shape)}
    np.lib.format.write_array_header_1_0(file, header)
    start = file.tell()
    with _bar(n, progress) as advance:
        for pixels_NCHW, wrong in _decoded(dataset, data):
            bad |= wrong
            with _naming(data.cache_folder()):
                # write, not a memory map: on a full disk a map kills the process by SIGBUS
                file.write(pixels_NCHW.data)
            advance(len(pixels_NCHW))
    if len(bad) == n:
        raise BadImage(f"every image of {dataset.name} is corrupt; the first: {bad[0]}")
    shown = _shown(n, bad)
    for row in bad:
        with _naming(data.cache_folder()):
            file.seek(start + int(shown[row]) * row_bytes)
            pixels = file.read(row_bytes)
            file.seek(start + row * row_bytes)
            file.write(pixels)
    return bad


def _decoded(dataset: Dataset, data: Data) -> Iterator[tuple[np.ndarray, dict[int, str]]]:
    """Chunks of decoded images in row order, a few ahead of the writer.

    Threads: PIL lets go of the interpreter while it decodes and resizes, and there is no start-up
    and no copy between processes.
    """
    threads = max(1, data.workers)
    chunks = (range(i, min(i + CHUNK, len(dataset))) for i in range(0, len(dataset), CHUNK))
    pending: deque[Future] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        for chunk in chunks:
            pending.append(pool.submit(_decode_chunk, dataset, chunk, data.on_error == "skip"))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _decode_chunk(dataset: Dataset, rows: range, skip: bool) -> tuple[np.ndarray, dict[int, str]]:
    pixels_NCHW = np.zeros((len(rows), *dataset.fit.shape), np.uint8)
    bad = {}
    for place, row in enumerate(rows):
        try:
            pixels_NCHW[place] = dataset.decode(row)
        except BadImage as error:
            if not skip:
                raise
            bad[row] = str(error)
    return pixels_NCHW, bad


def _publish(dataset: Dataset, path: Path, temporary: Path, bad: dict[int, str]) -> None:
    """Rename the images into place, then write the .json that makes them count."""
    about = {
        "format": FORMAT,
        "source": dataset.describe(0),
        "count": len(dataset),
        "bytes": temporary.stat().st_size,
        "skipped": bad,
    }
    note = path.with_suffix(".json.tmp")
    with _naming(path.parent):
        path.with_suffix(".json").unlink(missing_ok=True)
        os.replace(temporary, path)
        with note.open("w") as file:
            json.dump(about, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(note, path.with_suffix(".json"))


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
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
def _lock(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One builder at a time. flock: the kernel lets go of it when a builder is killed."""
    with _naming(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_suffix(".lock").open("w")
    with file:
        with _naming(path.parent):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process that packs {path.name}")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal; elsewhere nothing, the lines before and after suffice."""
    if not (progress and sys.stderr.isatty()):
        yield lambda _: None
        return
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("packing", total=total)
        yield lambda count: bar.advance(task, count)
