"""How does a file appear whole? Written under a temporary name, then renamed. No torch here."""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it, so that a reader sees old or new.

    There is no fsync: pictures and pages can be made again, and one must not stall the loop.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
