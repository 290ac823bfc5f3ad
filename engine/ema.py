"""Exponential moving average of a player's weights, with a half-life counted in images."""

import copy
import math

import torch
from torch import Tensor, nn

RAMP = (
    0.05  # early on the half-life is this share of the images seen (Karras et al. 2020, ADA code)
)


class Average:
    """Shadow of a network, in eval mode, that follows its float parameters and buffers.

    weight after each batch: 1 - 0.5 ** (batch / half_life), the fraction taken from the network.
    """

    def __init__(self, network: nn.Module, half_life_kimg: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.half_life = half_life_kimg * 1000
        pairs = list(zip(_tensors(self.network), _tensors(network), strict=True))
        self._floats = [(a, b) for a, b in pairs if a.is_floating_point()]
        self._others = [(a, b) for a, b in pairs if not a.is_floating_point()]

    @torch.no_grad()
    def follow(self, device_images: Tensor, batch: int) -> None:
        """Take in the network's weights after an iteration of `batch` images.

        device_images: images seen before it, int64 (), so that a captured iteration needs no host.
        """
        seen = (device_images + batch).float()
        half_life = torch.clamp(seen * RAMP, max=self.half_life)
        weight = -torch.expm1(-math.log(2) * batch / half_life)
        for shadow, source in self._floats:
            shadow.lerp_(source, weight)
        for shadow, source in self._others:
            shadow.copy_(source)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
