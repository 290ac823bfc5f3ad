"""A trained model opened for use: a run's networks, rebuilt from recipe.json and filled from a
checkpoint. An export serves through the same interface (see `engine.exported`).

Shapes: N images, C channels, H height, W width, L latent.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from engine import checkpoint
from engine.algorithm import Networks
from engine.networks.conditional import with_classes
from engine.origin import Origin
from engine.run import RunError, read_recipe
from engine.session import build_networks
from engine.settings import Recipe
from engine.stored import CheckpointError, Loaded
from engine.translation import Direction, Translation
from engine.world import choose_device
from kernels import philox
from pipelines.settings import Data

LATENTS = 3  # noise stream; training takes 1, a run's own pictures 2

Choice = int | Literal["best"] | None  # a checkpoint: of so many images, the best, the newest whole


@dataclass(frozen=True)
class Model:
    """What makes images from latent vectors or of images, at one checkpoint of a run."""

    name: str
    """Name of the recipe."""
    images: int
    """Images seen at the checkpoint."""
    averaged: bool
    """The weights are moving averages."""
    device: torch.device
    checkpoint: str
    """SHA-256 of the checkpoint's index."""

    @property
    def channels(self) -> int:
        """Channels of its images."""
        raise NotImplementedError

    @property
    def resolution(self) -> int:
        """Height and width of its images."""
        raise NotImplementedError

    def latent_dim(self) -> int:
        """Length of the latent vector."""
        raise NotImplementedError

    def classes(self) -> int:
        """Classes that the last numbers of the latent vector choose from; 0 where they do not."""
        raise NotImplementedError

    def forward(self, z_NL: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] of latents that are on the model's device."""
        raise NotImplementedError

    def reconstruct(self, images_NCHW: Tensor) -> Tensor:
        """What it makes of given images, on its device. Raises ValueError where it cannot."""
        raise ValueError("an export holds only what makes images")

    def translation(self) -> Translation:
        """How `translate` takes images. Raises ValueError where it makes none of them."""
        raise NotImplementedError

    def translate(self, images_NCHW: Tensor, direction: Direction) -> Tensor:
        """Images in [-1, 1] of images (N, C, H, W) that are on the model's device."""
        raise NotImplementedError

    def latents(self, seed: int, position_N: Tensor) -> Tensor:
        """Latent vectors (N, L) of these image numbers (int64 (N,)) of a seed."""
        key = philox.make_key(seed, device=self.device)
        return philox.normal(key, LATENTS, position_N.to(self.device), self.latent_dim())

    def decode(self, z_NL: Tensor, batch: int) -> Iterator[Tensor]:
        """Images (up to `batch`, C, H, W) in [-1, 1] on the host, of all latents in their order.

        Every forward has `batch` images, the last being filled up: a kernel may round differently
        at another batch size, and image k must not depend on how many follow it.
        """
        for part_NL in z_NL.split(batch):
            missing = batch - len(part_NL)
            full_NL = torch.cat([part_NL, part_NL.new_zeros(missing, part_NL.shape[1])])
            with torch.no_grad():
                images_NCHW = self.forward(full_NL)
            yield images_NCHW[: len(part_NL)].cpu()

    def samples(
        self, seed: int, count: int, batch: int, label_N: Tensor | None = None
    ) -> Iterator[Tensor]:
        """The first `count` images of a seed, batch by batch; of these classes (int64 (count,))
        where they are given, else of those that the seed chooses."""
        for first in range(0, count, batch):
            position_N = torch.arange(first, min(first + batch, count))
            z_NL = self.latents(seed, position_N)
            if label_N is not None:
                z_NL = with_classes(z_NL, label_N[position_N].to(z_NL.device), self.classes())
            yield from self.decode(z_NL, batch)

    def origin(self, seed: int, composite: bool = False) -> Origin:
        """What pictures made with it say of where they come from."""
        return Origin(self.name, self.checkpoint, seed, self.images, composite=composite)


