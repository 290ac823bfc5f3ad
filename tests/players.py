"""Where toy players of tests live, and what tests read of their weights."""

import torch
from torch import Tensor, nn

from engine.precision import Precision
from engine.world import Ranks

CPU = torch.device("cpu")
RANKS = Ranks(0, 0, 1, CPU)
FP32 = Precision("fp32", "test", "cpu")
BATCH = 8


def weights(network: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def moved(network: nn.Module, before: list[Tensor]) -> bool:
    return any(not torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))
