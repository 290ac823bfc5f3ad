"""A player, and its update: the only place that calls backward() and optimizer.step().

No line here waits for the device: non-finite values are counted on it and their updates skipped on
it, learning rates and the moving average read the clock's device tensor.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.algorithm import Values
from engine.compile import Compiler
from engine.ema import Average, ShardedAverage
from engine.networks.norms import statistics_kept
from engine.optimizer import make_optimizer
from engine.parallel import share
from engine.precision import Precision
from engine.settings import Optimizer, PlayerSettings
from engine.world import Ranks
from pipelines.batch import Clock


class Made(NamedTuple):
    """What a player's network made, for others to learn from before it is updated itself: a tensor,
    or a tuple of them."""

    tensor: Any
    """Without gradient."""
    held: Any
    """With the graph that made it; None where it is to be made again."""
    fn: Callable
    args: tuple
    """fn(network, *args) made it."""


class Player:
    """The networks that one optimizer updates together, with that optimizer and their average."""

    def __init__(
        self,
        name: str,
        settings: PlayerSettings,
        network: nn.Module,
        *,
        ranks: Ranks,
        parallel: str = "ddp",
        clock: Clock,
        precision: Precision,
        compiler: Compiler,
        accumulate: int = 1,
        total_images: int = 0,
        planar: bool = False,
    ) -> None:
        self.name, self.settings = name, settings
        self.clock, self.precision, self.compiler = clock, precision, compiler
        self.accumulate, self.total_images = accumulate, total_images
        self.shared = share(parallel, network, ranks, planar)
        self.network, self.parameters = network, self.shared.trained()
        self.lr = torch.tensor(settings.optimizer.lr, device=clock.device)
        self.average = None
        if settings.ema_kimg and not self.shared.sharded:  # a copy, before hooks are on the network
            self.average = Average(network, settings.ema_kimg)
        self._attach_optimizer(settings)
        if settings.ema_kimg and self.shared.sharded:
            self.average = ShardedAverage(self.shared, settings.ema_kimg)
        self.scaler = precision.scaler()
        self.bad_losses = torch.zeros((), device=clock.device)
        self.bad_gradients = torch.zeros((), device=clock.device)
        self.rehearsing = False
        self.stride: float = 1  # iterations from one update to the next, for the average
        self._gathered: nn.Module | None = None
        self._again: dict[tuple[Callable, Callable], Callable] = {}

    def _attach_optimizer(self, settings: PlayerSettings) -> None:
        real = self.clock.device.type != "meta"
        lr = self.lr if real else settings.optimizer.lr
        self.optimizer = make_optimizer(settings.optimizer, self.parameters, lr, fused=real)
        self.optimizer.clip, self.optimizer.spread = settings.clip, self.shared.spread
        self.shared.engage(self.optimizer, self.accumulate)

    @property
    def sampler(self) -> nn.Module:
        """The network to show and measure: the average where there is one, else the network. Where
        ranks hold parts of it, only inside `gathered`."""
        if self.shared.sharded:
            assert self._gathered is not None, "the network to show is not gathered"
            return self._gathered
        return self.average.network if self.average else self.network

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Have the whole network to show on every rank; all ranks enter."""
        if not self.shared.sharded:
            yield
            return
        shell = self.shared.shell.to_empty(device=self.clock.device)
        shown = self.average or self.shared
        buffers = self.average.buffers() if self.average else dict(self.network.named_buffers())
        pieces = shown.parameters()
        with torch.no_grad():
            for name, parameter in shell.named_parameters():
                parameter.copy_(pieces[name].whole())
            for name, buffer in shell.named_buffers():
                buffer.copy_(buffers[name])
        self._gathered = shell.train(self.network.training and not self.average)
        try:
            yield
        finally:
            self._gathered = None
            shell.to("meta")

    def infer(self, fn: Callable, *args: Any) -> Any:
        """fn(network, *args) without gradients, compiled like a loss function."""
        with torch.no_grad(), self.shared.whole() as network, self.precision.autocast():
            return self.compiler(fn)(network, *args)

    def make(self, fn: Callable, *args: Any, hold: bool = True) -> Made:
        """fn(network, *args), a tensor or a tuple; hold: `update_made` will minimise a loss of it.

        Its graph is held until then, so that it is made but once. Not so with micro-batches, which
        are there to save the memory, nor where ranks hold parts of the network: then it is made
        again.
        """
        if not hold or self.accumulate > 1 or self.shared.spread:
            return Made(self.infer(fn, *args), None, fn, args)
        rehearsal = self.shared.rehearsal() if self.rehearsing else nullcontext(self.shared.root)
        with rehearsal as root, self.precision.autocast():
            held = root(self.compiler(fn), *args)
        plain = held.detach() if isinstance(held, Tensor) else tuple(t.detach() for t in held)
        return Made(plain, held, fn, args)

    def update_made(self, made: Made, loss_fn: Callable, *args: Any) -> Values:
        """`update`, for loss_fn(made, *args) -> (loss, values) of what `make` made."""
        if made.held is None:
            with statistics_kept(self.network):
                return self.update(self._through(made, loss_fn), *made.args, *args)
        self.clock.enter(self.name)
        with self.precision.autocast():
            loss, values = self.compiler(loss_fn)(made.held, *args)
        self._backward(loss, self.network)
        found = {"loss": loss} | values
        return self._finished({name: value.detach() for name, value in found.items()})

    def _through(self, made: Made, loss_fn: Callable) -> Callable:
        """The loss as a function of the network and of both functions' arguments."""
        fn, count = made.fn, len(made.args)

        def loss_of_made(network: nn.Module, *args: Any) -> tuple[Tensor, Values]:
            return loss_fn(fn(network, *args[:count]), *args[count:])

        return self._again.setdefault((fn, loss_fn), loss_of_made)

    def update(self, loss_fn: Callable, *args: Any) -> Values:
        """Minimise loss_fn(network, *args) -> (loss, values) by one optimizer step.

        Tensor arguments with axes, the first being the batch, are split into micro-batches, the
        loss being a mean over the batch. Returns the loss, the gradient's norm and the values:
        those without axes averaged over micro-batches, what else a loss hands on put together.
        """
        self.clock.enter(self.name)
        chunks, found = self._micro_batches(args), []
        for i, part in enumerate(chunks):
            values = self._micro_update(loss_fn, part, len(chunks), last=i == len(chunks) - 1)
            found.append({name: value.detach() for name, value in values.items()})
        return self._finished({name: _joined([part[name] for part in found]) for name in found[0]})

    def _finished(self, values: Values) -> Values:
        """Step the optimizer; the values under the player's name, the gradient's norm with them."""
        norm = torch.zeros_like(self.lr) if self.rehearsing else self._optimize(values["loss"])
        return {f"{self.name}/{n}": v for n, v in (values | {"grad_norm": norm}).items()}

    def clip_weights(self, bound: float) -> None:
        """Clip every parameter to [-bound, bound]."""
        if not self.rehearsing:
            self.shared.clamp(bound)

    def restart(self) -> None:
        """Have the optimizer forget what it has seen: its state is as before a first step."""
        if not self.rehearsing:
            self.shared.restart()

    def _micro_update(self, loss_fn: Callable, part: tuple, parts: int, last: bool) -> Values:
        """Forward and backward of one micro-batch of so many; the loss and the values."""
        turn = self.shared.rehearsal() if self.rehearsing else self.shared.micro_batch(last)
        with turn as rehearsed:
            root = rehearsed or self.shared.root
            with self.precision.autocast():
                loss, values = root(self.compiler(loss_fn), *part)
            self._backward(loss, root, parts)
        return {"loss": loss} | values

    def _backward(self, loss: Tensor, module: nn.Module, parts: int = 1) -> None:
        """Add the gradient of one of so many micro-batches' losses; in a rehearsal one on which
        nothing depends and which tells no other rank."""
        if self.rehearsing:
            trained = [p for p in module.parameters() if p.requires_grad]
            torch.autograd.grad(self._scaled(loss), trained, allow_unused=True)
            return
        # A loss that is not finite spoils this rank's gradient (0 * inf is NaN) and so the mean
        # over ranks: all of them skip the step, without a word between them.
        share = 1.0 / parts + 0.0 * loss.detach()
        self.shared.backward(self._scaled(loss * share))

    def _scaled(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss) if self.scaler else loss

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
        self._set_learning_rate()
        self.shared.step(self.scaler)
        norm = self.optimizer.norm
        self.bad_losses += (~loss.isfinite()).float()
        if not self.scaler:  # an overflowing gradient is the scaler's daily work, not a failure
            self.bad_gradients += (~norm.isfinite()).float()
        if self.average:
            self.average.follow(self.clock.device_images, self.clock.batch * self.stride)
        return norm

    def _set_learning_rate(self) -> None:
        factor = learning_rate_factor(
            self.settings.optimizer, self.clock.device_images, self.total_images
        )
        if factor is not None:
            self.lr.copy_(self.settings.optimizer.lr * factor)


def _joined(parts: list[Tensor]) -> Tensor:
    """The mean of scalars; tensors with axes one after the other."""
    return torch.cat(parts) if parts[0].ndim else sum(part / len(parts) for part in parts)


def learning_rate_factor(
    settings: Optimizer, device_images: Tensor, total_images: int
) -> Tensor | None:
    """Share of the base learning rate after `device_images` (int64 ()), or None where constant."""
    if not settings.warmup_kimg and not settings.decay_kimg:
        return None
    images = device_images.float()
    factor = torch.ones_like(images)
    if settings.warmup_kimg:
        factor = torch.clamp((images + 1) / (settings.warmup_kimg * 1000), max=1.0)
    if settings.decay_kimg:
        left = (total_images - images) / min(settings.decay_kimg * 1000, total_images / 2)
        factor = factor * torch.clamp(left, min=0.0, max=1.0)
    return factor


@contextmanager
def frozen(player: Player) -> Iterator[nn.Module]:
    """The player's network as a fixed judge: no gradient for its parameters."""
    with player.shared.whole() as network:
        trained = [p for p in network.parameters() if p.requires_grad]
        for p in trained:
            p.requires_grad_(False)
        try:
            yield network
        finally:
            for p in trained:
                p.requires_grad_(True)
