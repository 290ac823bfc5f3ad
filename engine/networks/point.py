"""Convolutions between a map of one pixel and a map as large as the kernel, as one matrix product.

The library's convolutions are several times slower there on a CPU; parameters, their names and the
result are those of the class that each is made from.

Shapes: N batch, C channels, K kernel's side.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class FromPoint(nn.ConvTranspose2d):
    """(N, C, 1, 1) to (N, channels, K, K), without bias."""

    def __init__(self, channels_in: int, channels: int, kernel: int) -> None:
        super().__init__(channels_in, channels, kernel, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        weight_CHWC = self.weight.permute(0, 2, 3, 1)  # without a copy where channels come last
        product_NK = x_NCHW.flatten(1) @ weight_CHWC.flatten(1)
        return product_NK.unflatten(1, weight_CHWC.shape[1:]).permute(0, 3, 1, 2)


class ToPoint(nn.Conv2d):
    """(N, C, K, K) to (N, channels, 1, 1), without bias."""

    def __init__(self, channels_in: int, channels: int, kernel: int) -> None:
        super().__init__(channels_in, channels, kernel, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NK, weight_CK = (t.permute(0, 2, 3, 1).flatten(1) for t in (x_NCHW, self.weight))
        return F.linear(x_NK, weight_CK)[:, :, None, None]
