"""Differentiable augmentation of real and fake images before the discriminator.

Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training", section 3.3 and
appendix C for the three kinds and their ranges. Every draw is a function of the image's place in
the stream, so that ranks, micro-batches and resumed runs agree.

Shapes: N batch, C channels, H height, W width.
"""

from typing import Literal

import torch
from torch import Tensor

from kernels import philox

Kind = Literal["color", "translation", "cutout"]
DRAWS = 7
REACH, HOLE = 1 / 8, 1 / 2
"""Of the image's side: the longest translation, and the side of the square that is cut out."""


def augment(
    images_NCHW: Tensor, kinds: tuple[Kind, ...], key: Tensor, stream: int, position_N: Tensor
) -> Tensor:
    """The images (float, in [-1, 1]) with the augmentations of these kinds, in their fixed order,
    drawn for these positions (int64 (N,)) from a noise stream; same shape and dtype."""
    if not kinds:
        return images_NCHW
    draw_7N = philox.uniform(key, stream, position_N, DRAWS).T
    if "color" in kinds:
        images_NCHW = color(images_NCHW, *draw_7N[:3])
    if "translation" in kinds:
        images_NCHW = translate(images_NCHW, *draw_7N[3:5])
    if "cutout" in kinds:
        images_NCHW = cut_out(images_NCHW, *draw_7N[5:])
    return images_NCHW


def color(x_NCHW: Tensor, bright_N: Tensor, saturated_N: Tensor, contrast_N: Tensor) -> Tensor:
    """Brightness + U[-1/2, 1/2), saturation * U[0, 2), contrast * U[1/2, 3/2); draws in [0, 1)."""
    bright, saturated, contrast = (
        draw_N.to(x_NCHW.dtype)[:, None, None, None]
        for draw_N in (bright_N, saturated_N, contrast_N)
    )
    x_NCHW = x_NCHW + (bright - 0.5)
    grey = x_NCHW.mean(1, keepdim=True)
    x_NCHW = torch.lerp(grey.expand_as(x_NCHW), x_NCHW, saturated * 2)
    mean = x_NCHW.mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean.expand_as(x_NCHW), x_NCHW, contrast + 0.5)


def translate(x_NCHW: Tensor, down_N: Tensor, right_N: Tensor) -> Tensor:
    """Moved by up to an eighth of the side each way, black (0) coming in; draws in [0, 1)."""
    for draw_N, axis in ((down_N, 2), (right_N, 3)):
        side = x_NCHW.shape[axis]
        place_NS, inside_NS = _sources(draw_N, side)
        shape = [len(draw_N), 1, 1, 1]
        shape[axis] = side
        taken = x_NCHW.gather(axis, place_NS.view(shape).expand_as(x_NCHW))
        x_NCHW = taken * inside_NS.view(shape).to(x_NCHW.dtype)
    return x_NCHW


def _sources(draw_N: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Where the rows (or columns) of an image come from, (N, side), and whether that is in it."""
    reach = round(side * REACH)
    shift_N = (draw_N * (2 * reach + 1)).floor().long() - reach
    from_NS = torch.arange(side, device=draw_N.device) - shift_N[:, None]
    return from_NS.clamp(0, side - 1), (from_NS >= 0) & (from_NS < side)


def cut_out(x_NCHW: Tensor, down_N: Tensor, right_N: Tensor) -> Tensor:
    """A square of half the side made black (0), its centre anywhere; draws in [0, 1)."""
    inside = []
    for draw_N, side in ((down_N, x_NCHW.shape[2]), (right_N, x_NCHW.shape[3])):
        hole = round(side * HOLE)
        first_N1 = ((draw_N * (side + 1 - hole % 2)).floor().long() - hole // 2)[:, None]
        place_S = torch.arange(side, device=draw_N.device)
        inside.append((place_S >= first_N1) & (place_S < first_N1 + hole))
    hole_N1HW = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
    return x_NCHW * (~hole_N1HW).to(x_NCHW.dtype)
