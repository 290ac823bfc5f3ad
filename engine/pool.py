"""Image pools: discriminators are shown translated images of before beside those of now.

Shrivastava et al. 2017, "Learning from simulated and unsupervised images through adversarial
training", https://arxiv.org/abs/1612.07828, section 2.3, as CycleGAN's authors do it
(util/image_pool.py): while the pool is not full an image is kept and shown as it is; after that,
one time in two an image drawn from the pool is shown, which the new one replaces.

Shapes: N images, P places of the pool, C channels, H height, W width.
"""

import torch
from torch import Tensor

from kernels import philox


@torch.no_grad()
def exchanged(
    pool_PCHW: Tensor,
    held: Tensor,
    images_NCHW: Tensor,
    key: Tensor,
    stream: int,
    position_N: Tensor,
) -> Tensor:
    """What to show in place of the images, (N, C, H, W); the pool is changed in place.

    held: how many it holds, int64 (), before these. Images are taken one after the other, each a
    function of its position alone, so that ranks that pass the same images have the same pools.
    """
    size = len(pool_PCHW)
    if not size:
        return images_NCHW
    draw_N2 = philox.uniform(key, stream, position_N, 2)
    place_N, shown = (draw_N2[:, 0] * size).long(), []
    for i, image_CHW in enumerate(images_NCHW.to(pool_PCHW.dtype)):
        filling = held + i < size
        swaps = ~filling & (draw_N2[i, 1] > 0.5)
        place_1 = torch.where(filling, held + i, place_N[i])[None]
        stored_CHW = pool_PCHW.index_select(0, place_1)[0]
        shown.append(torch.where(swaps, stored_CHW, image_CHW))
        kept_CHW = torch.where(filling | swaps, image_CHW, stored_CHW)
        pool_PCHW.index_copy_(0, place_1, kept_CHW[None])
    return torch.stack(shown).to(images_NCHW)
