"""The convolutions of a session as they are called, to be measured one by one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from engine.session import Session
from kernels.convolution import MAPS, Forms, Geometry, as_autocast, down, outer, up
from kernels.convolution_module import geometry, mappable
from pipelines.batch import Batch

Products = Mapping[str, Mapping[str, Forms]]
"""By player and layer, the maps that are matrix products."""


@dataclass(frozen=True)
class Call:
    """What a layer is given: `images` of `large` and `small` channels, in this memory format."""

    geometry: Geometry
    images: int
    large: int
    small: int
    dtype: torch.dtype
    format: torch.memory_format

    @property
    def flops(self) -> int:
        """Of each of its maps."""
        height, width = self.geometry.small
        return 2 * self.images * height * width * self.small * self.large * self.geometry.kernel**2

    def ways(self, device: torch.device) -> dict[str, dict[str, Callable[[], Tensor]]]:
        """Each of its maps, by the library and as a matrix product, on noise."""
        g, channels = self.geometry, (self.small, self.large)
        large_NLHW = self._noise(device, self.images, self.large, *g.size)
        small_NSPQ = self._noise(device, self.images, self.small, *g.small)
        weight_SLKK = self._noise(device, *channels, g.kernel, g.kernel)
        given = {
            "down": (down, large_NLHW, weight_SLKK),
            "up": (up, small_NSPQ, weight_SLKK),
            "outer": (outer, large_NLHW, small_NSPQ),
        }
        product = replace(g, matmul=frozenset(MAPS))
        return {
            name: {"library": partial(*call, g), "matmul": partial(*call, product)}
            for name, call in given.items()
            if product.takes(name)
        }

    def _noise(self, device: torch.device, *shape: int) -> Tensor:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return noise.to(device, self.dtype).contiguous(memory_format=self.format)


def calls(live: Session, batch: Batch) -> dict[tuple[str, str], Call]:
    """By player and layer, what the convolutions that could be matrix products are given in an
    iteration; of a layer that is given several things, the last."""
    found: dict[tuple[str, str], Call] = {}

    def note(place: tuple[str, str], layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        found[place] = _call(layer, given[0])

    hooks = [
        layer.register_forward_pre_hook(partial(note, (name, where)))
        for name, player in live.players.items()
        for where, layer in mappable(player.network).items()
    ]
    with live.rehearsing():
        live.rehearse(batch)
    for hook in hooks:
        hook.remove()
    return found


def _call(layer: nn.Module, x_NCHW: Tensor) -> Call:
    small, large = layer.weight.shape[:2]
    last = layer.weight.is_contiguous(memory_format=torch.channels_last)
    format_ = torch.channels_last if last else torch.contiguous_format
    return Call(
        geometry(layer, x_NCHW),
        x_NCHW.shape[0],
        large,
        small,
        as_autocast(x_NCHW)[0].dtype,
        format_,
    )


def products(chosen: list[tuple[str, ...]]) -> Products:
    """Of (player, layer, map) each."""
    found: dict[str, dict[str, Forms]] = {}
    for player, layer, map_ in chosen:
        layers = found.setdefault(player, {})
        layers[layer] = layers.get(layer, frozenset()) | {map_}
    return found
