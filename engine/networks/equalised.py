"""Layers with an equalised learning rate, and the norms that go with them.

Karras, Aila, Laine and Lehtinen 2018, https://arxiv.org/abs/1710.10196, sections 3 and 4.

Shapes: N batch, C channels, H height, W width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GAIN = math.sqrt(2)  # He et al. 2015
EPS = 1e-8


class Scaled(nn.Module):
    """A layer with an equalised learning rate: N(0, 1) weights, multiplied at run time by gain over
    the root of the number of inputs (section 4.1); biases start as 0."""

    gain: float
    weight: Tensor

    def begin(self, gain: float) -> None:
        """Fresh parameters."""
        self.gain = gain / math.sqrt(self.weight[0].numel())
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Conv2d(Scaled, nn.Conv2d):
    """The convolution; its kernel is odd and the image keeps its size."""

    def __init__(self, before: int, after: int, kernel: int, gain: float = GAIN) -> None:
        super().__init__(before, after, kernel, padding=kernel // 2)
        self.begin(gain)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self._conv_forward(x_NCHW, self.weight * self.gain, self.bias)


class Linear(Scaled, nn.Linear):
    """The linear layer."""

    def __init__(self, before: int, after: int, gain: float = GAIN, bias: bool = True) -> None:
        super().__init__(before, after, bias)
        self.begin(gain)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.gain, self.bias)


def pixel_norm(x: Tensor) -> Tensor:
    """x over the root mean square of its axis 1, of the same shape and dtype, computed in float32
    at least (section 4.2)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + EPS)).to(x.dtype)


def deviation(x_NCHW: Tensor, group: int) -> Tensor:
    """x with one more channel, the standard deviation over neighbours in the batch, `group` or as
    many as divide it, averaged over C, H, W (section 3): (N, C + 1, H, W).

    Groups are consecutive images, where the authors' are N / group apart: ranks then share none.
    """
    count, channels, height, width = x_NCHW.shape
    group = math.gcd(count, group)
    wide = x_NCHW.to(torch.promote_types(x_NCHW.dtype, torch.float32))
    grouped = wide.reshape(count // group, group, channels, height, width)
    variance = (grouped - grouped.mean(1, keepdim=True)).square().mean(1)
    mean_N = (variance + EPS).sqrt().mean((1, 2, 3)).repeat_interleave(group)
    extra = mean_N[:, None, None, None].expand(count, 1, height, width)
    return torch.cat([x_NCHW, extra.to(x_NCHW.dtype)], 1)
