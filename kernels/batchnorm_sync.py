"""BatchNorm + LeakyReLU by the statistics of all ranks' batches, on CPUs and GPUs alike.

One all_gather forward (count, mean and sum of squared deviations of each rank), one all_reduce
backward; ranks may have batches of different sizes; no value comes to the host. torch's
SyncBatchNorm refuses CPUs.

Shapes: x (N, C, S...), N this rank's batch, C channels; moments (3, C) float32.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import dispatch
from kernels.batchnorm_leaky_relu import axes_of, both, check, one_value, track
from kernels.dispatch import wide

NAME = "sync_batchnorm_leaky_relu"


def sync_batchnorm_leaky_relu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, momentum: float = 0.1, eps: float = 1e-5, slope: float = 0.2,
) -> Tensor:  # fmt: skip
    """`batchnorm_leaky_relu` in training with statistics over all ranks; once differentiable.

    The gradients of weight and bias are this rank's share, as DDP expects them. Raises what
    `batchnorm_leaky_relu` does, but one value per channel only in a world of one rank: among
    several no rank alone knows.
    """
    check(x, weight, bias, running_mean, running_var, slope)
    if dist.get_world_size() == 1 and x.numel() == x.shape[1]:
        raise ValueError(one_value(x))
    fused = x.numel() > 0 and dispatch.serves(
        NAME, x, *(t for t in (weight, bias) if t is not None)
    )
    weight, bias = both(weight, bias)
    with torch.cuda.device_of(x):
        y, moments = _Sync.apply(x, weight, bias, eps, slope, fused)
    _track(running_mean, running_var, moments, momentum)
    return y


def sync_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, momentum: float, eps: float, slope: float,
) -> Tensor:  # fmt: skip
    """The same by sums over ranks, with derivatives of every order."""
    axes, shape = axes_of(x)
    dtype, x = x.dtype, wide(x)
    count = torch.full((), x.numel() // x.shape[1], dtype=x.dtype, device=x.device)
    count = SumOverRanks.apply(count)
    mean_C = SumOverRanks.apply(x.sum(axes)) / count
    centred = x - mean_C.view(shape)
    m2_C = SumOverRanks.apply(centred.square().sum(axes))
    xhat = centred * (m2_C / count + eps).rsqrt().view(shape)
    z = _scaled(xhat, *both(weight, bias))
    _track(
        running_mean, running_var, torch.stack([count.expand_as(mean_C), mean_C, m2_C]), momentum
    )
    return torch.where(z > 0, z, z * slope).to(dtype)


class SumOverRanks(torch.autograd.Function):
    """Sum over ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return SumOverRanks.apply(gradient)


class _Sync(torch.autograd.Function):
    @staticmethod
    @dispatch.eagerly()
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float,
        fused: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        gathered = _gather(_moments(x, fused))  # (3, ranks, C)
        moments = merge(gathered)
        if fused:
            from kernels.batchnorm_launch import dense, normalise

            x = dense(x)
            y, stats = normalise(x, weight, bias, eps, slope, part=gathered)
        else:
            stats = torch.stack([moments[1], (moments[2] / moments[0] + eps).rsqrt()])
            z = _scaled(_normalised(x, stats), weight, bias)
            y = torch.where(z > 0, z, z * slope).to(x.dtype)
        ctx.save_for_backward(x, weight, bias, stats, moments[0, 0].clone())
        ctx.slope, ctx.fused = slope, fused
        ctx.mark_non_differentiable(moments)
        return y, moments

    @staticmethod
    @torch.autograd.function.once_differentiable
    @dispatch.eagerly()
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, stats, count = ctx.saved_tensors
        backward = _fused_backward if ctx.fused else _plain_backward
        dx, db, dw = backward(dy, x, weight, bias, stats, count, ctx.slope)
        affine = (None, None) if weight is None else (dw.to(weight.dtype), db.to(weight.dtype))
        return dx, *affine, None, None, None


def _fused_backward(dy, x, weight, bias, stats, count, slope):  # noqa: ANN001
    from kernels import batchnorm_launch as launch

    dy = launch.like(dy, x)
    part, dx = launch.partial_sums(dy, x, weight, bias, stats, slope, False, False)
    own = part.sum(1)
    total = own.clone()
    dist.all_reduce(total)
    dx, _ = launch.apply_sums(
        dy, x, weight, bias, stats, slope, False, total[:, None].contiguous(), dx, count
    )
    return dx, own[0], own[1]


def _plain_backward(dy, x, weight, bias, stats, count, slope):  # noqa: ANN001
    axes, shape = axes_of(x)
    xhat = _normalised(x, stats)
    dy = wide(dy)
    dz = torch.where(_scaled(xhat, weight, bias) > 0, dy, dy * slope)
    own = torch.stack([dz.sum(axes), (dz * xhat).sum(axes)])
    total = own.clone()
    dist.all_reduce(total)
    db, dw = (t.view(shape) / count for t in total)
    scale = stats[1] if weight is None else stats[1] * weight
    return ((dz - db - xhat * dw) * scale.view(shape)).to(x.dtype), own[0], own[1]


def _normalised(x: Tensor, stats: Tensor) -> Tensor:
    _, shape = axes_of(x)
    return (wide(x) - stats[0].view(shape)) * stats[1].view(shape)


def _scaled(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None or bias is None:
        return xhat
    _, shape = axes_of(xhat)
    return xhat * weight.view(shape) + bias.view(shape)


def _moments(x: Tensor, fused: bool) -> Tensor:
    """Count, mean and sum of squared deviations of this rank's batch, (3, C)."""
    if fused:
        from kernels.batchnorm_launch import dense, partial_statistics

        return merge(partial_statistics(dense(x)))
    axes, shape = axes_of(x)
    x = wide(x)
    if not x.numel():  # a rank without images takes part with a count of 0
        return x.new_zeros((3, x.shape[1]))
    mean_C = x.mean(axes)
    m2_C = (x - mean_C.view(shape)).square().sum(axes)
    return torch.stack([torch.full_like(mean_C, x.numel() // x.shape[1]), mean_C, m2_C])


def merge(parts: Tensor) -> Tensor:
    """Moments (3, C) of everything from those of parts, (3, parts, C) (Chan, Golub and LeVeque
    1983, equation 1.5)."""
    count, mean, m2 = parts
    total = count.sum(0)
    first = (count * mean).sum(0) / total
    whole = first + (count * (mean - first)).sum(0) / total
    return torch.stack([total, whole, (m2 + count * (mean - whole).square()).sum(0)])


def _gather(moments: Tensor) -> Tensor:
    everyone = [torch.empty_like(moments) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, moments)
    return torch.stack(everyone, 1)


def _track(
    running_mean: Tensor | None, running_var: Tensor | None, moments: Tensor, momentum: float
) -> None:
    if running_mean is not None and running_var is not None:
        count, mean_C, m2_C = moments.detach()
        track(running_mean, running_var, mean_C, m2_C / (count - 1).clamp(min=1), momentum)
