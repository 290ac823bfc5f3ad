"""FFCV's file of a dataset, the .beton: where it lies, how it is written, checked and taken.

It is written here, in FFCV's format and with FFCV's types, and not by FFCV's own writer: there an
exception in a worker process hangs the parent for ever, and a JPEG is always encoded again.
As with the packed cache the .json beside it comes last, so that a half-written one is never taken.
"""

import contextlib
import importlib
import json
import math
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image

from pipelines.images import BadImage, decode, jpeg_frame, resize
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
)
from pipelines.settings import Data
from pipelines.sources import Dataset, EncodedSet

FORMAT = 1
CHUNK = 64
"""Images a thread encodes at a time."""
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


class Encoded(NamedTuple):
    """One image as it is stored; `pixels` is a JPEG, or uint8 rows."""

    pixels: bytes | memoryview
    width: int
    height: int


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


def _crc(path: Path, pixels: list[int]) -> int:
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
    n, temporary = len(dataset), path.with_suffix(".beton.part")
    began = time.perf_counter()
    say(f"writing {n:,} images of {dataset.name} ({data.beton}) into {path}, once")
    try:
        with naming(path.parent):
            file = temporary.open("w+b")
        with file, bar(n, progress, "writing") as advance:
            if pack is not None:
                writer, bad = _write_raw(pack, file, advance)
            else:
                writer, bad = _write_jpeg(dataset, data, file, advance)
            with naming(path.parent):
                writer.finish()
                os.fsync(file.fileno())
        _verify(temporary, writer)
        pixels = [writer.start, writer.end]
        facts = {"format": FORMAT, "form": data.beton, "pixels": pixels}
        facts |= {"crc": _crc(temporary, pixels), "skipped": bad}
        publish(path, temporary, dataset, facts)
    finally:
        temporary.unlink(missing_ok=True)
    seconds = time.perf_counter() - began
    say(f"wrote and checked {n:,} images in {seconds:,.1f} s ({n / seconds:,.0f} images/s)")


