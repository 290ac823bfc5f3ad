"""How one encoded image becomes uint8 (H, W, C) with the size and channels that a recipe asks for.

Everything that decodes goes through `Fit`, so that all pipelines serve the same bytes; DALI and
FFCV, which decode by themselves, are told the same squares.
"""

import functools
import importlib.util
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn.functional import interpolate

LIMIT = 89_478_485
"""Pixels of an image, at most (PIL's bound): more is taken for a decompression bomb."""
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""JPEG markers that begin a frame header (ITU-T T.81, table B.1)."""

RGB = 3
"""torchvision's ImageReadMode for three channels."""

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels."""


class BadImage(Exception):
    """A file that cannot be decoded; the message names the file and the cause."""

    @classmethod
    def of(cls, name: str | os.PathLike, cause: Exception | str) -> "BadImage":
        """BadImage for a file, from what went wrong with it."""
        kind = f"{type(cause).__name__}: " if isinstance(cause, Exception) else ""
        line = (str(cause).splitlines() or [""])[0]  # torchvision adds a trace of C++
        line = line.rsplit(", ", 1)[-1] if ".cpp:" in line else line
        return cls(f"cannot decode {os.fspath(name)}: {kind}{line}")


def with_remedy(error: Exception) -> str:
    """What a user is told: the error, and what can be done about a bad image."""
    remedy = "; --data.on-error skip leaves such images out" if isinstance(error, BadImage) else ""
    return f"{error}{remedy}"


class Unreadable(BadImage):
    """A file that the disk does not give; it may be mended without any change to its content."""

    @classmethod
    def of(cls, name: str | os.PathLike, cause: Exception | str) -> "Unreadable":
        """Unreadable for a file, from what the system says."""
        why = (cause.strerror or cause) if isinstance(cause, OSError) else cause
        gone = isinstance(cause, FileNotFoundError)
        return cls(
            f"cannot read {os.fspath(name)}: {why}"
            + (" (did the data folder change while it was in use?)" if gone else "")
        )


@dataclass(frozen=True)
class Fit:
    """Centred square, antialiased bilinear resize, uint8 (H, W, C).

    load: side of what is stored, from which a random `resolution` square is cut later; none stores
    `resolution` itself. halves: the image is a side-by-side pair, stored as one of twice the width.
    window: the values of 16-bit grey pixels that become 0 and 255; none takes all of 0 to 65535.
    """

    resolution: int
    channels: int
    crop: int | None = None
    load: int | None = None
    halves: bool = False
    window: tuple[int, int] | None = None

    @property
    def side(self) -> int:
        """Height of what is stored."""
        return self.load or self.resolution

    @property
    def stored(self) -> tuple[int, int, int]:
        """(H, W, C) of what is stored."""
        return self.side, self.side * (1 + self.halves), self.channels

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the networks see."""
        return self.channels, self.resolution, self.resolution

    @property
    def words(self) -> str:
        """Width, height and channels of what the networks see, for people and protocols."""
        return f"{self.resolution}x{self.resolution}x{self.channels}"

    def __call__(self, content: bytes, name: str, box: Box | None = None) -> np.ndarray:
        """uint8 `stored` of an encoded image, or of the box in it. Raises BadImage, and ValueError
        if `crop` is larger than the image."""
        return self.resized(decode(content, name, self.channels, self.window), name, box)

    def resized(self, pixels_HWC: np.ndarray, name: str, box: Box | None = None) -> np.ndarray:
        """uint8 `stored` of a decoded image."""
        squares = self.squares(pixels_HWC.shape[1::-1], name, box)
        parts = [resize(pixels_HWC[t : t + s, x : x + s], self.side) for x, t, s in squares]
        return np.ascontiguousarray(np.concatenate(parts, 1) if self.halves else parts[0])

    def squares(
        self, size: tuple[int, int], name: str, box: Box | None = None
    ) -> list[tuple[int, int, int]]:
        """(left, top, side) of the square that is kept of an image of this (width, height), or of
        one square in each half of a pair."""
        left, top, right, bottom = box or (0, 0, *size)
        if not self.halves:
            return [self._square((left, top, right, bottom), name)]
        half = (right - left) // 2
        if 4 * half < 3 * (bottom - top):
            text = f"{size[0]}x{size[1]} pixels are no pair of images side by side"
            raise BadImage.of(name, text)
        boxes = (left, top, left + half, bottom), (right - half, top, right, bottom)
        return [self._square(box, name) for box in boxes]

    def _square(self, box: Box, name: str) -> tuple[int, int, int]:
        left, top, width, height = box[0], box[1], box[2] - box[0], box[3] - box[1]
        side = self.crop or min(width, height)
        if side > min(width, height):
            raise ValueError(
                f"data.crop={self.crop} is larger than {name} ({width}x{height}): "
                "give a smaller one, or none for the largest centred square"
            )
        return left + (width - side) // 2, top + (height - side) // 2, side

    def shown(self, stored_NHWC: np.ndarray) -> np.ndarray:
        """uint8 (N, C, H, W) to look at or to measure: the middle `resolution` square, of a pair's
        left half."""
        start = (self.side - self.resolution) // 2
        middle = slice(start, start + self.resolution)
        return np.ascontiguousarray(stored_NHWC[:, middle, middle].transpose(0, 3, 1, 2))


