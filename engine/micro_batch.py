"""How many images a rank takes at a time: by the free memory, where nothing depends on it."""

import socket
from dataclasses import replace

import torch

from engine.footprint import activation_bytes, free_memory, state_bytes
from engine.settings import Recipe
from engine.sharing import with_norms
from engine.world import Ranks

SHARE = 0.8
"""Of the free memory that activations may take: libraries' workspaces are not counted."""


def resolve(recipe: Recipe, classes: int, ranks: Ranks) -> tuple[Recipe, str]:
    """The recipe with as many micro-batches as --batch-per-rank asks for, and why so many.

    Raises ValueError where a norm sees the batch, and where not even one image has room.
    """
    own = recipe.data.batch // ranks.world_size
    if recipe.batch_per_rank is None:
        return recipe, "as asked"
    if recipe.batch_per_rank != "auto":
        return replace(recipe, accumulate=own // recipe.batch_per_rank), "as asked"
    if names := with_norms(recipe):
        raise ValueError(
            f"--batch-per-rank auto: the BatchNorm of the {names[0]} sees the micro-batch, whose "
            "size is thus part of what is trained: leave it out, or give a number"
        )
    room = min(ranks.gather(_room(recipe, classes, ranks)))
    each = activation_bytes(recipe, classes)
    parts = next((n for n in range(1, own + 1) if own % n == 0 and own // n * each <= room), 0)
    if not parts:
        raise ValueError(
            f"--batch-per-rank auto: one image takes {each / 2**20:,.0f} MiB, and there are "
            f"{max(room, 0) / 2**20:,.0f} MiB: use smaller networks, or --parallel fsdp2"
        )
    reason = f"{own // parts} images take {own // parts * each / 2**20:,.0f} MiB"
    return replace(recipe, accumulate=parts), f"{reason} of {room / 2**20:,.0f} MiB"


def _room(recipe: Recipe, classes: int, ranks: Ranks) -> float:
    """Bytes for activations on this rank."""
    state = sum(s.held for s in state_bytes(recipe, classes).values())
    if ranks.device.type == "cuda":
        return SHARE * (torch.cuda.mem_get_info(ranks.device)[0] - state)
    sharers = ranks.gather(socket.gethostname()).count(socket.gethostname())
    return SHARE * (free_memory() / sharers - state)
