"""Where does self-attention look? Maps of what some places of a sample take from all others, as in
Zhang et al. 2019, figure 5.

Shapes: N images, C channels, H height, W width, Q places that ask, K places that answer.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from engine.anomalies import in_colours
from engine.networks.sagan import Attention

ASKING = ((0.3, 0.3), (0.3, 0.7), (0.7, 0.3), (0.5, 0.5))
"""Places that ask: down and right, as shares of the sides."""
COLUMNS = 1 + len(ASKING)
MARK = torch.tensor([-1.0, 1.0, -1.0])  # green


def layer_of(network: nn.Module) -> Attention:
    """Its attention layer. Raises ValueError for a network without one."""
    found = [m for m in network.modules() if isinstance(m, Attention)]
    if not found:
        raise ValueError(
            "--attention is for self-attention GANs such as sagan_celeba; for attngan_birds add "
            "--caption TEXT"
        )
    return found[0]


@torch.no_grad()
def drawn(network: nn.Module, make: Callable[[], Tensor]) -> Tensor:
    """Pictures (N * COLUMNS, 3, H, W) in [-1, 1]: each image that `make` makes by the network, then
    the maps of the places that ask, each scaled to its largest weight, with that place marked."""
    layer, seen = layer_of(network), []
    handle = layer.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    try:
        images_NCHW = make()
    finally:
        handle.remove()
    x_NCHW = seen[-1].float()
    weights_NQK, (height, width) = layer.weights(x_NCHW), x_NCHW.shape[2:]
    columns = [images_NCHW.float().expand(-1, 3, -1, -1)]
    for down, right in ASKING:
        place = int(down * height) * width + int(right * width)
        map_N1HW = weights_NQK[:, place].view(-1, 1, height // 2, width // 2)
        columns.append(_coloured(map_N1HW, images_NCHW.shape[-2:], down, right))
    return torch.stack(columns, 1).flatten(0, 1)


def _coloured(map_N1HW: Tensor, size: torch.Size, down: float, right: float) -> Tensor:
    heat_N1HW = 2 * map_N1HW / map_N1HW.amax((2, 3), keepdim=True)
    picture_N3HW = in_colours(interpolate(heat_N1HW, size=tuple(size), mode="bilinear"))
    row, column, reach = int(down * size[0]), int(right * size[1]), max(size[0] // 32, 1)
    spot = (slice(row - reach, row + reach), slice(column - reach, column + reach))
    picture_N3HW[:, :, *spot] = MARK.to(picture_N3HW).view(3, 1, 1)
    return picture_N3HW
