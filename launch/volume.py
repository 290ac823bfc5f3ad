"""What one iteration of a recipe computes and what its ranks tell each other, counted without data.

The step runs on the meta device, as for `engine.describe.cost`; hooks note when each gradient is
there and which BatchNorm ran. Everything is for plain DDP, one reduction per update.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from engine.algorithm import Values
from engine.describe import FlopCount, example_batch, few_images, without_data
from engine.player import Made, Player
from engine.session import Session
from engine.settings import Recipe

FLAG = 4  # bytes: StopRequest's float, agreed on the host in each iteration
FLOAT = 4  # gradients and moments are float32, whatever the precision
NORMS = nn.modules.batchnorm._NormBase


class Count(FlopCount):
    """FLOPs, and how many operations have any: convolutions and products, which no compiler fuses
    with one another."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        before = self.total
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.products += self.total > before
        return out


@dataclass(frozen=True)
class Gradient:
    """A gradient of `size` bytes, there after so many FLOPs per image of the backward pass."""

    size: int
    ready: float


@dataclass(frozen=True)
class Update:
    """One update: FLOPs per image of its last micro-batch's backward pass, and the gradients in the
    order in which that gives them."""

    player: str
    backward: float
    gradients: tuple[Gradient, ...]

    def buckets(self, cap: int) -> list[Gradient]:
        """What DDP reduces at once: gradients in their order until `cap` bytes are reached
        (torch/csrc/distributed/c10d/reducer.cpp, compute_bucket_assignment_by_size). Its smaller
        first bucket is for those who give no cap, and the engine gives one."""
        made: list[Gradient] = []
        size = 0
        for i, gradient in enumerate(self.gradients):
            size += gradient.size
            if size >= cap or i == len(self.gradients) - 1:
                made.append(Gradient(size, gradient.ready))
                size = 0
        return made


@dataclass(frozen=True)
class Work:
    """What a recipe's iterations do until their pattern repeats.

    products: convolutions and matrix products of an iteration. gathers, sums: bytes of each
    collective of synchronised BatchNorm, and of the step's own, over the period. gathered: bytes of
    each image that its rank gives to all others in an iteration.
    """

    name: str
    batch: int
    period: int
    flops_per_image: float
    products: float
    updates: tuple[Update, ...]
    gathers: tuple[int, ...]
    sums: tuple[int, ...]
    gathered: int = 0

    def volume(self, images: int = 0) -> dict[str, float]:
        """Bytes that a rank with so many images gives into collectives in the mean iteration: each
        player's gradients, moments (those of synchronised BatchNorm, a codebook's, and images), the
        control flag."""
        found = {update.player: 0.0 for update in self.updates}
        for update in self.updates:
            found[update.player] += sum(g.size for g in update.gradients) / self.period
        moments = (sum(self.gathers) + sum(self.sums)) / self.period + images * self.gathered
        return found | {"moments": moments, "flag": FLAG}


class _Tape:
    """Notes what passes while a session runs on the meta device."""

    def __init__(self, live: Session, count: Count, images: int) -> None:
        self.count, self.images = count, images
        self.updates: list[Update] = []
        self.gathers: list[int] = []
        self.sums: list[int] = []
        for player in live.players.values():
            self._watch(player)

    def _watch(self, player: Player) -> None:
        arrived: list[Gradient] = []
        update, update_made, loss_known = player.update, player.update_made, 0

        def arrive(size: int, _: Tensor) -> None:
            done = (self.count.total - loss_known) / self.images
            arrived.append(Gradient(size, done))

        def recorded(call: Callable, loss_fn: Callable, *args: Any) -> Values:
            def marked(*inner: Any) -> tuple[Tensor, Values]:
                nonlocal loss_known
                result = loss_fn(*inner)
                loss_known = self.count.total
                arrived.clear()  # of the micro-batch before, which reduces nothing
                return result

            values = call(marked, *args)
            assert arrived, f"no gradient of {player.name} was noted"
            backward = (self.count.total - loss_known) / self.images
            self.updates.append(Update(player.name, backward, tuple(arrived)))
            return values

        def made_recorded(made: Made, *args: Any) -> Values:
            if made.held is None:  # made again in an update, which is recorded
                return update_made(made, *args)
            return recorded(partial(update_made, made), *args)

        player.update = partial(recorded, update)
        player.update_made = made_recorded
        for p in player.network.parameters():
            if p.requires_grad:
                p.register_hook(partial(arrive, p.numel() * FLOAT))

    def watch_norms(self, live: Session) -> None:
        """One all_gather of (3, C) forward, one all_reduce of (2, C) backward: see
        kernels/batchnorm_sync.py."""

        def passed(norm: NORMS, _: Any, output: Tensor) -> None:
            if getattr(norm, "plain", False):
                raise ValueError("synchronised BatchNorm inside a penalty is not modelled")
            if norm.training:
                self.gathers.append(3 * norm.num_features * FLOAT)
            if norm.training and output.requires_grad:
                self.sums.append(2 * norm.num_features * FLOAT)

        for player in live.players.values():
            for module in player.network.modules():
                if isinstance(module, NORMS):
                    module.register_forward_hook(passed)


def trace(name: str, recipe: Recipe, synchronised: bool = False) -> Work:
    """Count a recipe's iterations over one period of its step, with BatchNorm synchronised or
    not."""
    live = without_data(recipe, few_images(recipe))
    images, period, count = live.clock.batch, recipe.step.period(), Count()
    tape = _Tape(live, count, images)
    live.clock.seek(recipe.step.settles() * images)
    if synchronised:
        tape.watch_norms(live)
    if recipe.step.reduced():
        tape.sums += [recipe.step.reduced()] * period
    with live.rehearsing(), count:
        for _ in range(period):
            live.step(example_batch(recipe, images))
            live.clock.advance()
    return Work(
        name,
        recipe.data.batch,
        period,
        count.total / images / period,
        count.products / period,
        tuple(tape.updates),
        tuple(tape.gathers),
        tuple(tape.sums),
        recipe.step.gathered(recipe.data),
    )
