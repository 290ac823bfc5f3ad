"""A diagonal Gaussian's sample and its KL divergence from the standard normal, as one operation.

    z  = mean + exp(log variance / 2) * noise                       Kingma and Welling 2014, eq. 10
    kl = 1/2 sum_l (e^v - 1 - v + mean^2),  v = log variance        there, appendix B

One launch forward and one backward, computed in float32; the inputs may be strided views, as the
two halves of an encoder's output are. e^v - 1 - v is about v^2 / 2 near v = 0, where expm1(v) - v
keeps three digits at v = 1e-4 and none at 1e-7; there it is taken by its series, so that the KL is
right to 1e-6 of itself however small, as it is where a posterior collapses. z overflows at a log
variance of 177, the KL at 88.7, where float32 has no e^v.

Derivatives of every order exist; those beyond the first are plain PyTorch. Under torch.func's
transforms only the reference works. Shapes: N images, L latents.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.dispatch import wide

NAME = "gaussian_kl"
# Terms of the series that reach a dtype's precision for |v| < 1/2.
TERMS = {torch.float32: 7, torch.float64: 14}


def sample_and_kl(
    mean_NL: Tensor, log_variance_NL: Tensor, noise_NL: Tensor
) -> tuple[Tensor, Tensor]:
    """z (N, L) in the mean's dtype, and KL (N,) in nats, float32.

    Any float dtypes, which may differ; noise is standard normal. Noise that itself needs a
    gradient takes the reference. Raises ValueError for shapes that are not one (N, L).
    """
    return _call(mean_NL, log_variance_NL, noise_NL)


def kl(mean_NL: Tensor, log_variance_NL: Tensor) -> Tensor:
    """KL (N,) in nats, float32, without a sample; for the rest see `sample_and_kl`."""
    return _call(mean_NL, log_variance_NL, None)[1]


def reference(
    mean_NL: Tensor, log_variance_NL: Tensor, noise_NL: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(z, KL) in plain PyTorch; z is (0, L) without noise, and KL float64 of float64."""
    mean, v = wide(mean_NL), wide(log_variance_NL)
    kl_N = 0.5 * (_Spread.apply(v) + mean.square()).sum(1)
    if noise_NL is None:
        return mean_NL.new_empty((0, mean_NL.shape[1])), kl_N
    z_NL = mean + torch.exp(0.5 * v) * wide(noise_NL)
    return z_NL.to(mean_NL.dtype), kl_N


class _Spread(torch.autograd.Function):
    """e^v - 1 - v to full precision: for |v| < 1/2 as v^2 (1/2! + v/3! + v^2/4! + ...).

    A Function because its derivative is expm1(v), and not another series: half the time on a CPU.
    """

    @staticmethod
    def forward(v: Tensor) -> Tensor:
        terms = TERMS[v.dtype]
        series = torch.full_like(v, 1 / math.factorial(terms + 1))
        for k in reversed(range(2, terms + 1)):
            series.mul_(v).add_(1 / math.factorial(k))
        return torch.where(v.abs() < 0.5, series.mul_(v).mul_(v), torch.expm1(v).sub_(v))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return grad * torch.expm1(v)


def _call(mean_NL: Tensor, log_variance_NL: Tensor, noise_NL: Tensor | None) -> Any:
    given = [t for t in (mean_NL, log_variance_NL, noise_NL) if t is not None]
    if mean_NL.ndim != 2 or any(t.shape != mean_NL.shape for t in given):
        shapes = ", ".join(str(tuple(t.shape)) for t in given)
        raise ValueError(f"mean, log variance and noise must have one shape (N, L), not {shapes}")
    plain = mean_NL.numel() == 0 or (noise_NL is not None and noise_NL.requires_grad)
    if plain or not dispatch.serves(NAME, *given):
        return reference(mean_NL, log_variance_NL, noise_NL)
    if torch.compiler.is_compiling():
        return forward_op(mean_NL, log_variance_NL, noise_NL)
    with torch.cuda.device_of(mean_NL):  # Triton launches on the current device
        return _SampleAndKl.apply(mean_NL, log_variance_NL, noise_NL)


def _second_order(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the backward pass, by differentiating that of the reference."""
    dz, dkl, mean, log_variance, noise = ctx.saved_tensors

    def gradient(dz: Tensor, dkl: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(lambda m, v: reference(m, v, noise), *inputs)[1]((dz, dkl))

    _, pull = torch.func.vjp(gradient, dz, dkl, mean, log_variance)
    return *pull(upstream), None


class _SampleAndKl(torch.autograd.Function):
    """The eager path, at half the registered operation's cost on the CPU."""

    @staticmethod
    @dispatch.eagerly()
    def forward(
        ctx: Any, mean: Tensor, log_variance: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(mean, log_variance, noise)
        return _forward(mean, log_variance, noise)

    @staticmethod
    def backward(ctx: Any, dz: Tensor, dkl: Tensor) -> tuple[Tensor | None, ...]:
        return *_Gradient.apply(dz, dkl, *ctx.saved_tensors), None


class _Gradient(torch.autograd.Function):
    """The gradient, itself differentiable."""

    @staticmethod
    @dispatch.eagerly()
    def forward(ctx: Any, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        return _backward(*inputs)

    backward = staticmethod(_second_order)


def _forward(mean: Tensor, log_variance: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    from kernels import gaussian_kl_triton

    return gaussian_kl_triton.forward(mean, log_variance, noise)


def _backward(
    dz: Tensor, dkl: Tensor, mean: Tensor, log_variance: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    from kernels import gaussian_kl_triton

    return gaussian_kl_triton.backward(dz, dkl, mean, log_variance, noise)


def _fake_forward(
    mean: Tensor, log_variance: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    n, latents = mean.shape
    z = mean.new_empty((n if noise is not None else 0, latents))
    return z, mean.new_empty((n,), dtype=torch.float32)


def _fake_backward(
    dz: Tensor, dkl: Tensor, mean: Tensor, log_variance: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    return mean.new_empty(mean.shape), log_variance.new_empty(mean.shape)


def _keep(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(*inputs)


forward_op = dispatch.register(f"{NAME}_forward", _forward, _fake_forward)
backward_op = dispatch.register(f"{NAME}_backward", _backward, _fake_backward)
forward_op.register_autograd(
    lambda ctx, dz, dkl: (*backward_op(dz, dkl, *ctx.saved_tensors), None), setup_context=_keep
)
backward_op.register_autograd(_second_order, setup_context=_keep)
