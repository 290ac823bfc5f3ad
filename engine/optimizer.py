"""Adam that guards itself: its step is skipped, on the device, where a gradient is not finite.

The guard is in the optimizer, and not around it, because a sharder may call its step with flat
parts of the parameters that nobody else sees.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class GuardedAdam(torch.optim.Adam):
    """Adam (Kingma and Ba 2015) with the gradient's norm, clipping and the guard.

    norm: of the last step's gradient before clipping, (). lr: float, or a tensor () that is read on
    the device. clip: largest norm, 0 does not clip. spread: this rank holds a part of the
    parameters only, the norm is taken over all ranks.
    """

    def __init__(
        self, parameters: Iterable[Tensor], *, clip: float = 0.0, spread: bool = False, **adam: Any
    ) -> None:
        super().__init__(parameters, **adam)
        self.clip, self.spread = clip, spread
        self.scaled = False  # loss scaling decides which steps are skipped
        self.norm = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """One step, if the gradient is finite on all ranks."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.norm = self._norm([p.grad for p in parameters if p.grad is not None])
        if self.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.clip, self.norm)
        if not self.scaled:
            # The fused optimizer's own protocol for "skip this step", read on the device.
            self.grad_scale = None
            self.found_inf = (~self.norm.isfinite()).float()
        super().step(closure)

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        norm = nn.utils.get_total_norm(gradients)
        if not self.spread:
            return norm
        square = norm.square()
        dist.all_reduce(square)
        return square.sqrt()
