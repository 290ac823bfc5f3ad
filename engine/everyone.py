"""What an iteration computes over the images of all ranks: their features, with gradients.

Each rank computes the same loss of everybody's features, and of its gradient keeps what is its
own. Since gradients of parameters are averaged over ranks afterwards, and each rank's holds but its
own images' part, that part is multiplied by the number of ranks: no second exchange is needed.

Shapes: N images of a rank, M of all ranks.
"""

import math
from typing import Any

import torch
from torch import Tensor

from engine.world import Ranks

FLOAT = 4  # bytes


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NF: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.count = ranks, len(x_NF)
        return ranks.concatenated(x_NF)

    @staticmethod
    def backward(ctx: Any, gradient_MF: Tensor) -> tuple[Tensor, None]:
        own_NF = gradient_MF.narrow(0, ctx.ranks.rank * ctx.count, ctx.count)
        return own_NF * ctx.ranks.world_size, None


def gathered(ranks: Ranks, *parts: Tensor) -> tuple[Tensor, ...]:
    """Tensors (N, ...) of all ranks, (M, ...) in the order of ranks, by one exchange in float32, in
    which whole numbers below 2 ** 24 are exact; of one rank, what was given."""
    if ranks.world_size == 1:
        return parts
    flat_NF = torch.cat([part.float().flatten(1) for part in map(_with_axis, parts)], 1)
    sizes = [math.prod(part.shape[1:]) for part in parts]
    everyone = _Gathered.apply(flat_NF, ranks).split(sizes, 1)
    return tuple(
        whole.reshape(-1, *part.shape[1:]).to(part.dtype)
        for whole, part in zip(everyone, parts, strict=True)
    )


def _with_axis(part: Tensor) -> Tensor:
    return part if part.ndim > 1 else part[:, None]


def next_of_all(ranks: Ranks, x_NF: Tensor) -> Tensor:
    """Of each image what the next image of the batch of all ranks has, (N, F); the first follows
    the last. Without gradients."""
    whole_MF = ranks.concatenated(x_NF.detach())
    begin = ranks.rank * len(x_NF)
    return whole_MF.roll(-1, 0)[begin : begin + len(x_NF)]
