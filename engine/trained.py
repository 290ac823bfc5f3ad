"""A trained run opened for use: its networks rebuilt from recipe.json, filled from a checkpoint.

Shapes: N images, C channels, H height, W width, L latent.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine import checkpoint
from engine.checkpoint import CheckpointError, Loaded
from engine.parallel import choose_device
from engine.run import RunError, read_recipe
from engine.session import build_networks
from engine.settings import Networks, Recipe
from kernels import philox

LATENTS = 3  # noise stream; training takes 1, a run's own pictures 2


@dataclass(frozen=True)
class Trained:
    """A run's networks at one checkpoint, in eval mode, ready to sample from."""

    name: str
    recipe: Recipe
    networks: Networks
    images: int
    averaged: bool
    device: torch.device

    def latents(self, seed: int, position_N: Tensor) -> Tensor:
        """Latent vectors (N, L) of these image numbers (int64 (N,)) of a seed."""
        key = philox.make_key(seed, device=self.device)
        size = self.recipe.step.latent_dim()
        return philox.normal(key, LATENTS, position_N.to(self.device), size)

    def decode(self, z_NL: Tensor, batch: int) -> Iterator[Tensor]:
        """Images (up to `batch`, C, H, W) in [-1, 1] on the host, of all latents in their order.

        Every forward has `batch` images, the last being filled up: a kernel may round differently
        at another batch size, and image k must not depend on how many follow it.
        """
        for part_NL in z_NL.split(batch):
            missing = batch - len(part_NL)
            full_NL = torch.cat([part_NL, part_NL.new_zeros(missing, part_NL.shape[1])])
            with torch.no_grad():
                images_NCHW = self.recipe.step.decode(self.networks, full_NL)
            yield images_NCHW[: len(part_NL)].cpu()

    def samples(self, seed: int, count: int, batch: int) -> Iterator[Tensor]:
        """The first `count` images of a seed, batch by batch."""
        for first in range(0, count, batch):
            position_N = torch.arange(first, min(first + batch, count))
            yield from self.decode(self.latents(seed, position_N), batch)


def open_run(
    folder: Path,
    images: int | None = None,
    ema: bool = True,
    device: str = "auto",
    warn: Callable[[str], None] = print,
) -> Trained:
    """The networks of a run at its newest whole checkpoint, or at the one of so many images.

    warn: hears of damaged checkpoints that are passed over.

    Raises RunError, CheckpointError, or ValueError naming a setting.
    """
    name, recipe, _ = read_recipe(folder)
    place = choose_device(device)
    loaded = _read_checkpoint(folder, recipe, images, warn)
    networks = build_networks(recipe, loaded.index["classes"])
    averaged = False
    for player, network in networks.items():
        averages = _part(loaded, f"{player}/average/") if ema else {}
        averaged |= bool(averages)
        try:
            network.load_state_dict(averages or _part(loaded, f"{player}/network/"))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{loaded.folder} does not fit the recipe: {reason}") from error
        network.to(place, memory_format=torch.channels_last).eval().requires_grad_(False)
    return Trained(name, recipe, networks, loaded.images, averaged, place)


def _part(loaded: Loaded, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in loaded.shared.items() if k.startswith(prefix)}


def _read_checkpoint(
    folder: Path, recipe: Recipe, images: int | None, warn: Callable[[str], None]
) -> Loaded:
    """A verified checkpoint: the newest whole one, or the one asked for and no other."""
    root = folder / "checkpoints"
    there = checkpoint.listing(root)
    if not there:
        raise RunError(
            f"{folder} has no checkpoint yet: the first is written after "
            f"{recipe.outputs.checkpoint_every * 1000:,.0f} images, or when training is stopped"
        )
    if images is None:
        chosen = checkpoint.newest_whole(root, warn)
    else:
        chosen = next((p for p in there if int(p.name) == images), None)
        if chosen is None:
            numbers = ", ".join(str(int(p.name)) for p in there)
            raise ValueError(f"--checkpoint {images}: {folder} has none of that; it has {numbers}")
        if damage := checkpoint.damage_of(chosen):
            raise CheckpointError(f"checkpoint {chosen} is damaged ({damage}); take another")
    if chosen is None:
        raise CheckpointError(f"no checkpoint in {root} is whole; run the training command again")
    return checkpoint.read(chosen)
