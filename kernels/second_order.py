"""Gradients of gradients without what is known to be zero.

PyTorch's convolution, ReLU, LeakyReLU and average pooling tell their input's gradient of a gradient
as a tensor of zeros, which is then taken through every layer before it: two thirds of an ordinary
backward pass. Its gradient by a convolution's weight is, moreover, a convolution whose kernel is as
large as the image. Here such operations are made of ones that depend on nothing but what they do:
`kernels.convolution`'s maps, and products with a mask. Values and gradients are the same.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from kernels.convolution import Geometry, as_autocast, down, up

aten = torch.ops.aten


def frugal() -> AbstractContextManager:
    """Inside, plain PyTorch's operations are such, where they can be; nothing changes in a compiled
    function."""
    return nullcontext() if torch.compiler.is_compiling() else _Frugal()


class _Frugal(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if instead := INSTEAD.get(func):
            found = instead(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        return func(*args, **(kwargs or {}))


def _convolution(
    x_NCHW: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    square = _square(weight, stride, padding)
    if square is None or groups != 1 or set(_pair(dilation)) != {1}:
        return NotImplemented
    x, weight = as_autocast(x_NCHW, weight)
    return _shifted(down(x, weight, Geometry(tuple(x.shape[2:]), *square)), bias)


def _transposed(
    x_NCHW: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    square = _square(weight, stride, padding)
    if square is None or groups != 1 or set(_pair(dilation)) != {1}:
        return NotImplemented
    kernel, step, pad = square
    sides = zip(x_NCHW.shape[2:], _pair(output_padding), strict=True)
    size = tuple((n - 1) * step + kernel - 2 * pad + rest for n, rest in sides)
    x, weight = as_autocast(x_NCHW, weight)
    return _shifted(up(x, weight, Geometry(size, *square)), bias)


def _relu(x: Tensor, inplace: bool = False) -> Tensor:
    return _Rectify.apply(x, 0.0, inplace)


def _leaky_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    if negative_slope < 0:  # the result does not tell the sign
        return NotImplemented
    return _Rectify.apply(x, negative_slope, inplace)


class _Rectify(Function):
    """LeakyReLU, whose slope is constant on either side; its result is kept, not what it was given,
    which it may overwrite."""

    @staticmethod
    def forward(x: Tensor, slope: float, inplace: bool) -> Tensor:
        if not slope:  # 0 times infinity is no number
            return aten.relu_(x) if inplace else aten.relu(x)
        return aten.leaky_relu_(x, slope) if inplace else aten.leaky_relu(x, slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, ctx.slope, inplace = inputs
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        return _Slopes.apply(grad, *ctx.saved_tensors, ctx.slope), None, None


class _Slopes(Function):
    """A gradient times the slope of LeakyReLU where y came out."""

    @staticmethod
    def forward(grad: Tensor, y: Tensor, slope: float) -> Tensor:
        if not slope:
            return aten.threshold_backward(grad, y, 0)
        return aten.leaky_relu_backward(grad, y, slope, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, y, ctx.slope = inputs
        ctx.save_for_backward(y)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        again = None if grad is None else _Slopes.apply(grad, *ctx.saved_tensors, ctx.slope)
        return again, None, None


def _average(
    x_NCHW: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    places = (_pair(kernel_size), _pair(stride or kernel_size), _pair(padding))
    how = (*places, ceil_mode, count_include_pad, divisor_override)
    return _Average.apply(x_NCHW, tuple(x_NCHW.shape), how)


class _Average(Function):
    """Average pooling of an image of this shape."""

    @staticmethod
    def forward(x: Tensor, shape: tuple[int, ...], how: tuple) -> Tensor:
        return aten.avg_pool2d(x, *how)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.shape, ctx.how = inputs
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        return (None if grad is None else _Spread.apply(grad, ctx.shape, ctx.how)), None, None


class _Spread(Function):
    """Its transpose."""

    @staticmethod
    def forward(grad: Tensor, shape: tuple[int, ...], how: tuple) -> Tensor:
        last = grad.is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if last else torch.contiguous_format
        image = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=order)
        return aten.avg_pool2d_backward(grad, image, *how)  # reads nothing of image but its shape

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.shape, ctx.how = inputs
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        return (None if grad is None else _Average.apply(grad, ctx.shape, ctx.how)), None, None


INSTEAD = {
    F.conv2d: _convolution,
    F.conv_transpose2d: _transposed,
    F.relu: _relu,
    Tensor.relu: _relu,
    torch.relu: _relu,
    Tensor.relu_: partial(_relu, inplace=True),
    torch.relu_: partial(_relu, inplace=True),
    F.leaky_relu: _leaky_relu,
    F.avg_pool2d: _average,
}


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _square(weight: Tensor, stride: Any, padding: Any) -> tuple[int, int, int] | None:
    """(kernel, stride, padding), if each is the same in height and width."""
    if isinstance(padding, str):
        return None
    pairs = (tuple(weight.shape[2:]), _pair(stride), _pair(padding))
    return None if any(a != b for a, b in pairs) else tuple(a for a, _ in pairs)


def _shifted(y_NCHW: Tensor, bias: Tensor | None) -> Tensor:
    return y_NCHW if bias is None else y_NCHW + bias.to(y_NCHW)[:, None, None]
