"""Paths through the latent space: great arcs between Gaussian latents.

White 2016, "Sampling generative networks", section 2.1: the straight line between Gaussian latents
leaves the shell on which nearly all of them lie.

Shapes: N latents, L their length, F places on an arc.
"""

import torch
from torch import Tensor


def arcs(start_NL: Tensor, end_NL: Tensor, share_F: Tensor) -> Tensor:
    """Latents (N * F, L) at these shares of the great arc from each start to its end."""
    cosine_N = torch.nn.functional.cosine_similarity(start_NL, end_NL)
    angle_N11 = cosine_N.clamp(-1 + 1e-6, 1 - 1e-6).acos().view(-1, 1, 1)
    share_1F1 = share_F.to(start_NL).view(1, -1, 1)
    start = torch.sin((1 - share_1F1) * angle_N11) * start_NL[:, None]
    end = torch.sin(share_1F1 * angle_N11) * end_NL[:, None]
    return ((start + end) / angle_N11.sin()).flatten(0, 1)


def walk(z_NL: Tensor, frames: int) -> Tensor:
    """Latents (N * frames, L) of a closed walk from each latent to the next."""
    return arcs(z_NL, z_NL.roll(-1, 0), torch.arange(frames) / frames)


def between_pairs(z_NL: Tensor, places: int) -> Tensor:
    """Latents (N / 2 * places, L) from the first to the second, the third to the fourth, ...,
    with both ends."""
    return arcs(z_NL[::2], z_NL[1::2], torch.linspace(0, 1, places))
