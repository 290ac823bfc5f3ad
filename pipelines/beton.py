"""FFCV's file of a dataset, the .beton: where it lies, how it is written, checked and taken.

It is written here, in FFCV's format and with FFCV's types, and not by FFCV's own writer: there an
exception in a worker process hangs the parent for ever, and a JPEG is always encoded again.
As with the packed cache the .json beside it comes last, so that a half-written one is never taken,
and one that was killed goes on where it was.
"""

import contextlib
import importlib
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from pipelines.beton_file import IMAGE, Encoded, Layout
from pipelines.decoding import decode_all
from pipelines.images import BadImage, decode, jpeg_frame, resize
from pipelines.journal import Journal
from pipelines.order import shown
from pipelines.pack import (
    CacheUnusable,
    Pack,
    bar,
    cache_name,
    lock,
    naming,
    open_pack,
    pack_path,
    publish,
    refuse_foreign,
    rows_done,
)
from pipelines.settings import Data
from pipelines.sources import Dataset, EncodedSet

FORMAT = 1
PAGE = 1 << 21
"""Bytes of a page, at least (FFCV's own bound); an image lies within one page."""
QUALITY = 95
SOURCE, LEAST = 8, 512
"""A source JPEG is kept if its longer side is at most SOURCE times the stored one, or LEAST pixels:
FFCV decodes a batch into room for the largest image of all."""
PACKAGES = "g++ pkg-config python3-dev libturbojpeg0-dev libopencv-dev libgl1"
LAYERS = ("tbb", "omp")
"""numba's threading layers that two loaders may use at once; `workqueue` aborts the process."""


@dataclass(frozen=True)
class Beton:
    """form: raw or jpeg. rows: the row that each row shows, int64 (n,). skipped: the corrupt rows
    and what is wrong with them."""

    path: Path
    form: str
    rows: np.ndarray
    skipped: dict[int, str]


class Chunk(NamedTuple):
    """images: what is stored for each of the rows, None for a bad one. bad: what is wrong with
    those."""

    rows: range
    images: list[Encoded | None]
    bad: dict[int, str]


def missing() -> str:
    """What to install before FFCV can be imported, else "". The first call costs its import: 2 s,
    8 s from a cold disk."""
    try:
        with threads_kept():
            import numba

            if "NUMBA_THREADING_LAYER" not in os.environ:
                numba.config.THREADING_LAYER = "threadsafe"  # TBB, else OpenMP
            importlib.import_module("ffcv.loader")
            layer = numba.threading_layer()
    except (ImportError, OSError) as error:
        install = f"pip install 'saddle[ffcv]' after apt-get install {PACKAGES}"
        cause = "" if getattr(error, "name", "") == "ffcv" else f" ({error})"
        return f"--data.pipeline ffcv needs FFCV: {install}{cause}"
    except ValueError as error:  # numba has no layer of that kind
        if "threading layer" not in str(error):
            raise
        layer = str(error).splitlines()[0]
    if layer not in LAYERS:
        remedy = "apt-get install libtbb12 libgomp1, and leave NUMBA_THREADING_LAYER out"
        return f"--data.pipeline ffcv needs numba's threading layer tbb or omp ({layer}): {remedy}"
    return ""


