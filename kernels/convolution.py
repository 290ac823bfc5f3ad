"""Convolutions as three bilinear maps, each by the library or as one matrix product.

A convolution takes a large image to a small one (`down`), its transpose a small image to a large
one (`up`), and the gradient of either by its weight is the sum over places of the product of both
images (`outer`). The gradients of each of the three are the two others, to any order, so that a
gradient of a gradient costs no more than these.

As matrix products (`Forms`) they read patches: every place's K x K pixels, copied side by side.
`up` reads K/stride x K/stride places of the small image and writes stride x stride pixels of the
large one at once (Shi et al. 2016, "Real-time single image and video super-resolution using an
efficient sub-pixel convolutional neural network", section 3.2), and needs a kernel that the stride
divides. Values and accumulation are as in the library, the order of sums is not.

Shapes: N batch; L, H, W channels, height, width of the large image; S, P, Q of the small one; K
kernel. Weights are (S, L, K, K), as of a convolution from large to small and of a transposed one
from small to large. Everything is fast where channels come last in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

aten = torch.ops.aten

Forms = frozenset[str]
Gradients = tuple[Tensor | None, Tensor | None, None]
MAPS = ("down", "up", "outer")
_images_alone = False


@dataclass(frozen=True)
class Geometry:
    """What goes where. size: (H, W) of the large image. matmul: the maps that are matrix products;
    what such a product cannot do is the library's all the same."""

    size: tuple[int, int]
    kernel: int
    stride: int
    padding: int
    matmul: Forms = field(default_factory=frozenset)

    @property
    def small(self) -> tuple[int, int]:
        """(P, Q)."""
        height, width = ((n + 2 * self.padding - self.kernel) // self.stride + 1 for n in self.size)
        return height, width

    def takes(self, map_: str) -> bool:
        """Whether a map is a matrix product here."""
        return map_ in self.matmul and (map_ != "up" or self.kernel % self.stride == 0)


def down(large_NLHW: Tensor, weight_SLKK: Tensor, g: Geometry) -> Tensor:
    """The convolution, (N, S, P, Q), differentiable to any order."""
    return _Down.apply(large_NLHW, weight_SLKK, g)


def up(small_NSPQ: Tensor, weight_SLKK: Tensor, g: Geometry) -> Tensor:
    """The transposed convolution, (N, L, H, W), differentiable to any order."""
    return _Up.apply(small_NSPQ, weight_SLKK, g)


def outer(large_NLHW: Tensor, small_NSPQ: Tensor, g: Geometry) -> Tensor:
    """The gradient of both by their weight, (S, L, K, K), differentiable to any order."""
    return _Outer.apply(large_NLHW, small_NSPQ, g)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As autocast has a convolution take them."""
    kind = tensors[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) for t in tensors)


@contextmanager
def of_images_alone() -> Iterator[None]:
    """Inside, a gradient is not also taken by the weights: a Function cannot see that none is
    asked for."""
    global _images_alone
    _images_alone = True
    try:
        yield
    finally:
        _images_alone = False


def _wanted(ctx: Any) -> tuple[bool, bool]:
    """Whether a gradient is wanted by the image, and by the weight."""
    image, weight, _ = ctx.needs_input_grad
    return image, weight and not _images_alone


class _Bilinear(Function):
    """What the three share: both factors are kept, and either may want its gradient."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        first, second, ctx.geometry = inputs
        ctx.save_for_backward(first, second)
        ctx.set_materialize_grads(False)  # what nothing depends on is None, not zeros to compute


class _Down(_Bilinear):
    @staticmethod
    def forward(large: Tensor, weight: Tensor, g: Geometry) -> Tensor:
        if not g.takes("down"):
            return aten.convolution(large, weight, None, *_places(g))
        patches = _patches(large, g.kernel, g.stride, (g.padding,) * 4)
        small = _fresh(large, weight.shape[0], g.small)
        rows = small.permute(0, 2, 3, 1).view(-1, weight.shape[0])
        torch.mm(patches, weight.permute(0, 2, 3, 1).flatten(1).T, out=rows)
        return small

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Gradients:
        if grad is None:
            return None, None, None
        (large, weight), g = ctx.saved_tensors, ctx.geometry
        wants_large, wants_weight = _wanted(ctx)
        return (
            up(grad, weight, g) if wants_large else None,
            outer(large, grad, g) if wants_weight else None,
            None,
        )


class _Up(_Bilinear):
    @staticmethod
    def forward(small: Tensor, weight: Tensor, g: Geometry) -> Tensor:
        if g.takes("up"):
            return _sub_pixel(small, weight, g)
        shape = (small.shape[0], weight.shape[1], *g.size)
        return _gradient(small, small.new_empty(()).expand(shape), weight, g, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Gradients:
        if grad is None:
            return None, None, None
        (small, weight), g = ctx.saved_tensors, ctx.geometry
        wants_small, wants_weight = _wanted(ctx)
        return (
            down(grad, weight, g) if wants_small else None,
            outer(grad, small, g) if wants_weight else None,
            None,
        )


class _Outer(_Bilinear):
    @staticmethod
    def forward(large: Tensor, small: Tensor, g: Geometry) -> Tensor:
        shape = (small.shape[1], large.shape[1], g.kernel, g.kernel)
        if not g.takes("outer"):
            return _gradient(small, large, large.new_empty(()).expand(shape), g, 1)
        patches = _patches(large, g.kernel, g.stride, (g.padding,) * 4)
        product = small.permute(0, 2, 3, 1).flatten(0, 2).T @ patches
        return product.view(shape[0], g.kernel, g.kernel, shape[1]).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Gradients:
        if grad is None:
            return None, None, None
        (large, small), g = ctx.saved_tensors, ctx.geometry
        wants_large, wants_small, _ = ctx.needs_input_grad
        return (
            up(small, grad, g) if wants_large else None,
            down(large, grad, g) if wants_small else None,
            None,
        )


def _places(g: Geometry) -> tuple:
    return (g.stride,) * 2, (g.padding,) * 2, (1, 1), False, (0, 0), 1


def _gradient(small: Tensor, large: Tensor, weight: Tensor, g: Geometry, which: int) -> Tensor:
    """The library's gradient of a convolution by the image (0) or the weight (1), of which nothing
    but the shape is read. By the image it is faster than the transposed convolution."""
    masked = [which == 0, which == 1, False]
    return aten.convolution_backward(small, large, weight, None, *_places(g), masked)[which]


def _patches(x_NCHW: Tensor, kernel: int, stride: int, pad: tuple[int, int, int, int]) -> Tensor:
    """Every place's pixels, (N * places, K * K * C)."""
    x_NHWC = F.pad(x_NCHW.permute(0, 2, 3, 1), (0, 0, *pad))
    windows = x_NHWC.unfold(1, kernel, stride).unfold(2, kernel, stride)  # N, P, Q, C, K, K
    return windows.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)


def _fresh(like: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """An image of so many channels to write into, channels last. What a Function returns must be no
    view: an activation may overwrite it."""
    shape = (like.shape[0], channels, *size)
    order = torch.channels_last
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=order)


def _sub_pixel(small: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    """`up` as one matrix product: each place reads the `taps` x `taps` places before and at it and
    writes stride x stride pixels, of which the padding cuts some off at the edges."""
    taps, stride = g.kernel // g.stride, g.stride
    whole, rest = divmod(g.padding, stride)  # of the padding, places that need not be computed
    (height, width), (rows, columns) = g.size, ((n + rest + stride - 1) // stride for n in g.size)
    before = taps - 1 - whole
    after_rows, after_columns = (
        n + taps - 1 - before - m for n, m in ((rows, g.small[0]), (columns, g.small[1]))
    )
    patches = _patches(small, taps, 1, (before, after_columns, before, after_rows))
    split = weight.unflatten(3, (taps, stride)).unflatten(2, (taps, stride)).flip(2, 4)
    matrix = split.permute(2, 4, 0, 3, 5, 1).reshape(taps * taps * small.shape[1], -1)
    pixels = (patches @ matrix).view(-1, rows, columns, stride, stride, weight.shape[1])
    large = pixels.transpose(2, 3).flatten(1, 2).flatten(2, 3).permute(0, 3, 1, 2)
    seen = large[:, :, rest : rest + height, rest : rest + width]
    return _fresh(small, weight.shape[1], g.size).copy_(seen)
