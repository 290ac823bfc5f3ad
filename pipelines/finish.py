"""The one finishing step, on the device: from the packed uint8 images of any backend to a batch."""

import torch
from torch import Tensor

from kernels import philox

FLIP = 1001
"""Random stream of the mirror flips."""


def finish(
    images_NCHW: Tensor,
    position_N: Tensor,
    key: Tensor,
    flip: bool,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """float32 (N, C, H, W) in [-1, 1] from uint8 (N, C, H, W); position_N and key are int64.

    The flip is chosen per image by its position in the stream. It is done in uint8, so that the
    one pass over floats comes last: a quarter of the memory traffic.
    """
    if flip:
        mask_N = philox.uniform(key, FLIP, position_N, 1)[:, 0] < 0.5
        images_NCHW = torch.where(mask_N[:, None, None, None], images_NCHW.flip(3), images_NCHW)
    return images_NCHW.to(torch.float32, memory_format=memory_format).div_(127.5).sub_(1.0)
