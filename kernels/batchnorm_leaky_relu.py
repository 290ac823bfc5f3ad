"""BatchNorm followed by LeakyReLU as one operation.

    y = leaky_relu(weight * (x - mean) / sqrt(variance + eps) + bias, slope)

Ioffe and Szegedy 2015, "Batch normalization", algorithm 1; Maas, Hannun and Ng 2013 for the
activation. Fused it takes 3 element-passes forward and 5 backward (2 and 3 where a channel fits on
chip), and keeps x alone for the backward pass; statistics and sums are float32.

Shapes: x (N, C) or (N, C, S...), N batch, C channels, up to three spatial axes.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import dispatch

NAME = "batchnorm_leaky_relu"
Save = Literal["input", "output"]


def batchnorm_leaky_relu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    slope: float = 0.2,
    save: Save = "input",
) -> Tensor:
    """LeakyReLU of BatchNorm of x, of x's shape, dtype and memory format.

    x float32, bfloat16, float16 or (plain PyTorch only) float64; weight, bias and the running
    statistics (C,) float32, each optional; slope in [0, 1], 0 being ReLU. Running statistics
    are updated in place in training. save="output" keeps y in place of x for the backward pass
    (needs 0 < slope and no weight of 0; in bfloat16 the gradient of small weights loses digits).

    Raises ValueError as torch's batch_norm does for one value per channel in training, and for
    a slope or a `save` that cannot be; RuntimeError for integers and for sizes that differ.
    """
    check(x, weight, bias, running_mean, running_var, slope, save)
    tensors = [t for t in (weight, bias) if t is not None]
    weight, bias = both(weight, bias)
    fused = x.numel() and dispatch.serves(NAME, x, *tensors)
    if not fused or (not training and running_mean is None):
        return reference(x, weight, bias, running_mean, running_var, training, momentum, eps, slope)
    if not training:
        mean, variance = running_mean.float(), running_var.float()
        stats = torch.stack([mean, (variance + eps).rsqrt(), variance])
        return _call(x, weight, bias, stats, eps, slope, save == "output", True)[0]
    count = x.numel() // x.shape[1]
    if count <= 1:
        raise ValueError(one_value(x))
    y, stats = _call(x, weight, bias, None, eps, slope, save == "output", False)
    if running_mean is not None and running_var is not None:
        track(running_mean, running_var, stats[0], stats[2] * (count / (count - 1)), momentum)
    return y


def reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, training: bool, momentum: float, eps: float, slope: float,
) -> Tensor:  # fmt: skip
    """The same in plain PyTorch, with derivatives of every order."""
    z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return z if slope == 1 else F.leaky_relu_(z, slope)


def one_value(x: Tensor) -> str:
    """What torch says where a channel has no spread."""
    return f"Expected more than 1 value per channel when training, got input size {x.shape}"


def check(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, slope: float, save: str = "input",
) -> None:  # fmt: skip
    """Raise what nn.BatchNorm would, as clearly."""
    if not x.is_floating_point():
        raise RuntimeError(f"batchnorm_leaky_relu needs a floating-point input, not {x.dtype}")
    if x.ndim < 2 or x.ndim > 5:
        raise ValueError(f"expected 2D to 5D input (got {x.ndim}D input)")
    if not 0 <= slope <= 1:
        raise ValueError(f"slope {slope} must be between 0 and 1")
    if save not in ("input", "output") or (save == "output" and slope == 0):
        raise ValueError(f"save={save!r}: give 'input', or 'output' with a slope above 0")
    if (running_mean is None) != (running_var is None):
        raise ValueError("give both running_mean and running_var, or neither")
    given = {"weight": weight, "bias": bias}
    given |= {"running_mean": running_mean, "running_var": running_var}
    for name, tensor in given.items():
        if tensor is not None and tensor.shape != x.shape[1:2]:
            count = tensor.numel()
            raise RuntimeError(f"{name} should contain {x.shape[1]} elements not {count}")


def both(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift, or neither: what is missing beside the other is ones, or zeros."""
    if weight is None and bias is not None:
        weight = torch.ones_like(bias, requires_grad=False)
    elif bias is None and weight is not None:
        bias = torch.zeros_like(weight, requires_grad=False)
    return weight, bias


@torch.no_grad()
def track(
    running_mean: Tensor, running_var: Tensor, mean_C: Tensor, unbiased_C: Tensor, momentum: float
) -> None:
    """Running statistics, in place; the variance that they follow is the unbiased one."""
    running_mean.lerp_(mean_C.to(running_mean), momentum)
    running_var.lerp_(unbiased_C.to(running_var), momentum)


def axes_of(x: Tensor) -> tuple[list[int], list[int]]:
    """Axes that a channel's statistics run over, and the shape that (C,) takes beside x."""
    return [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)


