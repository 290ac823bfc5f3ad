"""Exponential moving average of a player's weights, with a half-life counted in images."""

import copy
import math

import torch
from torch import Tensor, nn

from engine.parallel import Alone, Piece, State

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
        weight = _weight(device_images, batch, self.half_life)
        for shadow, source in self._floats:
            shadow.lerp_(source, weight)
        for shadow, source in self._others:
            shadow.copy_(source)

    def parameters(self) -> State:
        """The averaged parameters by name."""
        return {name: p.detach() for name, p in self.network.named_parameters()}

    def buffers(self) -> dict[str, Tensor]:
        """The averaged buffers by name."""
        return dict(self.network.named_buffers())


class ShardedAverage:
    """The same of a network whose parameters are spread over the ranks, each averaging its own
    part; buffers are whole."""

    def __init__(self, shared: Alone, half_life_kimg: float) -> None:
        self.half_life = half_life_kimg * 1000
        self._sources = shared.parameters()
        self._pieces = {n: p._replace(values=p.values.clone()) for n, p in self._sources.items()}
        self._live = dict(shared.network.named_buffers())
        self._buffers = {name: b.clone() for name, b in self._live.items()}

    @torch.no_grad()
    def follow(self, device_images: Tensor, batch: int) -> None:
        """As `Average.follow`."""
        weight = _weight(device_images, batch, self.half_life)
        for name, piece in self._pieces.items():
            piece.values.lerp_(self._sources[name].values, weight)
        for name, buffer in self._buffers.items():
            if buffer.is_floating_point():
                buffer.lerp_(self._live[name], weight)
            else:
                buffer.copy_(self._live[name])

    def parameters(self) -> dict[str, Piece]:
        """This rank's parts of the averaged parameters."""
        return self._pieces

    def buffers(self) -> dict[str, Tensor]:
        """The averaged buffers by name."""
        return self._buffers


def _weight(device_images: Tensor, batch: int, half_life: float) -> Tensor:
    """The share, (), that a batch of so many images takes from the network."""
    seen = (device_images + batch).float()
    return -torch.expm1(-math.log(2) * batch / torch.clamp(seen * RAMP, max=half_life))


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
