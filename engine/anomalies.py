"""Which held-out images show how anomalies are found, and how do heat maps look?

Shapes: N images, C channels, H height, W width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipelines.datasets import decode_some, find
from pipelines.order import Order
from pipelines.settings import Data


@dataclass(frozen=True)
class Group:
    """Held-out images of one kind; name: of their classes, or what they are."""

    name: str
    images_NCHW: Tensor


def normal_and_anomalous(data: Data, seed: int, count: int) -> tuple[Group, Group]:
    """Up to `count` held-out images of classes that were trained on, and just as many of those that
    were not, in an order fixed by the seed; (N, C, H, W) in [-1, 1], on the host.

    Raises DatasetMissing, NoSplit, ValueError without labels, and BadImage unless skipped.
    """
    dataset = find(data, "test")
    if dataset.labels is None:
        raise ValueError(f"the held-out images of {dataset.name} have no classes to choose by")
    rows_N = Order(len(dataset), seed).rows(np.arange(len(dataset)))
    unseen_N = np.isin(dataset.labels[rows_N], data.without)
    names = [dataset.classes[c] if c < len(dataset.classes) else str(c) for c in data.without]
    groups = []
    for name, mask_N in (("normal", ~unseen_N), (f"class {', '.join(names)}", unseen_N)):
        chosen = rows_N[mask_N].tolist()
        if not chosen:
            raise ValueError(f"the held-out images of {dataset.name} have none that are: {name}")
        images_NCHW = decode_some(dataset, chosen, count, data.on_error == "skip")
        groups.append(Group(name, torch.from_numpy(images_NCHW).float() / 127.5 - 1))
    fewest = min(len(group.images_NCHW) for group in groups)
    normal, anomalous = (Group(g.name, g.images_NCHW[:fewest]) for g in groups)
    return normal, anomalous


def in_colours(heat_N1HW: Tensor) -> Tensor:
    """Heat in [0, 2] as pictures (N, 3, H, W) in [-1, 1]: black, red, yellow, white."""
    thirds = torch.tensor([0.0, 1.0, 2.0], device=heat_N1HW.device).view(1, 3, 1, 1)
    return (1.5 * heat_N1HW - thirds).clamp(0, 1) * 2 - 1


def spread(maps_NThw: Tensor) -> Tensor:
    """Maps as heat: each from 0 at its least value to 2 at its largest."""
    least, most = maps_NThw.amin((2, 3), keepdim=True), maps_NThw.amax((2, 3), keepdim=True)
    return 2 * (maps_NThw - least) / (most - least).clamp(min=1e-8)


def columns_of(images_NCHW: Tensor, made_NCHW: Tensor, heat_N1HW: Tensor) -> Tensor:
    """One row of images, one of what was made of them, one of heat maps: (3 N, 3, H, W)."""
    grey = (x.expand(-1, 3, -1, -1) for x in (images_NCHW, made_NCHW))
    return torch.cat([*grey, in_colours(heat_N1HW)])