@contextlib.contextmanager
def threads_kept() -> Iterator[None]:
    """Keep torch's number of threads, which FFCV sets for the whole process."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def beton_path(dataset: Dataset, data: Data) -> Path:
    """Where the .beton of a dataset at these settings lies, written or not."""
    return cache_name(dataset, data, f"beton-{data.beton}-{FORMAT}").with_suffix(".beton")


def open_beton(
    dataset: Dataset, data: Data, path: Path, say: Callable[[str], None], progress: bool
) -> Beton:
    """The .beton at `path`, written if need be by one process while others wait for it.

    Raises BadImage at a corrupt image unless `data.on_error` is skip, CacheUnusable, and ValueError
    naming a setting.
    """
    if why := missing():
        raise ValueError(why)
    if data.beton == "jpeg" and (dataset.fit.channels != 3 or dataset.fit.halves):
        kind = "side-by-side pairs" if dataset.fit.halves else "one channel"
        raise ValueError(f"--data.beton jpeg stores RGB images, not {kind}: take --data.beton raw")
    beton = load_beton(path, dataset)
    if beton is None:
        pack = None
        if data.beton == "raw":
            pack = open_pack(dataset, data, pack_path(dataset, data), say, progress)
        with lock(path, say):
            beton = load_beton(path, dataset)
            if beton is None:
                refuse_foreign(path)
                _build(dataset, data, path, pack, say, progress)
                beton = load_beton(path, dataset)
    if beton is None:
        raise CacheUnusable(f"{path} is not as it was written; remove it or change --data.cache")
    if beton.skipped and data.on_error == "stop":
        raise BadImage(next(iter(beton.skipped.values())))
    return beton


def load_beton(path: Path, dataset: Dataset) -> Beton | None:
    """The .beton at a path, or None if it is absent, half-written, damaged or of another dataset.

    Checked are its size and the CRC of all but the pixels, for FFCV follows the pointers in there
    without a look at where they lead.
    """
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        if (about["format"], about["count"]) != (FORMAT, len(dataset)):
            return None
        if about["bytes"] != path.stat().st_size or about["crc"] != _crc(path, about["pixels"]):
            return None
        bad = {int(row): str(cause) for row, cause in about["skipped"].items()}
        return Beton(path, about["form"], shown(len(dataset), set(bad)), bad)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def _crc(path: Path, pixels: Sequence[int]) -> int:
    """CRC-32 of what lies before and after the pixels: header, fields, metadata, allocations."""
    start, end = pixels
    with path.open("rb") as file:
        crc = zlib.crc32(file.read(start))
        file.seek(end)
        return zlib.crc32(file.read(), crc)


def _build(
    dataset: Dataset,
    data: Data,
    path: Path,
    pack: Pack | None,
    say: Callable[[str], None],
    progress: bool,
) -> None:
    """Write everything to a temporary file, read it back, give it its name; the lock is held."""
    n, began = len(dataset), time.perf_counter()
    with naming(path.parent):
        journal = Journal.open(path)
    done = int(rows_done(journal, n).sum())
    try:
        where = f"{done:,} of them there already from a killed writing" if done else "once"
        say(f"writing {n:,} images of {dataset.name} ({data.beton}) into {path}, {where}")
        layout = _layout(dataset, data.beton)
        _write(dataset, data, pack, layout, journal, progress)
        facts = {"format": FORMAT, "form": data.beton, **_finish(dataset, layout, journal)}
        publish(path, journal.path, dataset, facts)
    except Exception:
        journal.remove()  # a kill leaves it, to go on from; what went wrong may have been mended
        raise
    journal.remove()
    seconds = time.perf_counter() - began
    say(
        f"wrote and checked {n:,} images in {seconds:,.1f} s ({(n - done) / seconds:,.0f} images/s)"
    )


def _layout(dataset: Dataset, form: str) -> Layout:
    """raw: each image as an array of its shape, also grey ones, and pairs. jpeg: as a JPEG."""
    from ffcv.fields import NDArrayField, RGBImageField

    if form == "jpeg":
        return Layout(RGBImageField(), len(dataset), _jpeg_page(dataset))
    size, page = math.prod(dataset.fit.stored), PAGE
    while size > page or page % size > page // 8:  # no more than an eighth for nothing
        page *= 2
    return Layout(NDArrayField(np.dtype(np.uint8), dataset.fit.stored), len(dataset), page)


def _write(
    dataset: Dataset,
    data: Data,
    pack: Pack | None,
    layout: Layout,
    journal: Journal,
    progress: bool,
) -> None:
    """Write the rows that are not yet there, each chunk where the one before it ends."""
    todo = np.flatnonzero(~rows_done(journal, len(dataset)))
    work = _Copying(pack) if pack else _Encoding(dataset, data.on_error == "skip")
    workers = data.workers if isinstance(dataset, EncodedSet) and pack is None else 1
    begins = {fact["rows"][0]: fact["start"] for fact in journal.facts}
    ends = {fact["rows"][1]: fact["start"] + fact["bytes"] for fact in journal.facts}
    ends[0] = layout.start
    with bar(len(dataset), progress, "writing") as advance:
        advance(len(dataset) - len(todo))
        for rows, images, bad in decode_all(work, todo, workers):
            with naming(journal.path.parent):
                fact = layout.put(journal.file, images, ends[rows.start])
                end = ends[rows.stop] = fact["start"] + fact["bytes"]
                if begins.get(rows.stop, end) != end:
                    text = f"{journal.path} was begun with another version of the JPEG encoder"
                    raise CacheUnusable(f"{text}: the same command again begins anew")
                journal.note(fact | {"rows": [rows.start, rows.stop], "bad": bad})
            advance(len(rows))


def _finish(dataset: Dataset, layout: Layout, journal: Journal) -> dict[str, Any]:
    """Write the tables and read everything back; what the .json is to say of it."""
    n = len(dataset)
    bad = dict(sorted((int(r), why) for fact in journal.facts for r, why in fact["bad"].items()))
    if len(bad) == n:
        raise BadImage(f"every image of {dataset.name} is corrupt; the first: {bad[0]}")
    shows, images = shown(n, set(bad)), np.zeros(n, IMAGE)
    for fact in journal.facts:
        images[slice(*fact["rows"])] = np.frombuffer(bytes.fromhex(fact["images"]), IMAGE)
    with naming(journal.path.parent):
        pixels = layout.finish(journal.file, images, shows)
        os.fsync(journal.file.fileno())
    if not layout.same(journal.path, images["crc"][shows]):
        raise CacheUnusable(
            f"{journal.path} does not read back as it was written: is the disk sound?"
        )
    return {"pixels": pixels, "crc": _crc(journal.path, pixels), "skipped": bad}


class _Copying:
    """Takes chunks of rows from the packed cache as they are."""

    def __init__(self, pack: Pack) -> None:
        self.pack = pack

    def __call__(self, rows: range) -> Chunk:
        """Nothing is stored for a bad row, which points at the one shown in its place."""
        images_NHWC, skipped = self.pack.images_NHWC, self.pack.skipped
        height, width = images_NHWC.shape[1:3]
        images = [
            None if row in skipped else Encoded(images_NHWC[row].reshape(-1).data, width, height)
            for row in rows
        ]
        return Chunk(rows, images, {row: skipped[row] for row in rows if row in skipped})


class _Encoding:
    """Makes JPEGs of chunks of rows, in whatever process."""

    def __init__(self, dataset: Dataset, skip: bool) -> None:
        self.dataset, self.skip = dataset, skip

    def __call__(self, rows: range) -> Chunk:
        """Raises BadImage unless bad images are skipped, ValueError for a crop, OSError."""
        images, bad = [], {}
        for row in rows:
            try:
                images.append(_encode(self.dataset, row))
            except BadImage as error:
                if not self.skip:
                    raise
                images.append(None)
                bad[row] = str(error)
        return Chunk(rows, images, bad)


def _most(dataset: Dataset) -> int:
    return max(SOURCE * dataset.fit.side, LEAST)


def _jpeg_page(dataset: Dataset) -> int:
    return max(PAGE, 1 << (3 * _most(dataset) ** 2 - 1).bit_length())


def _encode(dataset: Dataset, row: int) -> Encoded:
    """The source file itself where FFCV's centre crop is the very square of the fit, else that
    square as a JPEG. Either way the source is decoded, which finds what is corrupt."""
    fit, name, most = dataset.fit, dataset.describe(row), _most(dataset)
    box = dataset.box(row) if isinstance(dataset, EncodedSet) else (0, 0, 0, 0)
    if box is not None and min(box[2] - box[0], box[3] - box[1]) <= fit.side:
        return _jpeg(dataset.decode(row))  # computed images, and squares that are not made smaller
    content = dataset.encoded(row)
    pixels_HWC = decode(content, name, fit.channels, fit.window)
    height, width = pixels_HWC.shape[:2]
    frame = jpeg_frame(content)
    whole = fit.crop is None and box is None and max(width, height) <= most
    if whole and frame and frame[2] == 3 and len(content) <= _jpeg_page(dataset):
        return Encoded(content, width, height)
    left, top, side = fit.squares((width, height), name, box)[0]
    square_HWC = pixels_HWC[top : top + side, left : left + side]
    return _jpeg(resize(square_HWC, min(side, most)))


def _jpeg(pixels_HWC: np.ndarray) -> Encoded:
    content = BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels_HWC))
    image.save(content, "JPEG", quality=QUALITY, subsampling=0)
    return Encoded(content.getvalue(), *image.size)
