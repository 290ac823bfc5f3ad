"""Lists that are slow to make and that stay true while a file does not change."""

import contextlib
import hashlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]

UNREADABLE = (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile)
"""What a damaged .npz makes numpy raise; its checksums are those of a zip."""


def kept(folder: Path, kind: str, path: Path, make: Callable[[], Arrays]) -> Arrays:
    """The arrays that `make()` finds in the file `path`, from `folder` if they were found before.

    kind: what they are, with a version ("tar-1"); names the .npz together with the path, the size
    and the time of the file. A damaged one is made anew; one that cannot be written costs the next
    run some time, and nothing else.
    """
    stat = path.stat()
    state = f"{path.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    key = hashlib.sha256(os.fsencode(state)).hexdigest()[:24]
    place = folder / f"{kind}-{key}.npz"
    with contextlib.suppress(*UNREADABLE), np.load(place, allow_pickle=False) as arrays:
        if str(arrays["kind"]) == kind:
            return {name: arrays[name] for name in arrays.files if name != "kind"}
    found = make()
    with contextlib.suppress(OSError):
        write(place, {**found, "kind": np.array(kind)})
    return found


def write(place: Path, arrays: Arrays) -> None:
    """Write an .npz, whole or not at all. Raises OSError."""
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f".{place.stem}-", suffix=".part", dir=place.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
        os.replace(part, place)
    except BaseException:
        os.unlink(part)
        raise
