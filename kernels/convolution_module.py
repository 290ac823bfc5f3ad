"""Convolution layers whose maps are matrix products, made of those of a network.

State dicts, parameters and results (but for the order of sums) stay as they are.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kernels.convolution import MAPS, Forms, Geometry, as_autocast, down, up


class _Mapped(nn.Module):
    """What both kinds share. matmul: the maps that are matrix products."""

    matmul: Forms
    plain: bool  # see `kernels.batchnorm_module.plain`

    def left_to_the_library(self) -> bool:
        """Inside a compiled gradient of a gradient, which would leave out ours silently."""
        return self.plain and torch.compiler.is_compiling()

    def shifted(self, y_NCHW: Tensor) -> Tensor:
        """With the bias, if there is one."""
        return y_NCHW if self.bias is None else y_NCHW + self.bias.to(y_NCHW)[:, None, None]


class MappedConv2d(_Mapped, nn.Conv2d):
    """nn.Conv2d of these maps."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Large to small."""
        if self.left_to_the_library():
            return nn.Conv2d.forward(self, x_NCHW)
        return self.shifted(
            down(*as_autocast(x_NCHW, self.weight), geometry(self, x_NCHW, self.matmul))
        )


class MappedConvTranspose2d(_Mapped, nn.ConvTranspose2d):
    """nn.ConvTranspose2d of these maps."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Small to large."""
        if self.left_to_the_library():
            return nn.ConvTranspose2d.forward(self, x_NCHW)
        return self.shifted(
            up(*as_autocast(x_NCHW, self.weight), geometry(self, x_NCHW, self.matmul))
        )


KINDS = {nn.Conv2d: MappedConv2d, nn.ConvTranspose2d: MappedConvTranspose2d}


def geometry(layer: nn.Module, x_NCHW: Tensor, matmul: Forms = frozenset()) -> Geometry:
    """What goes where in a convolution layer, transposed or not, that is given x."""
    kernel, stride, padding = layer.kernel_size[0], layer.stride[0], layer.padding[0]
    height, width = x_NCHW.shape[2:]
    if layer.transposed:
        rest = kernel - 2 * padding + layer.output_padding[0]
        height, width = ((n - 1) * stride + rest for n in (height, width))
    return Geometry((height, width), kernel, stride, padding, matmul)


def mappable(network: nn.Module) -> dict[str, nn.Module]:
    """The layers, by name, that are these maps: square kernels, strides and paddings of zeros, no
    groups, no dilation."""
    layers = ((name, m) for name, m in network.named_modules() if type(m) in KINDS)
    return {name: layer for name, layer in layers if _is_a_map(layer)}


def map_convolutions(network: nn.Module, matmul: Mapping[str, Forms] | None = None) -> nn.Module:
    """The network, its layers changed in place to such as have these of their maps as matrix
    products; None: all of all layers."""
    for name, layer in mappable(network).items():
        if forms := frozenset(MAPS) if matmul is None else matmul.get(name):
            layer.__class__ = KINDS[type(layer)]
            layer.matmul, layer.plain = forms, False
    return network


def counted(network: nn.Module) -> tuple[int, int]:
    """How many convolutions are matrix products in some of their maps, and of how many."""
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    return sum(isinstance(m, _Mapped) for m in layers), len(layers)


def _is_a_map(layer: nn.Module) -> bool:
    pairs = (layer.kernel_size, layer.stride, layer.padding, layer.output_padding)
    if isinstance(layer.padding, str) or any(height != width for height, width in pairs):
        return False
    ordinary = (layer.groups, layer.dilation, layer.padding_mode) == (1, (1, 1), "zeros")
    return ordinary and layer.padding[0] < layer.kernel_size[0]
