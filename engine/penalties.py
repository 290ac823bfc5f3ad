"""Gradient penalties: losses on the gradient of a network with respect to its input.

The inner gradient is taken by torch.autograd.grad(create_graph=True), or by torch.func.grad in a
compiled loss function, where the former cannot be had and whose handling of each operation costs an
eager one half a millisecond. Inside it every operation is plain PyTorch, or one whose gradients are
defined to any order: a fused one would give wrong gradients of the parameters, silently.

Shapes: N batch, C channels, H height, W width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine.networks.norms import statistics_kept
from kernels.batchnorm_module import plain
from kernels.convolution import of_images_alone
from kernels.dispatch import wide
from kernels.second_order import frugal


def input_gradient(critic: nn.Module, x_NCHW: Tensor, *given: Tensor) -> Tensor:
    """d sum(critic(x, *given)) / dx, (N, C, H, W), at least float32; no running statistics move.
    given: the classes (N,) for a critic that sees them."""
    with statistics_kept(critic), plain(critic), frugal():
        return wide(_gradient(lambda x: wide(critic(x, *given)).sum(), x_NCHW.detach()))


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.func.grad(function)(x)
    out = function(x.requires_grad_())
    with of_images_alone():
        return torch.autograd.grad(out, x, create_graph=True)[0]


def r1_penalty(critic: nn.Module, images_NCHW: Tensor, *given: Tensor) -> Tensor:
    """E[||grad D(x)||^2], (): on real images R1 without its gamma / 2, on fake ones R2 (Mescheder,
    Geiger and Nowozin 2018, equations 9 and 10)."""
    return input_gradient(critic, images_NCHW, *given).square().sum((1, 2, 3)).mean()


def gradient_penalty(
    critic: nn.Module, real_NCHW: Tensor, fake_NCHW: Tensor, alpha_N: Tensor, *given: Tensor
) -> Tensor:
    """E[(||grad D(x)|| - 1)^2], (), at x = alpha real + (1 - alpha) fake (Gulrajani et al. 2017,
    equation 3, without its lambda); alpha_N from U[0, 1], one per image."""
    fake_NCHW = fake_NCHW.detach().to(real_NCHW)
    mixed_NCHW = torch.lerp(fake_NCHW, real_NCHW, alpha_N.to(real_NCHW)[:, None, None, None])
    norm_N = input_gradient(critic, mixed_NCHW, *given).flatten(1).norm(dim=1)
    return (norm_N - 1).square().mean()
