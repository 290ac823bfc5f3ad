"""A player, and its update: the only place that calls backward() and optimizer.step().

No line here waits for the device: non-finite values are counted on it and their updates skipped on
it, learning rates and the moving average read the clock's device tensor.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.compile import Compiler
from engine.ema import Average
from engine.parallel import local_gradients, wrap
from engine.precision import Precision
from engine.settings import Adam, PlayerSettings, Values
from engine.world import Ranks
from pipelines.batch import Clock


class Player:
    """The networks that one optimizer updates together, with that optimizer and their average."""

    def __init__(
        self,
        name: str,
        settings: PlayerSettings,
        network: nn.Module,
        *,
        ranks: Ranks,
        clock: Clock,
        precision: Precision,
        compiler: Compiler,
        accumulate: int = 1,
        total_images: int = 0,
    ) -> None:
        self.name, self.settings, self.network = name, settings, network
        self.clock, self.precision, self.compiler = clock, precision, compiler
        self.accumulate, self.total_images = accumulate, total_images
        self.root = wrap(network, ranks)
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        device = clock.device
        self.lr = torch.tensor(settings.optimizer.lr, device=device)
        real = device.type != "meta"
        self.optimizer = torch.optim.Adam(
            self.parameters,
            lr=self.lr if real else settings.optimizer.lr,
            betas=settings.optimizer.betas,
            eps=settings.optimizer.eps,
            fused=real,
        )
        self.scaler = precision.scaler()
        self.average = Average(network, settings.ema_kimg) if settings.ema_kimg else None
        self.bad_losses = torch.zeros((), device=device)
        self.bad_gradients = torch.zeros((), device=device)
        self.rehearsing = False

    @property
    def sampler(self) -> nn.Module:
        """The network to show and measure: the average where there is one, else the network."""
        return self.average.network if self.average else self.network

    def infer(self, fn: Callable, *args: Any) -> Any:
        """fn(network, *args) without gradients, compiled like a loss function."""
        with torch.no_grad(), self.precision.autocast():
            return self.compiler(fn)(self.network, *args)

    def update(self, loss_fn: Callable, *args: Any) -> Values:
        """Minimise loss_fn(network, *args) -> (loss, values) by one optimizer step.

        Tensor arguments with axes, the first being the batch, are split into micro-batches, the
        loss being a mean over the batch. Returns the values, averaged over micro-batches, with
        the loss and the gradient's norm.
        """
        sums: list[Tensor] = []
        chunks = self._micro_batches(args)
        for i, part in enumerate(chunks):
            reduce = i == len(chunks) - 1 and not self.rehearsing
            with local_gradients(self.root, reduce):
                with self.precision.autocast():
                    loss, values = self.root(self.compiler(loss_fn), *part)
                loss = loss / len(chunks)
                (self.scaler.scale(loss) if self.scaler else loss).backward()
            current = [loss.detach(), *(v.detach() / len(chunks) for v in values.values())]
            sums = current if not sums else [a + b for a, b in zip(sums, current, strict=True)]
        norm = self._optimize(sums[0])
        names = ("loss", *values, "grad_norm")
        return {f"{self.name}/{n}": v for n, v in zip(names, (*sums, norm), strict=True)}

    def _micro_batches(self, args: tuple) -> list[tuple]:
        if self.accumulate == 1:
            return [args]
        split = [
            a.chunk(self.accumulate) if isinstance(a, Tensor) and a.ndim else (a,) * self.accumulate
            for a in args
        ]
        return list(zip(*split, strict=True))

    @torch.no_grad()
    def _optimize(self, loss: Tensor) -> Tensor:
        """Step the optimizer unless loss or gradient is not finite; the gradient's norm, ()."""
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters]
        norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
        if self.rehearsing:
            return norm
        if self.settings.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip, norm)
        self._set_learning_rate()
        bad_loss = (~loss.isfinite()).float()
        self.bad_losses += bad_loss
        if self.scaler:  # an overflowing gradient is the scaler's daily work, not a failure
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            bad_gradient = (~norm.isfinite()).float()
            self.bad_gradients += bad_gradient
            # The fused optimizer's own protocol for "skip this step", read on the device.
            self.optimizer.grad_scale = None
            self.optimizer.found_inf = torch.maximum(bad_loss, bad_gradient)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.follow(self.clock.device_images, self.clock.batch)
        return norm

    def _set_learning_rate(self) -> None:
        factor = learning_rate_factor(
            self.settings.optimizer, self.clock.device_images, self.total_images
        )
        if factor is not None:
            self.lr.copy_(self.settings.optimizer.lr * factor)


def learning_rate_factor(adam: Adam, device_images: Tensor, total_images: int) -> Tensor | None:
    """Share of the base learning rate after `device_images` (int64 ()), or None where constant."""
    if not adam.warmup_kimg and not adam.decay_kimg:
        return None
    images = device_images.float()
    factor = torch.ones_like(images)
    if adam.warmup_kimg:
        factor = torch.clamp((images + 1) / (adam.warmup_kimg * 1000), max=1.0)
    if adam.decay_kimg:
        left = (total_images - images) / min(adam.decay_kimg * 1000, total_images / 2)
        factor = factor * torch.clamp(left, min=0.0, max=1.0)
    return factor


@contextmanager
def frozen(player: Player) -> Iterator[nn.Module]:
    """The player's network as a fixed judge: no gradient for its parameters."""
    for p in player.parameters:
        p.requires_grad_(False)
    try:
        yield player.network
    finally:
        for p in player.parameters:
            p.requires_grad_(True)
