"""What several ranks can do together, settled before anything starts."""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import nn

from engine.precision import Precision
from engine.recipe import image_spec
from engine.settings import Recipe
from engine.zero import missing
from launch.environment import accelerate_way

FEW = 16
"""Images below which BatchNorm's statistics suffer from their number (Wu and He 2018, "Group
normalization", figure 1: the error rises from 16 images down)."""


def settled(recipe: Recipe) -> Recipe:
    """The recipe with its way of sharing, where that is to be chosen, and with what its settings
    point at (`Algorithm.settled`). Raises ValueError."""
    recipe = replace(recipe, step=recipe.step.settled())
    if recipe.parallel != "auto":
        return recipe
    return replace(recipe, parallel=accelerate_way() or "ddp")


def check(recipe: Recipe, precision: Precision, world_size: int) -> None:
    """Raise ValueError, naming the nearest way that is supported, for what cannot be shared so."""
    way = recipe.parallel
    if way == "deepspeed-zero3" and recipe.step.second_order():
        raise ValueError(
            "--parallel deepspeed-zero3 cannot differentiate twice, as a gradient penalty does "
            "(the parameters are let go of in between): use --parallel deepspeed-zero2 or fsdp2"
        )
    if world_size == 1 or way == "ddp":
        return
    if way.startswith("deepspeed") and (obstacle := missing()):
        raise ValueError(f"--parallel {way}: {obstacle}")
    if precision.name == "fp16":
        raise ValueError(
            f"--parallel {way} has no loss scaling for --precision fp16: use --precision bf16, or "
            "--parallel ddp"
        )


def describe(recipe: Recipe, world_size: int) -> str:
    """The way in words."""
    if world_size == 1:
        return "nothing to share"
    synchronised, reason = choose_sync_bn(recipe, world_size)
    own = "" if synchronised else "not "
    images = recipe.data.batch // world_size
    return f"{recipe.parallel}, {images} images each; BatchNorm {own}synchronised ({reason})"


def compile_obstacle(recipe: Recipe, world_size: int) -> str:
    """Why a recipe cannot be compiled on so many ranks; empty if it can."""
    if choose_sync_bn(recipe, world_size)[0]:
        return "synchronised BatchNorm communicates inside the forward pass"
    if recipe.step.talks() and world_size > 1:
        return "the loss is of the images of all ranks, which communicate inside the forward pass"
    if recipe.parallel == "deepspeed-zero3" and world_size > 1:
        return "ZeRO-3 gathers parameters inside the forward pass"
    return ""


def choose_sync_bn(recipe: Recipe, world_size: int) -> tuple[bool, str]:
    """Whether BatchNorm takes its statistics over all ranks, and why."""
    if world_size == 1:
        return False, "one rank"
    if not with_norms(recipe):
        return False, "there is none"
    if recipe.sync_bn != "auto":
        return recipe.sync_bn == "on", "as asked"
    images = recipe.data.batch // (world_size * recipe.accumulate)
    few = images < FEW
    return few, f"{images} images on a rank are {'too few for' if few else 'enough for'} its own"


@lru_cache
def with_norms(recipe: Recipe) -> tuple[str, ...]:
    """The players whose networks have a BatchNorm, which sees the batch."""
    kind, spec = nn.modules.batchnorm._BatchNorm, image_spec(recipe)
    with torch.device("meta"):
        networks = {n: s.network.build(spec) for n, s in recipe.step.players().items()}
    return tuple(
        n for n, net in networks.items() if any(isinstance(m, kind) for m in net.modules())
    )
