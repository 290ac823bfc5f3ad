"""What a recipe costs and how it would run: FLOPs counted without data, and the dry-run page."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from engine.compile import Compiler
from engine.precision import Precision
from engine.recipe import flatten
from engine.session import Session, build_networks, start
from engine.settings import Recipe
from engine.world import Ranks
from pipelines.batch import Batch
from pipelines.captions import LENGTH

META = torch.device("meta")


class FlopCount(TorchDispatchMode):
    """Adds up the FLOPs (2 per multiply-add) of every operation below it, backward passes too."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if counter := flop_registry.get(func._overloadpacket):
            self.total += counter(*args, **(kwargs or {}), out_val=out)
        return out


@dataclass(frozen=True)
class Cost:
    """What one iteration takes: FLOPs per image of the global batch, and the compiled functions."""

    flops_per_image: float
    units: tuple[str, ...]


def cost(recipe: Recipe, classes: int = 0) -> Cost:
    """FLOPs (all updates, forward and backward) and compile units of the mean iteration.

    Counted by running the step on the meta device, which holds no data: a step that reads a
    value back to the host fails here.
    """
    session = without_data(recipe, few_images(recipe), classes)
    images, period = session.clock.batch, recipe.step.period()
    session.clock.seek(recipe.step.settles() * images)
    with session.rehearsing(), FlopCount() as count:
        for _ in range(period):
            session.step(example_batch(recipe, images))
            session.clock.advance()
    compiler = next(iter(session.players.values())).compiler
    return Cost(count.total / images / period, tuple(compiler.units.values()))


def few_images(recipe: Recipe) -> int:
    """Of a micro-batch that counts as any other does."""
    return min(4, max(recipe.data.batch // recipe.accumulate, 1))


def without_data(recipe: Recipe, images: int, classes: int = 0) -> Session:
    """A session on the meta device, of one rank in float32, with so many images a micro-batch."""
    batch = images * recipe.accumulate
    data = replace(recipe.data, batch=batch)
    small = replace(recipe, data=data, sync_bn="off", precision="fp32")
    ranks, precision = Ranks(0, 0, 1, META), Precision("fp32", "counting", "cpu")
    return start(small, ranks, precision, Compiler(False, "counting"), batch, classes)


def example_batch(recipe: Recipe, images: int, device: torch.device = META) -> Batch:
    """A batch of black images, laid out as those of any pipeline."""
    data = recipe.data

    def black(height: int, width: int) -> Tensor:
        images_NHWC = torch.full((images, height, width, data.channels), -1.0, device=device)
        return images_NHWC.permute(0, 3, 1, 2)  # channels_last by its strides, also with one

    sides = data.resolution, data.resolution
    labels = torch.zeros(images, dtype=torch.int64, device=device)
    positions: Tensor = torch.arange(images, device=device)
    batch = Batch(black(*sides), labels, positions)
    if recipe.step.reads_captions():
        batch.tokens_NL = labels[:, None].repeat(1, LENGTH)
        batch.lengths_N = torch.full_like(labels, LENGTH)
    if data.has_pairs():
        batch.pair_NCHW = black(*(side // (data.scale or 1) for side in sides))
    return batch


def parameters(network: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def show(
    console: Console, name: str, recipe: Recipe, facts: dict[str, str], classes: int = 0
) -> None:
    """Print the resolved recipe, its networks and how it would run."""
    settings = Table("setting", "value", title=f"{name}: settings", title_justify="left")
    for flag, value in flatten(recipe, flags=True).items():
        settings.add_row(f"--{flag}", "" if value is None else str(value))
    console.print(settings)
    networks = Table("player", "network", "parameters", title="networks", title_justify="left")
    for player, network in build_networks(recipe, classes).items():
        kind = repr(recipe.step.players()[player].network)
        networks.add_row(player, kind, f"{parameters(network):,}")
    console.print(networks)
    run = Table("", "", title="run", title_justify="left", show_header=False)
    for fact, text in facts.items():
        run.add_row(fact, text)
    console.print(run)
