"""How do picture files get into the page? As data addresses, small, and encoded only once."""

import base64
import functools
import io
import math
from pathlib import Path

from PIL import Image

from engine.report.read import Json

MAX_FRAMES = 32
"""Sample grids in a page, so that it stays small enough to send by mail."""
MAX_WIDTH = 1024
"""Pixels of an embedded picture; wider ones are reduced."""
SMALL_PNG = 24_000
"""Bytes below which a PNG goes in as it is, without loss."""


def film(run_dir: Path, notes: list[str]) -> Json:
    """The film of sample grids and the reals; `notes` hears of what cannot be read."""
    found = sample_paths(run_dir)
    frames = [
        {"images": int(path.stem), "picture": picture}
        for path in spread(found)
        if (picture := embed(path, notes))
    ]
    return {"frames": frames, "found": len(found), "reals": embed(run_dir / "reals.png", notes)}


def sample_paths(run_dir: Path) -> list[Path]:
    """The sample grids of a run, oldest first."""
    return sorted(path for path in run_dir.glob("samples/*.png") if path.stem.isdigit())


def spread(paths: list[Path]) -> list[Path]:
    """At most MAX_FRAMES of them, evenly spaced, with the first and the last.

    The spacing is a power of two, so that a growing run keeps the frames that it has encoded.
    """
    spacing = 1
    while math.ceil(len(paths) / spacing) >= MAX_FRAMES:
        spacing *= 2
    chosen = paths[::spacing]
    return chosen if not paths or chosen[-1] == paths[-1] else [*chosen, paths[-1]]


def embed(path: Path, notes: list[str]) -> str | None:
    """A picture file as a data address; None where there is none, with a note if it is torn."""
    try:
        state = path.stat()
        return _encode(path, state.st_mtime_ns, state.st_size)
    except FileNotFoundError:
        return None
    except OSError as error:
        place = f"{path.parent.name}/{path.name}" if path.parent.name == "samples" else path.name
        notes.append(f"{place} could not be read: {error}")
        return None


@functools.lru_cache(maxsize=4 * MAX_FRAMES)
def _encode(path: Path, changed_ns: int, size: int) -> str:
    """The address of a file in this state; kept, since a page is rewritten many times."""
    return as_address(path.read_bytes())


def as_address(content: bytes) -> str:
    """Small PNG files as they are, others as JPEG with their mark of origin (XMP).

    JPEG, because encoding a 528-pixel grid takes 6 ms, against 14 ms for WebP of similar quality.
    """
    kind, picture = "png", Image.open(io.BytesIO(content))
    picture.load()  # a torn file must not get through
    if len(content) > SMALL_PNG:
        mark = picture.info.get("XML:com.adobe.xmp")
        options = {"xmp": mark.encode()} if mark else {}
        picture.thumbnail((MAX_WIDTH, 4 * MAX_WIDTH))
        buffer, kind = io.BytesIO(), "jpeg"
        picture.convert("RGB").save(buffer, "JPEG", quality=87, **options)
        content = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
