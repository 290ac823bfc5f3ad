"""How does a file appear whole? Written under a temporary name, then renamed. No torch here."""

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it, so that a reader sees old or new.

    There is no fsync: pictures and pages can be made again, and one must not stall the loop.
    Raises OSError that names this path, not the temporary one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _refusal(path, error) from error


def check_place(path: Path) -> None:
    """Raise OSError, as `write_whole` would, where no file can be made; it leaves nothing there.

    For before the work; a permission bit says too little, so the nearest folder is tried.
    """
    folder = next(place for place in path.absolute().parents if place.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _refusal(path, error) from error


def _refusal(path: Path, error: OSError) -> OSError:
    reason = error.strerror or str(error)
    return OSError(f"cannot write {path} ({reason}); make it writable, or name another place")
