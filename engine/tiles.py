"""Large images through a network in squares, so that memory does not grow with the image.

Each square is taken with what around it the network looks at. So every pixel comes of the same
numbers as with the whole image, also at the image's own borders, where the squares end as it does;
what differs is the rounding of sums in another order.

Shapes: N images, C channels, H height, W width.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.translation import Translation

SIDE = 256
"""Of the squares: 16 residual blocks look 40 pixels around them, so this costs 1.7 times the work
of the whole image."""


def check_side(side: int | None, kind: Translation) -> None:
    """Raise ValueError where --tile is no side, or the model cannot be taken through squares."""
    if side is not None and side < 0:
        raise ValueError(f"--tile {side} must not be negative")
    if side and kind.reach is None:
        raise ValueError("--tile is for models that look at a part of the image: leave it out")


def padded(images_NCHW: Tensor, multiple: int, least: int = 1) -> Tensor:
    """With more below and on the right, by reflection where there is enough to reflect, so that
    height and width are multiples of that, and at least so large."""
    height, width = images_NCHW.shape[2:]
    wide, high = padded_side(width, multiple, least), padded_side(height, multiple, least)
    right, below = wide - width, high - height
    mode = "reflect" if right < width and below < height else "replicate"
    return F.pad(images_NCHW, (0, right, 0, below), mode)


def padded_side(side: int, multiple: int, least: int) -> int:
    """What height or width becomes."""
    return max(side + -side % multiple, least)


def in_tiles(
    make: Callable[[Tensor], Tensor], images_NCHW: Tensor, kind: Translation, side: int | None
) -> Tensor:
    """make(images), (N, C, scale H, scale W) on the host, from squares of `side` pixels (none:
    SIDE, 0: the whole images)."""
    side = SIDE if side is None else side
    if not side or kind.reach is None or max(images_NCHW.shape[2:]) <= side:
        return make(images_NCHW).cpu()
    scale, (height, width) = kind.scale, images_NCHW.shape[2:]
    rows = []
    for top in range(0, height, side):
        row = []
        for left in range(0, width, side):
            down, down_kept = _window(top, side, height, kind)
            right, right_kept = _window(left, side, width, kind)
            row.append(make(images_NCHW[:, :, down, right])[:, :, down_kept, right_kept].cpu())
        rows.append(torch.cat(row, 3))
    made_NCHW = torch.cat(rows, 2)
    assert made_NCHW.shape[2:] == (scale * height, scale * width)
    return made_NCHW


def _window(start: int, side: int, length: int, kind: Translation) -> tuple[slice, slice]:
    """What is given of an axis for the pixels from `start` on, and what is kept of what is made."""
    first, end = max(start - kind.reach, 0), min(start + side, length)
    kept = slice(kind.scale * (start - first), kind.scale * (end - first))
    return slice(first, min(end + kind.reach, length)), kept