@dataclass(frozen=True)
class Trained(Model):
    """A run's networks at one checkpoint, in eval mode, ready to sample from."""

    recipe: Recipe
    networks: Networks
    index: dict[str, Any]
    """The checkpoint's own account of itself."""

    def data_at(self, place: object) -> Data:
        """The run's data settings with where the dataset lies now: those fields of `place` that
        are not None."""
        return replace(self.recipe.data, **{k: v for k, v in vars(place).items() if v is not None})

    @property
    def words(self) -> tuple[str, ...]:
        """What the numbers of the captions that it was trained on mean; empty without captions."""
        return tuple(self.index.get("words", ()))

    @property
    def channels(self) -> int:
        return self.recipe.data.channels

    @property
    def resolution(self) -> int:
        return self.recipe.data.resolution

    def latent_dim(self) -> int:
        return self.recipe.step.latent_dim()

    def classes(self) -> int:
        return self.recipe.step.classes()

    def forward(self, z_NL: Tensor) -> Tensor:
        return self.recipe.step.decode(self.networks, z_NL)

    def reconstruct(self, images_NCHW: Tensor) -> Tensor:
        return self.recipe.step.reconstruct(self.networks, images_NCHW)

    def translation(self) -> Translation:
        return self.recipe.step.translation(self.recipe.data)

    def translate(self, images_NCHW: Tensor, direction: Direction) -> Tensor:
        return self.recipe.step.translate(self.networks, images_NCHW, direction)


def open_run(
    folder: Path,
    images: Choice = None,
    ema: bool = True,
    device: str = "auto",
    warn: Callable[[str], None] = print,
) -> Trained:
    """The networks of a run at its newest whole checkpoint, at the one of so many images, or at
    the best that it has measured.

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
    digest = loaded.index["index_sha256"]
    return Trained(
        name, loaded.images, averaged, place, digest, recipe, networks, index=loaded.index
    )


def _part(loaded: Loaded, prefix: str) -> dict[str, Tensor]:
    paths = [path for path in loaded.shared if path.startswith(prefix)]
    return {path.removeprefix(prefix): loaded.shared[path] for path in paths}


def _read_checkpoint(
    folder: Path, recipe: Recipe, images: Choice, warn: Callable[[str], None]
) -> Loaded:
    """A verified checkpoint: the newest whole one, or the one asked for and no other."""
    root = folder / "checkpoints"
    there = checkpoint.listing(root)
    if not there:
        raise RunError(_without_checkpoints(folder, recipe.outputs.checkpoint_every * 1000))
    if images is None:
        chosen = checkpoint.newest_whole(root, warn)
    else:
        wanted = best_of(root) if images == "best" else images
        chosen = next((p for p in there if int(p.name) == wanted), None)
        if chosen is None:
            numbers = ", ".join(str(int(p.name)) for p in there)
            raise ValueError(f"--checkpoint {images}: {folder} has none of that; it has {numbers}")
        if damage := checkpoint.damage_of(chosen):
            raise CheckpointError(f"checkpoint {chosen} is damaged ({damage}); take another")
    if chosen is None:
        raise CheckpointError(
            f"no checkpoint in {root} is whole: put back the files of one, "
            f"or train anew with --fresh"
        )
    return Loaded(chosen)


def _without_checkpoints(folder: Path, first: float) -> str:
    """Why a run has none: it came too short so far, or they were removed."""
    images, finished = _seen(folder / "stats.jsonl")
    if finished or images >= first:
        return (
            f"{folder} was trained to {images:,} images, but its checkpoints are gone from "
            f"{folder / 'checkpoints'}: put them back, or run the training command again"
        )
    return (
        f"{folder} has no checkpoint yet: the first is written after {first:,.0f} images, or when "
        f"training is stopped"
    )


def _seen(stats: Path) -> tuple[int, bool]:
    """(images seen, whether the run came to its end) by a run's stats.jsonl; (0, False) of none."""
    images, finished = 0, False
    with contextlib.suppress(OSError):
        for line in stats.read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn line
                entry = json.loads(line)
                images = max(images, entry["images"])
                finished |= entry.get("event") == "finish"
    return images, finished


def best_of(root: Path) -> int:
    """Images seen at the best checkpoint that a run has measured. Raises ValueError."""
    best = checkpoint.read_best(root)
    if best is None:
        raise ValueError(
            f"--checkpoint best: {root / checkpoint.BEST} names no checkpoint that is there; the "
            f"best is kept where a run measures itself (--metrics.every-kimg)"
        )
    return best["images"]