class _Writer:
    """FFCV's file: header, fields, metadata, pages of pixels, table of allocations."""

    def __init__(self, file: BinaryIO, image: Any, n: int, page: int) -> None:
        from ffcv import types
        from ffcv.fields import IntField

        self.fields, self.page = {"image": image, "index": IntField()}, page
        self.metadata = np.zeros(n, types.get_metadata_type(list(self.fields.values())))
        self.allocations = np.zeros(n, types.ALLOC_TABLE_TYPE)
        self.crcs = np.zeros(n, np.uint32)
        self._file, self._count = file, 0
        self._tables = types.HeaderType.itemsize + len(self.fields) * types.FieldDescType.itemsize
        self.start = self.end = -(-(self._tables + self.metadata.nbytes) // page) * page
        file.seek(self.end)

    def add(self, row: int, image: Encoded) -> int:
        """Store an image as that of `row`; gives its address."""
        size = len(image.pixels)
        assert size <= self.page
        if self.end // self.page != (self.end + size - 1) // self.page:
            self.end = -(-self.end // self.page) * self.page
            self._file.seek(self.end)
        address = self.end
        self._file.write(image.pixels)
        self.end += size
        self.allocations[self._count] = row, address, size
        self.crcs[row] = zlib.crc32(image.pixels)
        self._count += 1
        return address

    def finish(self) -> None:
        """Write the tables round the pixels."""
        from ffcv import types

        known = {kind: number for number, kind in types.TYPE_ID_HANDLER.items()}
        described = np.zeros(len(self.fields), types.FieldDescType)
        for about, (name, field) in zip(described, self.fields.items(), strict=True):
            about["type_id"] = known[type(field)]
            about["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
            about["arguments"][:] = field.to_binary()[0]
        self.end = -(-self.end // self.page) * self.page
        self._file.seek(self.end)
        self._file.write(self.allocations[: self._count].tobytes())
        header = np.zeros(1, types.HeaderType)
        header[0] = types.CURRENT_VERSION, len(described), self.page, len(self.metadata), self.end
        self._file.seek(0)
        self._file.write(header.tobytes() + described.tobytes() + self.metadata.tobytes())
        self._file.flush()


def _write_raw(
    pack: Pack, file: BinaryIO, advance: Callable[[int], None]
) -> tuple[_Writer, dict[int, str]]:
    """Every row of the packed cache, as an array of its shape: also grey images, and pairs."""
    from ffcv.fields import NDArrayField

    n, *shape = pack.images_NHWC.shape
    size, page = math.prod(shape), PAGE
    while size > page or page % size > page // 8:  # no more than an eighth for nothing
        page *= 2
    writer = _Writer(file, NDArrayField(np.dtype(np.uint8), tuple(shape)), n, page)
    for row in range(n):
        image = Encoded(pack.images_NHWC[row].reshape(-1).data, shape[1], shape[0])
        with naming(pack.path.parent):
            writer.metadata[row] = writer.add(row, image), pack.rows[row]
        if row % CHUNK == CHUNK - 1 or row == n - 1:
            advance(row % CHUNK + 1)
    return writer, pack.skipped


def _write_jpeg(
    dataset: Dataset, data: Data, file: BinaryIO, advance: Callable[[int], None]
) -> tuple[_Writer, dict[int, str]]:
    """Every row as a JPEG; a bad one points at the pixels of the one that is shown in its place."""
    from ffcv.fields import RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES

    n, mode, bad = len(dataset), IMAGE_MODES["jpg"], {}
    writer = _Writer(file, RGBImageField(), n, _jpeg_page(dataset))
    for first, images, wrong in _encoded(dataset, data):
        bad |= wrong
        for row, image in enumerate(images, first):
            if image is not None:
                with naming(data.cache_folder()):
                    address = writer.add(row, image)
                writer.metadata[row] = (mode, image.width, image.height, address), row
        advance(len(images))
    if len(bad) == n:
        raise BadImage(f"every image of {dataset.name} is corrupt; the first: {bad[0]}")
    rows = shown(n, set(bad))
    writer.metadata, writer.crcs = writer.metadata[rows], writer.crcs[rows]
    return writer, bad


def _most(dataset: Dataset) -> int:
    return max(SOURCE * dataset.fit.side, LEAST)


def _jpeg_page(dataset: Dataset) -> int:
    return max(PAGE, 1 << (3 * _most(dataset) ** 2 - 1).bit_length())


def _encoded(
    dataset: Dataset, data: Data
) -> Iterator[tuple[int, list[Encoded | None], dict[int, str]]]:
    """Chunks of rows in order, a few ahead of the writer: first row, images, what is wrong.

    Threads: the decoders and PIL's encoder let go of the interpreter.
    """
    threads = max(1, data.workers)
    pending: deque[Future] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
    try:
        for first in range(0, len(dataset), CHUNK):
            rows = range(first, min(first + CHUNK, len(dataset)))
            pending.append(pool.submit(_encode_chunk, dataset, rows, data.on_error == "skip"))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _encode_chunk(
    dataset: Dataset, rows: Iterable[int], skip: bool
) -> tuple[int, list[Encoded | None], dict[int, str]]:
    images, bad = [], {}
    for row in rows:
        try:
            images.append(_encode(dataset, row))
        except BadImage as error:
            if not skip:
                raise
            images.append(None)
            bad[row] = str(error)
    return rows[0], images, bad


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


def _verify(path: Path, writer: _Writer) -> None:
    """Read every row back as FFCV does and compare. Raises CacheUnusable."""
    from ffcv.reader import Reader

    reader = Reader(str(path))
    table = reader.alloc_table
    size_of = dict(zip(table["ptr"].tolist(), table["size"].tolist(), strict=True))
    image_N = reader.metadata["f0"]
    address_N = image_N["data_ptr"] if image_N.dtype.names else image_N
    content = np.memmap(path, np.uint8, "r")
    good = np.array_equal(reader.metadata, writer.metadata)
    for address, crc in zip(address_N.tolist(), writer.crcs.tolist(), strict=True):
        good = good and zlib.crc32(content[address : address + size_of[address]]) == crc
    if not good:
        raise CacheUnusable(f"{path} does not read back as it was written: is the disk sound?")