def _call(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(y, stats): under torch.compile by the registered operation, else by the cheaper Function."""
    from kernels.batchnorm_launch import dense

    x = dense(x)
    if torch.compiler.is_compiling():
        return forward_op(x, *rest)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return _Function.apply(x, *rest)


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor | None, eps: float,
    slope: float, output: bool, fixed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from kernels import batchnorm_launch as launch

    if stats is None:
        return launch.forward(x, weight, bias, eps, slope)
    return launch.normalise(x, weight, bias, eps, slope, stats=stats)[0], stats.clone()


def _backward(
    dy: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor,
    eps: float, slope: float, output: bool, fixed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from kernels import batchnorm_launch as launch

    return launch.backward(dy, saved, weight, bias, stats, slope, output, fixed)


def _fake_forward(x, weight, bias, stats, eps, slope, output, fixed):  # noqa: ANN001
    return torch.empty_like(x), x.new_empty((3, x.shape[1]), dtype=torch.float32)


def _fake_backward(dy, saved, weight, bias, stats, eps, slope, output, fixed):  # noqa: ANN001
    return torch.empty_like(saved), saved.new_empty((2, saved.shape[1]), dtype=torch.float32)


def backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, eps: float,
    slope: float, fixed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`_backward` in plain PyTorch; where it is differentiated, statistics are made from x anew."""
    axes, shape = axes_of(x)
    wide, g = x.to(stats.dtype), dy.to(stats.dtype)
    if fixed:
        mean, rstd = stats[0].view(shape), stats[1].view(shape)
    else:
        mean = wide.mean(axes, keepdim=True)
        rstd = ((wide - mean).square().mean(axes, keepdim=True) + eps).rsqrt()
    xhat = (wide - mean) * rstd
    w = torch.ones_like(rstd) if weight is None else weight.view(shape).to(stats.dtype)
    z = xhat * w if bias is None else xhat * w + bias.view(shape).to(stats.dtype)
    dz = torch.where(z > 0, g, g * slope)
    db, dw = dz.sum(axes, keepdim=True), (dz * xhat).sum(axes, keepdim=True)
    n = x.numel() // x.shape[1]
    dx = dz if fixed else dz - db / n - xhat * (dw / n)
    return (dx * w * rstd).to(x.dtype), torch.stack([dw.flatten(), db.flatten()])


def second_order(
    ctx: Any, ddx: Tensor | None, ddgradients: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of `_backward` with respect to its tensors, by differentiating its reference; they
    have gradients themselves."""
    dy, x, weight, bias, stats = ctx.saved_tensors
    if ctx.output:
        raise NotImplementedError("save='output' has no second derivative; use save='input'")
    given = [dy, x, *(t for t in (weight, bias) if t is not None)]

    def gradient(dy: Tensor, x: Tensor, *affine: Tensor) -> tuple[Tensor, Tensor]:
        pair = affine or (None, None)
        return backward_reference(dy, x, *pair, stats, ctx.eps, ctx.slope, ctx.fixed)

    outs, pull = torch.func.vjp(gradient, *given)
    pairs = zip(outs, (ddx, ddgradients), strict=True)
    found = pull(tuple(torch.zeros_like(o) if d is None else d for o, d in pairs))
    affine = found[2:] or (None, None)
    return (*found[:2], *affine, None, None, None, None, None)


def keep_forward(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keep what the backward pass reads: x, or y in its place."""
    x, weight, bias, _, ctx.eps, ctx.slope, ctx.output, ctx.fixed = inputs
    y, stats = output
    ctx.save_for_backward(y if ctx.output else x, weight, bias, stats)


def keep_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keep what the second derivative reads."""
    dy, saved, weight, bias, stats, ctx.eps, ctx.slope, ctx.output, ctx.fixed = inputs
    ctx.save_for_backward(dy, saved, weight, bias, stats)


def _first_order(ctx: Any, backward: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    saved, weight, bias, stats = ctx.saved_tensors
    dx, gradients = backward(
        dy, saved, weight, bias, stats, ctx.eps, ctx.slope, ctx.output, ctx.fixed
    )
    affine = (None, None)
    if weight is not None and bias is not None:
        affine = (gradients[0].to(weight.dtype), gradients[1].to(bias.dtype))
    return (dx, *affine, None, None, None, None, None)


class _Function(torch.autograd.Function):
    """The eager path: half the registered operation's cost on the CPU."""

    @staticmethod
    @dispatch.eagerly()
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        keep_forward(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return _first_order(ctx, _Backward.apply, dy)


class _Backward(torch.autograd.Function):
    @staticmethod
    @dispatch.eagerly()
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _backward(*inputs)
        keep_backward(ctx, inputs, output)
        return output

    backward = staticmethod(second_order)


forward_op = dispatch.register(NAME, _forward, _fake_forward)
backward_op = dispatch.register(f"{NAME}_backward", _backward, _fake_backward)
forward_op.register_autograd(
    lambda ctx, dy, _: _first_order(ctx, backward_op, dy), setup_context=keep_forward
)
backward_op.register_autograd(second_order, setup_context=keep_backward)
