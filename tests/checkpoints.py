"""Toy sessions to save and restore, and what tests read of a folder of checkpoints."""

from pathlib import Path

import torch

from engine import session
from engine.compile import Compiler
from engine.networks import dcgan
from engine.precision import Precision
from engine.session import Session
from engine.settings import Length, PlayerSettings, Recipe
from engine.steps.adversarial import Adversarial
from pipelines.batch import Batch
from pipelines.settings import Data
from tests.players import BATCH, RANKS

FACTS = {"recipe": "toy", "dataset": "abc"}


def recipe_of(width: int = 4, channels: int = 1, ema: float = 1.0, seed: int = 0) -> Recipe:
    return Recipe(
        data=Data(resolution=16, channels=channels, batch=BATCH),
        step=Adversarial(
            generator=PlayerSettings(dcgan.Generator(latent=6, width=width), ema_kimg=ema),
            discriminator=PlayerSettings(dcgan.Discriminator(width=width)),
        ),
        length=Length(steps=50),
        seed=seed,
    )


def started(recipe: Recipe | None = None, precision: str = "fp32") -> Session:
    kind = Precision(precision, "test", "cpu")
    return session.start(recipe or recipe_of(), RANKS, kind, Compiler(False, "test"), 400)


def advance(live: Session, steps: int) -> Session:
    """Train on images that are a function of the clock, as a pipeline's are."""
    data = live.recipe.data
    shape = (BATCH, data.channels, data.resolution, data.resolution)
    for _ in range(steps):
        random = torch.Generator().manual_seed(live.clock.images)
        images = (torch.rand(shape, generator=random) * 2 - 1).contiguous(
            memory_format=torch.channels_last
        )
        live.step(Batch(images, None, live.clock.position_N()))
        live.clock.advance()
    return live


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())
