"""Optimizers that guard themselves: a step is skipped, on the device, where a gradient is not
finite.

The guard is in the optimizer, and not around it, because a sharder may call its step with flat
parts of the parameters that nobody else sees.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.settings import Adam, Optimizer, RMSprop


class Guarded(torch.optim.Optimizer):
    """The gradient's norm, clipping and the guard, for optimizers that know the protocol of fused
    ones: found_inf (float (), not 0 to skip the step) is read on the device.

    norm: of the last step's gradient before clipping, (). clip: largest norm, 0 does not clip.
    spread: this rank holds a part of the parameters only, the norm is taken over all ranks.
    """

    clip = 0.0
    spread = False
    scaled = False  # loss scaling decides which steps are skipped
    norm = torch.zeros(())

    def guard(self) -> None:
        """Measure, clip, and skip what is not finite on any rank."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.norm = self._norm([p.grad for p in parameters if p.grad is not None])
        if self.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.clip, self.norm)
        if not self.scaled:
            self.grad_scale = None
            self.found_inf = (~self.norm.isfinite()).float()

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        if not gradients:
            return torch.zeros(())
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if not self.spread:
            return norm
        square = norm.square()
        dist.all_reduce(square)
        return square.sqrt()

    def fresh(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        raise NotImplementedError


class GuardedAdam(Guarded, torch.optim.Adam):
    """Adam (Kingma and Ba 2015). lr: float, or a tensor () that is read on the device."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """One step, if the gradient is finite on all ranks."""
        self.guard()
        super().step(closure)

    def fresh(self, p: Tensor) -> dict[str, Tensor]:
        count = torch.zeros((), dtype=torch.float32, device=p.device)
        return {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


class GuardedRMSprop(Guarded):
    """RMSprop (Tieleman and Hinton 2012, lecture 6.5) as torch.optim.RMSprop computes it, which
    cannot skip a step on the device."""

    _step_supports_amp_scaling = True

    def __init__(
        self, parameters: Iterable[Tensor], lr: float | Tensor, alpha: float, eps: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "alpha": alpha, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """One step, if the gradient is finite on all ranks."""
        self.guard()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                self.state[p] = self.state[p] or self.fresh(p)
            if parameters:
                self._move(parameters, group)

    def _move(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        taken = self.found_inf.to(parameters[0].device) == 0
        squares = [self.state[p]["square_avg"] for p in parameters]
        gradients = [torch.where(taken, p.grad, 0.0) for p in parameters]
        torch._foreach_mul_(squares, 1 - (1 - group["alpha"]) * taken.float())
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - group["alpha"])
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_div_(gradients, roots)
        torch._foreach_mul_(gradients, -group["lr"])
        torch._foreach_add_(parameters, gradients)

    def fresh(self, p: Tensor) -> dict[str, Tensor]:
        return {"square_avg": torch.zeros_like(p)}


def make_optimizer(
    settings: Optimizer, parameters: Iterable[Tensor], lr: float | Tensor, fused: bool = True
) -> Guarded:
    """The optimizer of these settings, with this learning rate in place of theirs."""
    if isinstance(settings, RMSprop):
        return GuardedRMSprop(parameters, lr, settings.alpha, settings.eps)
    assert isinstance(settings, Adam)
    adam = GuardedAdam(
        parameters, lr=lr, betas=settings.betas, eps=settings.eps, fused=fused, capturable=fused
    )
    adam._warned_capturable_if_run_uncaptured = True  # a fused step is as fast without a graph
    return adam
