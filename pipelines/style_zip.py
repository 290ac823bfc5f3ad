"""A StyleGAN-style zip of a packed dataset: stored PNGs and dataset.json (Karras et al. 2021,
dataset_tool.py of stylegan3): 00000/img00000000.png, square, and the labels by name or null."""

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.pack import CacheUnusable, Pack, bar
from pipelines.sources import Dataset

THREADS, CHUNK = 2, 256


def write_zip(dataset: Dataset, pack: Pack, path: Path, say: Callable[[str], None]) -> Path:
    """Write the zip, without the corrupt rows, and read it back; its path.

    The images are decoded already, so that writing is quick and a killed one begins anew. Raises
    CacheUnusable if a file is there that is not this very zip, OSError for the disk.
    """
    refuse_another(pack.path, path)
    if path.exists():
        say(f"{path} is there already")
        return path
    # a name that nobody else takes
    temporary = path.with_name(f"{path.name}.{pack.path.stem}.part")
    rows = np.flatnonzero(pack.rows == np.arange(len(pack.rows)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(dataset, pack, rows, temporary, _mark(pack.path))
        with zipfile.ZipFile(temporary) as file:
            if (torn := file.testzip()) or len(file.namelist()) != len(rows) + 1:
                raise OSError(f"{temporary} does not hold what was written to it ({torn})")
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def refuse_another(packed: Path, path: Path) -> None:
    """CacheUnusable if a file is at `path` that is not the zip of this packed cache."""
    if path.exists() and _comment(path) != _mark(packed):
        raise CacheUnusable(f"{path} is there and is another file: move it away or change --out")


def _mark(packed: Path) -> bytes:
    """What the zip of a packed cache says of itself."""
    return f"saddle {packed.stem}".encode()


def _write(dataset: Dataset, pack: Pack, rows: np.ndarray, path: Path, mark: bytes) -> None:
    names = [f"{i // 1000:05}/img{i:08}.png" for i in range(len(rows))]
    labels = None
    if dataset.labels is not None:
        given = dataset.labels[rows].tolist()
        labels = [list(pair) for pair in zip(names, given, strict=True)]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file, bar(len(rows), True) as advance:
        for name, content in zip(names, _encoded(pack, rows), strict=True):
            file.writestr(name, content)
            advance(1)
        file.writestr("dataset.json", json.dumps({"labels": labels}))
        file.comment = mark
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _encoded(pack: Pack, rows: np.ndarray) -> Iterator[bytes]:
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(rows), CHUNK):  # in chunks: a pool's map takes all at once
            yield from pool.map(_png, (pack.images_NHWC[r] for r in rows[start : start + CHUNK]))


def _png(pixels_HWC: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels_HWC.squeeze()).save(content, "PNG", compress_level=0)
    return content.getvalue()


def _comment(path: Path) -> bytes | None:
    try:
        with zipfile.ZipFile(path) as file:
            return file.comment
    except (OSError, zipfile.BadZipFile):
        return None
