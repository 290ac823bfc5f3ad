"""Where toy players of tests live, and what tests read of their weights."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from engine.precision import Precision
from engine.settings import Recipe
from engine.world import Ranks

CPU = torch.device("cpu")
RANKS = Ranks(0, 0, 1, CPU)
FP32 = Precision("fp32", "test", "cpu")
BATCH = 8
EPS = 1e-3


def steady(recipe: Recipe) -> Recipe:
    """The recipe with a large epsilon: Adam makes whole steps of a gradient that is rounding alone,
    as that of a bias before a norm."""
    players = {
        name: replace(player, optimizer=replace(player.optimizer, eps=EPS))
        for name, player in recipe.step.players().items()
    }
    return replace(recipe, step=replace(recipe.step, **players))


def pictures(count: int, side: int, seed: int) -> Tensor:
    """Colour noise in [-1, 1], (count, 3, side, side)."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def weights(network: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def moved(network: nn.Module, before: list[Tensor]) -> bool:
    return any(not torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))
