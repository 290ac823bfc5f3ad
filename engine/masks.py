"""Where are the holes of an image? Boxes and free-form strokes, as functions of its position.

Strokes are those of Yu et al. 2019, "Free-form image inpainting with gated convolution",
https://arxiv.org/abs/1806.03589, algorithm 1: a brush goes from a random place on in straight
lines of random lengths, at an angle that turns back at every other one, and the whole is mirrored
at random. Ranges, which the algorithm leaves open, and boxes are those of the authors' code
(generative_inpainting, inpaint_ops.py), given there for 256x256 pixels.

Everything is drawn by Philox from (key, stream, position): the same on any number of ranks, after a
resume and on every device, in fixed shapes.

Shapes: N images, S strokes of an image, L lines of a stroke, H height, W width. Lengths are in
pixels; x goes right, y down.
"""

import math

import torch
from torch import Tensor

from kernels import philox

STROKES = 3
"""Of an image, at most; at least 1."""
LINES = 4, 11
"""Of a stroke, at least and at most."""
ANGLE, TURN = 2 * math.pi / 5, 2 * math.pi / 15
"""Angle of a stroke's lines, and by how much they may differ from it on either side."""
BRUSH = 12 / 256, 40 / 256
"""Least and largest width of a brush, of the image's shorter side."""
THINNEST = 1.5
"""Width of a brush in pixels, at least: it covers the middle of one, wherever it is."""
TINY = 1e-3
"""Pixels: a shorter line is a place."""
RADIUS = 1 / 8
"""Mean length of a line, of the image's diagonal; the deviation is half of that."""
BOX = 96 / 256, 128 / 256
"""Least and largest side of a box, of the image's."""

_KIND, _COUNT, _MIRROR, _BOX = 0, 1, slice(2, 4), slice(4, 8)
_STROKE = 6  # numbers of each stroke: how many lines, brush, least and largest angle, place
_FIRST = 8
_DRAWS = _FIRST + STROKES * (_STROKE + LINES[1])


def draw(
    key: Tensor, stream: int, position_N: Tensor, size: tuple[int, int], boxes: float
) -> Tensor:
    """True where an image of that (height, width) has a hole: bool (N, 1, H, W), the holes of that
    share of images being boxes, of the others strokes. None is empty. It takes the noise streams
    `stream` and the one after it."""
    uniform_N = philox.uniform(key, stream, position_N, _DRAWS)
    normal_NL = philox.normal(key, stream + 1, position_N, STROKES * LINES[1])
    drawn_NHW = strokes(uniform_N, normal_NL, size)
    is_box_N11 = (uniform_N[:, _KIND] < boxes).view(-1, 1, 1)
    return torch.where(is_box_N11, box(uniform_N[:, _BOX], size), drawn_NHW)[:, None]


def box(uniform_N4: Tensor, size: tuple[int, int]) -> Tensor:
    """A box in each image, bool (N, H, W), from numbers in [0, 1)."""
    inside = []
    for axis, length in enumerate(size):
        share_N, place_N = uniform_N4[:, axis], uniform_N4[:, 2 + axis]
        side_N = ((BOX[0] + share_N * (BOX[1] - BOX[0])) * length).round().clamp(min=1)
        start_N = (place_N * (length - side_N + 1)).floor()
        at = torch.arange(length, device=uniform_N4.device)
        inside.append((at >= start_N[:, None]) & (at < (start_N + side_N)[:, None]))
    return inside[0][:, :, None] & inside[1][:, None, :]


def strokes(uniform_N: Tensor, normal_NL: Tensor, size: tuple[int, int]) -> Tensor:
    """The strokes in each image, bool (N, H, W), from numbers in [0, 1) and normal ones."""
    height, width = size
    count_N1 = (uniform_N[:, _COUNT, None] * STROKES).floor() + 1
    stroke_NS6, angle_NSL = _by_stroke(uniform_N)
    lines_NS = LINES[0] + (stroke_NS6[..., 0] * (LINES[1] - LINES[0] + 1)).floor()
    number_S = torch.arange(STROKES, device=uniform_N.device)
    lines_NS = torch.where(number_S < count_N1, lines_NS, 0)
    brush_NS = (BRUSH[0] + stroke_NS6[..., 1] * (BRUSH[1] - BRUSH[0])) * min(size)
    radius_NS = brush_NS.clamp(min=THINNEST) / 2

    least_NS1 = (ANGLE - stroke_NS6[..., 2] * TURN)[..., None]
    largest_NS1 = (ANGLE + stroke_NS6[..., 3] * TURN)[..., None]
    angle_NSL = least_NS1 + angle_NSL * (largest_NS1 - least_NS1)
    mean = math.hypot(height, width) * RADIUS
    length_NSL = (mean + mean / 2 * normal_NL.unflatten(1, (STROKES, -1))).clamp(0, 2 * mean)

    y_H1 = torch.arange(height, device=uniform_N.device).view(-1, 1) + 0.5
    x_W = torch.arange(width, device=uniform_N.device) + 0.5
    x_NS, y_NS = stroke_NS6[..., 4] * width, stroke_NS6[..., 5] * height
    hole_NSHW = torch.zeros((*x_NS.shape, *size), dtype=torch.bool, device=uniform_N.device)
    for i in range(LINES[1]):
        turned_NS = angle_NSL[..., i] if i % 2 else -angle_NSL[..., i]
        next_x_NS = (x_NS + length_NSL[..., i] * turned_NS.cos()).clamp(0, width)
        next_y_NS = (y_NS + length_NSL[..., i] * turned_NS.sin()).clamp(0, height)
        apart = squared_distance(x_W, y_H1, (x_NS, y_NS), (next_x_NS, next_y_NS))
        reach_NS = torch.where(i < lines_NS, radius_NS.square(), -1.0)
        hole_NSHW |= apart <= reach_NS[..., None, None]
        x_NS, y_NS = next_x_NS, next_y_NS
    return _mirrored(hole_NSHW.any(1), uniform_N[:, _MIRROR] < 0.5)


def squared_distance(
    x_W: Tensor, y_H1: Tensor, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]
) -> Tensor:
    """Of each pixel from the line between two places (x, y), (N, S) each: (N, S, H, W)."""
    (x, y), (end_x, end_y) = ([v[..., None, None] for v in place] for place in (start, end))
    long = torch.hypot(end_x - x, end_y - y)
    is_line = long > TINY
    right = torch.where(is_line, (end_x - x) / long.clamp(min=TINY), 1.0)
    down = torch.where(is_line, (end_y - y) / long.clamp(min=TINY), 0.0)
    from_x, from_y = x_W - (x + end_x) / 2, y_H1 - (y + end_y) / 2  # its middle
    beyond = (from_x * right + from_y * down).abs_().sub_(long / 2).relu_()
    beside = from_x * down - from_y * right
    return beyond.square_().add_(beside.square_())


def _by_stroke(uniform_N: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of each stroke, (N, S, 6), and one for each of its lines, (N, S, L)."""
    own = uniform_N[:, _FIRST:].unflatten(1, (STROKES, -1))
    return own[..., :_STROKE], own[..., _STROKE:]


def _mirrored(hole_NHW: Tensor, mirror_N2: Tensor) -> Tensor:
    """Those mirrored left to right that the first says, and top to bottom that the second does."""
    for axis, mirror_N in zip((2, 1), mirror_N2.unbind(1), strict=True):
        hole_NHW = torch.where(mirror_N.view(-1, 1, 1), hole_NHW.flip(axis), hole_NHW)
    return hole_NHW
