"""Gradient penalties: losses on the gradient of a network with respect to its input.

The inner gradient is taken by torch.func.grad, which holds in eager and inside a compiled loss
function alike; torch.autograd.grad(create_graph=True) cannot be compiled.

Shapes: N batch, C channels, H height, W width.
"""

import torch
from torch import Tensor, nn

from engine.losses import wide
from engine.networks.norms import statistics_kept


def input_gradient(critic: nn.Module, x_NCHW: Tensor) -> Tensor:
    """d sum(critic(x)) / dx, (N, C, H, W), at least float32; no running statistics move."""
    with statistics_kept(critic):
        return wide(torch.func.grad(lambda x: wide(critic(x)).sum())(x_NCHW.detach()))


def r1_penalty(critic: nn.Module, real_NCHW: Tensor) -> Tensor:
    """E[||grad D(x)||^2] over real images, (): R1 without its gamma / 2 (Mescheder, Geiger and
    Nowozin 2018, equation 9)."""
    return input_gradient(critic, real_NCHW).square().sum((1, 2, 3)).mean()