def resize(pixels_HWC: np.ndarray, side: int) -> np.ndarray:
    """uint8 (side, side, C), bilinear with antialias; within 1 of PIL's, which it outruns."""
    if pixels_HWC.shape[:2] == (side, side):
        return pixels_HWC
    own = np.ascontiguousarray(pixels_HWC)
    if not own.flags.writeable:  # torch wants it so
        own = own.copy()
    return resize_batch(torch.from_numpy(own)[None], side)[0].numpy()


def resize_batch(images_NHWC: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 (N, side, side, C) of contiguous images. torch's kernel for channels_last needs 0.6 of
    the time; it takes that only where the batch's axis is there before the channels go first."""
    images_NCHW = images_NHWC.permute(0, 3, 1, 2)
    small_NCHW = interpolate(images_NCHW, (side, side), mode="bilinear", antialias=True)
    return small_NCHW.permute(0, 2, 3, 1)


def decode(
    content: bytes, name: str, channels: int, window: tuple[int, int] | None = None
) -> np.ndarray:
    """uint8 (H, W, C) of an encoded image; BadImage if it is none. EXIF rotation is not applied.

    Plain colour JPEGs by torchvision, whose bits are PIL's at twice the speed, the rest by PIL.
    """
    if not content:
        raise BadImage.of(name, "the file is empty")
    frame = jpeg_frame(content)
    # the decoders raise whatever a broken file makes them stumble over: OSError, SyntaxError,
    # RuntimeError, ValueError, EOFError, struct.error, zlib.error, KeyError ...
    try:
        if frame and channels == frame[2] == 3:
            check_pixels(frame[:2], name)
            encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            if decoder := _jpeg_decoder():
                return decoder(encoded, RGB, False).permute(1, 2, 0).numpy()
        return _by_pil(content, name, channels, window)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage.of(name, f"{error}".split(",")[0] + ": a decompression bomb?") from error
    except UnidentifiedImageError as error:
        raise BadImage.of(name, "not an image") from error
    except Exception as error:
        raise BadImage.of(name, error) from error


@functools.cache
def _jpeg_decoder() -> Callable[[torch.Tensor, int, bool], torch.Tensor] | None:
    """torchvision's operator, without the function around it, which is deprecated and warns at each
    image; None where a version has it no more.

    Its library alone where that is found: to import torchvision takes each process 2 s more.
    """
    spec = importlib.util.find_spec("torchvision")
    folders = spec.submodule_search_locations if spec else []
    libraries = [path for folder in folders for path in Path(folder).glob("image*.so")]
    try:
        torch.ops.load_library(str(libraries[0]))
    except (IndexError, OSError):
        import torchvision  # noqa: F401  (registers the operator)
    return getattr(torch.ops.image, "decode_jpeg", None)


def _by_pil(content: bytes, name: str, channels: int, window: tuple[int, int] | None) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        check_pixels(image.size, name)
        image.load()  # truncated files raise: PIL's LOAD_TRUNCATED_IMAGES is never set
        return pixels_of(image, channels, window)


def pixels_of(
    image: Image.Image, channels: int, window: tuple[int, int] | None = None
) -> np.ndarray:
    """uint8 (H, W, C) of a loaded PIL image of any mode (see `to_channels`)."""
    image = to_channels(image, channels, window)
    return np.asarray(image, dtype=np.uint8).reshape(*image.size[::-1], channels)


def check_pixels(size: tuple[int, int], name: str) -> None:
    """BadImage for an image of more than LIMIT pixels."""
    if size[0] * size[1] > LIMIT:
        text = f"{size[0]}x{size[1]} pixels are over the limit of {LIMIT:,}: a decompression bomb?"
        raise BadImage.of(name, text)


def jpeg_frame(content: bytes) -> tuple[int, int, int] | None:
    """(width, height, components) from a JPEG's frame header; None if there is none to be found."""
    if content[:3] != b"\xff\xd8\xff":
        return None
    at = 2
    while at + 9 < len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker in FRAMES:
            height, width = (int.from_bytes(content[at + i : at + i + 2], "big") for i in (5, 7))
            return width, height, content[at + 9]
        at += 1 if marker == 0xFF else 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return None


def size_of(path: Path) -> tuple[int, int] | None:
    """(width, height) from the header alone; None if there is no telling."""
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def sixteen_bits(content: bytes) -> bool:
    """Whether an encoded image's header says that its pixels are 16-bit grey."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.mode.startswith("I")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def to_channels(
    image: Image.Image, channels: int, window: tuple[int, int] | None = None
) -> Image.Image:
    """Mode L (one channel) or RGB (three) of an image of any mode.

    Alpha, also of a palette or a colour key, is composited over white; 16-bit grey is mapped
    linearly from `window` to 0 to 255 and rounded; grey from colour is ITU-R 601 (PIL).
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):
        low, high = window or (0, 65535)
        wide = (np.asarray(image).astype(np.int64) - low) * 255
        scaled = (wide + (high - low) // 2) // (high - low)
        image = Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    elif image.mode not in ("L", "1", "P"):  # CMYK, LAB, YCbCr: grey is made from RGB
        image = image.convert("RGB")
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)
