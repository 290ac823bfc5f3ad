"""How one image becomes uint8 (C, H, W) with the channels and the size that the recipe asks for.

Every decoder in `pipelines` goes through `read` and `Fit`, so all backends serve the same bytes.
"""

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError


class BadImage(Exception):
    """A file that cannot be decoded; the message names the file and the cause."""

    @classmethod
    def of(cls, name: str | os.PathLike, cause: Exception | str) -> "BadImage":
        """BadImage for a file, from what went wrong with it."""
        kind = f"{type(cause).__name__}: " if isinstance(cause, Exception) else ""
        return cls(f"cannot decode {os.fspath(name)}: {kind}{cause}")


@dataclass(frozen=True)
class Fit:
    """Centre crop, antialiased resize (PIL BILINEAR) and packing to uint8 (C, H, W)."""

    resolution: int
    channels: int
    crop: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what comes out."""
        return self.channels, self.resolution, self.resolution

    def __call__(self, image: Image.Image, name: str) -> np.ndarray:
        """uint8 (C, H, W) of a loaded image; ValueError if `crop` is larger than the image."""
        image = to_channels(image, self.channels)
        side = self.crop_of(image.size, name)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        if image.size != (side, side):
            image = image.crop((left, top, left + side, top + side))
        if side != self.resolution:
            size = (self.resolution, self.resolution)
            image = image.resize(size, Image.Resampling.BILINEAR)
        pixels = np.asarray(image, dtype=np.uint8).reshape(*image.size[::-1], self.channels)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def crop_of(self, size: tuple[int, int], name: str) -> int:
        """Side of the square to cut from an image of this (width, height)."""
        if self.crop is None:
            return min(size)
        if self.crop > min(size):
            raise ValueError(
                f"data.crop={self.crop} is larger than {name} ({size[0]}x{size[1]}): "
                "give a smaller one, or none for the largest centred square"
            )
        return self.crop


def read(path: Path, channels: int) -> Image.Image:
    """A loaded PIL image, mode L or RGB. Errors of the disk pass through; of the content: BadImage.

    EXIF orientation is not applied, as in torchvision. Truncated files raise: PIL's
    LOAD_TRUNCATED_IMAGES is never set.
    """
    content = path.read_bytes()
    if not content:
        raise BadImage.of(path, "the file is empty")
    # PIL's readers raise whatever a broken file makes them stumble over: OSError, SyntaxError,
    # ValueError, EOFError, struct.error, zlib.error, KeyError, DecompressionBombError ...
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
        return to_channels(image, channels)
    except UnidentifiedImageError as error:
        raise BadImage.of(path, "not an image") from error
    except Exception as error:
        raise BadImage.of(path, error) from error


def size_of(path: Path) -> tuple[int, int] | None:
    """(width, height) from the header alone; None if there is no telling."""
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError, SyntaxError):
        return None


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Mode L (one channel) or RGB (three) of an image of any mode.

    Alpha, also of a palette or a colour key, is composited over white; 16-bit grey is divided by
    257 and rounded; grey from colour is ITU-R 601 (PIL).
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((wide + 128) // 257).clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    elif image.mode not in ("L", "1", "P"):  # CMYK, LAB, YCbCr: grey is made from RGB
        image = image.convert("RGB")
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)
