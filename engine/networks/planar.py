"""Networks that keep their values channel by channel (NCHW), wherever others keep channels last.

torch's InstanceNorm knows no other order: between convolutions with channels last it has every map
copied twice.
"""

import torch
from torch import Tensor, nn


class Planar(nn.Module):
    """A network, or a part of one, whose forward begins with `x.contiguous()`."""

    def settle(self) -> None:
        """Have its weights in that order too, which convolutions go by."""
        self.to(memory_format=torch.contiguous_format)


class Chain(Planar, nn.Sequential):
    """Layers one after the other."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Of images in any order."""
        return super().forward(x_NCHW.contiguous())
