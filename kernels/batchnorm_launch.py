"""How the kernels of `batchnorm_triton` are laid over a tensor, and their launches.

Shapes: x (N, C), (N, C, S...) with up to three spatial axes; C channels; `stats` (3, C) float32:
mean, 1/std, biased variance.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels import batchnorm_triton as k
from kernels.dispatch import launchable

TILE = 2048  # elements that a program holds of each tensor
PROGRAMS = 1024  # about eight per SM of an H100
MOST_SPLITS = 128
# Elements of the largest channel that stays on chip without spilled registers, by the size of an
# element (python -m kernels.inspect).
WHOLE, WHOLE_GRADIENT = {2: 32_768, 4: 16_384}, 16_384
FEWEST_CHANNELS = 32  # below, one program per channel leaves most of a GPU idle


@dataclass(frozen=True)
class Layout:
    """Axes, tiles and grid for one tensor."""

    n: int
    c: int
    s: int
    last: bool
    rows: int
    columns: int

    @property
    def groups(self) -> int:
        """Programs side by side: channels, or blocks of them."""
        return triton.cdiv(self.c, self.columns) if self.last else self.c

    @property
    def tiles(self) -> int:
        """Tiles of a group."""
        if self.last:
            return triton.cdiv(self.n * self.s, self.rows)
        return triton.cdiv(self.n, self.rows) * triton.cdiv(self.s, self.columns)

    @property
    def even(self) -> bool:
        """Whether no tile reaches beyond the tensor."""
        if self.last:
            return self.n * self.s % self.rows == 0 and self.c % self.columns == 0
        return self.n % self.rows == 0 and self.s % self.columns == 0

    @property
    def splits(self) -> int:
        """Programs that share a group's tiles."""
        return max(min(triton.cdiv(PROGRAMS, self.groups), self.tiles // 2, MOST_SPLITS), 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Groups by splits."""
        return self.groups, self.splits

    @property
    def sizes(self) -> dict[str, int]:
        """What every kernel is told of the tensor."""
        return {"N": self.n, "C": self.c, "S": self.s}

    @property
    def tile(self) -> dict[str, Any]:
        """What every tiled kernel is told of its tiles."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "LAST": self.last}

    def fits(self, largest: int) -> dict[str, int] | None:
        """The tile that holds all of a channel, if it stays on chip and channels are many."""
        rows, columns = triton.next_power_of_2(self.n), triton.next_power_of_2(self.s)
        if self.last or rows * columns > largest or self.c < FEWEST_CHANNELS:
            return None
        warps = min(max(rows * columns // 1024, 4), 32)
        return {"ROWS": rows, "COLUMNS": columns, "num_warps": warps}


def layout_of(x: Tensor) -> Layout:
    """The layout of a dense tensor, channels first or last; see `dense`."""
    n, c = x.shape[:2]
    s = math.prod(x.shape[2:])
    if s == 1 or not x.is_contiguous():
        columns = min(triton.next_power_of_2(c), 64)
        rows = min(max(TILE // columns, 1), triton.next_power_of_2(n * s))
        return Layout(n, c, s, True, rows, columns)
    columns = min(triton.next_power_of_2(s), TILE)
    rows = min(max(TILE // columns, 1), triton.next_power_of_2(n))
    return Layout(n, c, s, False, rows, columns)


def dense(x: Tensor) -> Tensor:
    """x where it is contiguous or channels_last, else a contiguous copy."""
    return x if x.is_contiguous() or memory_format(x) != torch.contiguous_format else x.contiguous()


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last(_3d) or contiguous."""
    for ndim, last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.ndim == ndim and x.is_contiguous(memory_format=last) and not x.is_contiguous():
            return last
    return torch.contiguous_format


def like(gradient: Tensor, saved: Tensor) -> Tensor:
    """The gradient laid out as the tensor that it belongs to."""
    return gradient.contiguous(memory_format=memory_format(saved))


def pair(weight: Tensor | None, bias: Tensor | None, other: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift in a row, or any tensor in the place of those that are not there."""
    if weight is None or bias is None:
        return other, other
    return weight.contiguous(), bias.contiguous()


def launch(kernel: Callable, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel on a grid, seen by a compiler where one looks on."""
    launchable(kernel)[grid](*args, **options)


def partial_statistics(x: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations of each split: (3, splits, C) float32."""
    a = layout_of(x)
    part = x.new_empty((3, a.splits, a.c), dtype=torch.float32)
    launch(
        k.statistics, a.grid, x, part, **a.sizes, tiles=a.tiles, splits=a.splits, **a.tile,
        EVEN=a.even,
    )  # fmt: skip
    return part


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float,
    part: Tensor | None = None, stats: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, stats) from partial statistics, or with given ones."""
    a, y, merge = layout_of(x), torch.empty_like(x), stats is None
    if stats is None:
        stats = x.new_empty((3, a.c), dtype=torch.float32)
    launch(
        k.apply, a.grid, x, y, stats if part is None else part, *pair(weight, bias, stats), stats,
        **a.sizes, tiles=a.tiles, parts=0 if part is None else part.shape[1], eps=eps, slope=slope,
        **a.tile, AFFINE=weight is not None, MERGE=merge,
    )  # fmt: skip
    return y, stats


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float
) -> tuple[Tensor, Tensor]:
    """(y, stats) by the batch's own statistics."""
    a = layout_of(x)
    tile = a.fits(WHOLE[x.element_size()])
    if tile is None:
        return normalise(x, weight, bias, eps, slope, part=partial_statistics(x))
    y, stats = torch.empty_like(x), x.new_empty((3, a.c), dtype=torch.float32)
    launch(
        k.whole, (a.c,), x, y, *pair(weight, bias, stats), stats, **a.sizes,
        eps=eps, slope=slope, **tile,
        AFFINE=weight is not None,
    )  # fmt: skip
    return y, stats


def partial_sums(
    dy: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor,
    slope: float, output: bool, fixed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums of dz and dz * xhat of each split, (2, splits, C) float32; and dx where the statistics
    are fixed (an unwritten tensor where not)."""
    a, dx = layout_of(saved), torch.empty_like(saved)
    part = saved.new_empty((2, a.splits, a.c), dtype=torch.float32)
    launch(
        k.sums, a.grid, saved, dy, dx, part, *pair(weight, bias, stats), stats,
        **a.sizes, tiles=a.tiles,
        slope=slope, **a.tile, AFFINE=weight is not None, OUTPUT=output, FIXED=fixed,
    )  # fmt: skip
    return part, dx


def apply_sums(
    dy: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor,
    slope: float, output: bool, part: Tensor, dx: Tensor, count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dx, gradients of weight and bias (2, C) float32) from partial sums; `count` of all ranks."""
    a = layout_of(saved)
    gradients = saved.new_empty((2, a.c), dtype=torch.float32)
    launch(
        k.apply_gradient, a.grid, saved, dy, dx, part, *pair(weight, bias, stats), stats, gradients,
        count if count is not None else a.n * a.s, **a.sizes, tiles=a.tiles, parts=part.shape[1],
        slope=slope, **a.tile, AFFINE=weight is not None, OUTPUT=output, SHARED=count is not None,
    )  # fmt: skip
    return dx, gradients


def backward(
    dy: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor,
    slope: float, output: bool, fixed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dx, gradients of weight and bias (2, C) float32)."""
    dy = like(dy, saved)
    a = layout_of(saved)
    tile = None if fixed else a.fits(WHOLE_GRADIENT)
    if tile is None:
        part, dx = partial_sums(dy, saved, weight, bias, stats, slope, output, fixed)
        if fixed:
            return dx, part.sum(1).flip(0)
        return apply_sums(dy, saved, weight, bias, stats, slope, output, part, dx)
    dx, gradients = torch.empty_like(saved), saved.new_empty((2, a.c), dtype=torch.float32)
    launch(
        k.whole_gradient, (a.c,), saved, dy, dx, *pair(weight, bias, stats), stats, gradients,
        **a.sizes,
        slope=slope, **tile, AFFINE=weight is not None, OUTPUT=output,
    )  # fmt: skip
    return dx, gradients
