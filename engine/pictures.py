"""How do image tensors become picture files? Grids, strips, single pictures and animations.

Legend of suffixes: N images, C channels (1 or 3), H height, W width. Images are float tensors in
[-1, 1] on any device; values outside are clamped.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import make_grid

from engine.origin import Origin
from engine.whole import write_whole

NAN_COLOUR = (255, 0, 255)
"""Pixels that are not a number are painted magenta in grids, which no healthy sample shows."""

HEADER = 16
"""Pixels of a line of titles."""


def grid(
    images_NCHW: Tensor, columns: int | None = None, pad: int = 2, least: int = 512
) -> Image.Image:
    """All images in one RGB picture, row by row.

    images_NCHW: float (N, 1 or 3, H, W) in [-1, 1]. columns: images per row, default the smallest
    square that holds them. pad: pixels between images. least: tiny images are enlarged by a whole
    nearest-neighbour factor until the picture is at least this many pixels wide.
    """
    _check(images_NCHW)
    count, width = images_NCHW.shape[0], images_NCHW.shape[3]
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    room = least - pad * (columns + 1)
    factor = max(1, math.ceil(room / (columns * width)))
    pixels_N3HW = _paint_nan(images_NCHW)
    pixels_N3HW = pixels_N3HW.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    if count == 1:  # make_grid leaves a single image without its frame
        picture_3HW = torch.nn.functional.pad(pixels_N3HW[0], (pad,) * 4)
    else:
        picture_3HW = make_grid(pixels_N3HW, nrow=columns, padding=pad)
    return Image.fromarray(picture_3HW.permute(1, 2, 0).contiguous().numpy())


def strip(images_NCHW: Tensor, pad: int = 2, least: int = 512) -> Image.Image:
    """All images in one row, as for an interpolation; float (N, 1 or 3, H, W) in [-1, 1]."""
    return grid(images_NCHW, columns=images_NCHW.shape[0], pad=pad, least=least)


def headed(picture: Image.Image, titles: Sequence[str]) -> Image.Image:
    """The picture with a title over each of its columns, which are of one width."""
    whole = Image.new("RGB", (picture.width, picture.height + HEADER))
    whole.paste(picture, (0, HEADER))
    pen, each = ImageDraw.Draw(whole), picture.width / len(titles)
    for i, title in enumerate(titles):
        pen.text(((i + 0.5) * each, HEADER / 2), title, anchor="mm")
    return whole


def save(image: Image.Image, path: Path, origin: Origin | None = None) -> None:
    """Write a picture in the format of its suffix; the name never shows a half-written file.

    origin: of generated images, and only of them: the file is marked as generated.
    """
    buffer, suffix = io.BytesIO(), path.suffix.lower()
    options = origin.options(suffix) if origin else {}
    image.save(buffer, format=Image.registered_extensions()[suffix], **options)
    write_whole(path, buffer.getvalue())


def save_each(
    images_NCHW: Tensor, folder: Path, first: int = 0, origin: Origin | None = None
) -> list[Path]:
    """Write every image in its native size as folder/00000.png, 00001.png, ..., from `first` on.

    images_NCHW: float (N, 1 or 3, H, W) in [-1, 1]; one channel gives grey files. An image with
    values that are not a number raises ValueError, since a metric would read these files.
    origin: as for `save`; each file says its number too.
    """
    _check(images_NCHW)
    broken_N = images_NCHW.isnan().flatten(1).any(dim=1).cpu()
    if broken_N.any():
        raise ValueError(
            f"{int(broken_N.sum())} of {len(broken_N)} images hold values that are not a number; "
            "the network diverged: sample from an earlier checkpoint"
        )
    paths = []
    for number, pixels_CHW in enumerate(_bytes(images_NCHW), start=first):
        pixels_HWC = pixels_CHW.permute(1, 2, 0).contiguous().numpy()
        path = folder / f"{number:05d}.png"
        pixels = pixels_HWC.squeeze(2) if len(pixels_CHW) == 1 else pixels_HWC
        save(Image.fromarray(pixels), path, replace(origin, number=number) if origin else None)
        paths.append(path)
    return paths


def gif(
    frames: Tensor | Sequence[Tensor | Image.Image],
    path: Path,
    ms: int = 100,
    least: int = 256,
    origin: Origin | None = None,
) -> None:
    """Write an endless animation, each frame shown for `ms` milliseconds (GIF counts in tens).

    frames: float (N, 1 or 3, H, W) in [-1, 1], or a sequence of (C, H, W) images of that kind or
    of pictures, such as grids. Tensors are enlarged to at least `least` pixels in width.
    """
    if len(frames) == 0:
        raise ValueError(f"no frames to write to {path}: give at least one")
    pictures = [
        frame if isinstance(frame, Image.Image) else grid(frame[None], pad=0, least=least)
        for frame in frames
    ]
    buffer = io.BytesIO()
    options = origin.options(".gif") if origin else {}
    rest = pictures[1:]
    pictures[0].save(
        buffer, "GIF", save_all=True, append_images=rest, duration=ms, loop=0, **options
    )
    write_whole(path, buffer.getvalue())


def _check(images_NCHW: Tensor) -> None:
    """Refuse what is no batch of pictures."""
    shape = tuple(images_NCHW.shape)
    if len(shape) != 4 or shape[1] not in (1, 3) or 0 in shape:
        raise ValueError(f"expected images of shape (N, 1 or 3, H, W), not {shape}")


def _bytes(images_NCHW: Tensor) -> Tensor:
    """Float [-1, 1] to uint8 on the host; the inverse of the pipelines' x / 127.5 - 1."""
    images_NCHW = images_NCHW.detach().float().clamp(-1, 1)
    return ((images_NCHW + 1) * 127.5).round().to(torch.uint8).cpu()


def _paint_nan(images_NCHW: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) on the host, with every pixel that is not a number in magenta."""
    pixels_N3HW = _bytes(images_NCHW).expand(-1, 3, -1, -1)
    nan_N1HW = images_NCHW.isnan().any(dim=1, keepdim=True).cpu()
    colour_3 = torch.tensor(NAN_COLOUR, dtype=torch.uint8).view(1, 3, 1, 1)
    return torch.where(nan_N1HW, colour_3, pixels_N3HW)
