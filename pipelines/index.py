"""What is known of every image file before it is decoded: is it whole, and how large is it?

A quick look at both ends of each file, once per content of a dataset, kept in the cache folder.
What looks wrong is decoded before it is called corrupt, so there are no false alarms. It guards
the pipelines that decode while training, and those whose decoders crash on what is no image.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.images import BadImage, Unreadable, check_pixels, decode, jpeg_frame
from pipelines.kept import UNREADABLE, write
from pipelines.pack import bar, cache_name
from pipelines.settings import Data
from pipelines.sources import EncodedSet

FORMAT = 1
CHUNK = 256
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Index:
    """sizes_N2: int32 (width, height), 0 where corrupt. plain_N: bool, a JPEG of one or three
    components or an 8-bit PNG without palette and transparency: what every decoder reads alike.
    bad: the corrupt rows and what is wrong with them."""

    sizes_N2: np.ndarray
    plain_N: np.ndarray
    bad: dict[int, str]


def open_index(dataset: EncodedSet, data: Data) -> Index:
    """The index of a dataset, looked up or made. Raises BadImage unless `data.on_error` is skip."""
    path = cache_name(dataset, data, f"index-{FORMAT}").with_suffix(".index.npz")
    index = _load(path, len(dataset))
    if index is None:
        index = _make(dataset, data, path)
    if len(index.bad) == len(dataset):
        raise BadImage(f"every image of {dataset.name} is corrupt; the first: {index.bad[0]}")
    if index.bad and data.on_error == "stop":
        raise BadImage(next(iter(index.bad.values())))
    return index


def _make(dataset: EncodedSet, data: Data, path: Path) -> Index:
    n = len(dataset)
    sizes_N2, plain_N, bad = np.zeros((n, 2), np.int32), np.zeros(n, bool), {}

    def look(rows: range) -> int:
        for row in rows:
            try:
                (*sizes_N2[row], plain_N[row]) = _look(dataset, row)
            except BadImage as error:
                bad[row] = error
        return len(rows)

    chunks = [range(i, min(i + CHUNK, n)) for i in range(0, n, CHUNK)]
    with bar(n, True, "checking") as advance, ThreadPoolExecutor(max(data.workers, 1)) as pool:
        for count in pool.map(look, chunks):
            advance(count)
    index = Index(sizes_N2, plain_N, {row: str(bad[row]) for row in sorted(bad)})
    if len(bad) < n and not any(isinstance(error, Unreadable) for error in bad.values()):
        _save(index, path)
    return index


def _look(dataset: EncodedSet, row: int) -> tuple[int, int, bool]:
    """(width, height, plain) of a file; BadImage if it is no whole image."""
    name = dataset.describe(row)
    size, head, tail = dataset.ends(row)
    if not size:
        raise BadImage.of(name, "the file is empty")
    if (frame := jpeg_frame(head)) and b"\xff\xd9" in tail:
        check_pixels(frame[:2], name)
        return *frame[:2], frame[2] in (1, 3)
    if head.startswith(PNG) and b"IEND" in tail and len(head) > 33:
        width, height = (int.from_bytes(head[i : i + 4], "big") for i in (16, 20))
        check_pixels((width, height), name)
        return width, height, head[24] == 8 and head[25] in (0, 2) and b"tRNS" not in head
    # another format, a trailer after the end marker, or broken: only decoding tells
    content = dataset.encoded(row)
    height, width, _ = decode(content, name, 3).shape
    return width, height, False


def _load(path: Path, n: int) -> Index | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            sizes_N2, plain_N = file["sizes"], file["plain"]
            bad = dict(zip(file["bad"].tolist(), file["causes"].tolist(), strict=True))
    except UNREADABLE:
        return None
    return Index(sizes_N2, plain_N, bad) if sizes_N2.shape == (n, 2) else None


def _save(index: Index, path: Path) -> None:
    """Keep it; where the cache folder cannot be written it is made again the next time."""
    rows = np.array(list(index.bad), np.int64)
    causes = np.array(list(index.bad.values())).astype(str)
    found = {"sizes": index.sizes_N2, "plain": index.plain_N, "bad": rows, "causes": causes}
    with contextlib.suppress(OSError):
        write(path, found)
