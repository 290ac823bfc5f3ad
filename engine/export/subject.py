"""What of a run is exported? What makes images from latent vectors, or else, in one direction, what
makes images of one image each; and what an export's configuration says of its inputs and outputs.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from engine import recipe
from engine.algorithm import Algorithm
from engine.networks.spec import Network
from engine.trained import Trained
from engine.translation import Direction, Translation

Config = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What is exported: a module, the settings that build it, and how it takes images (None: it
    takes latent vectors)."""

    module: nn.Module
    settings: Network
    kind: Translation | None


def subject_of(trained: Trained, asked: Direction | None = None) -> Subject:
    """What a run has, in the direction that is asked for. Raises ValueError where it has neither,
    or no such direction."""
    step, data = trained.recipe.step, trained.recipe.data
    if type(step).translator is not Algorithm.translator:
        kind = step.translation(data)
        way = kind.chosen(asked, trained.name)
        settings = step.translator_settings(way)
        side = None if settings.any_size else given_side(trained)
        kind = replace(kind, directions=(way,) if kind.directions else (), side=side)
        return Subject(step.translator(trained.networks, data, way), settings, kind)
    if type(step).sampler is Algorithm.sampler:
        works = " or ".join(step.uses().values())
        raise ValueError(
            f"{trained.name} cannot be exported: only models that make images from latent vectors, "
            f"or of one image each, can be" + (f"; what works is {works}" if works else "")
        )
    Translation().chosen(asked, trained.name)
    return Subject(step.sampler(trained.networks), step.sampler_settings(), None)


def given_side(trained: Trained) -> int:
    """Height and width of the images that a run's model was given in training."""
    return trained.resolution // (trained.recipe.data.scale or 1)


def ends(trained: Trained, kind: Translation | None) -> Config:
    """The parts of a configuration that say what goes in and comes out."""
    images = vars(recipe.image_spec(trained.recipe, trained.index["classes"]))
    numbers, channels, side = {"dtype": "float32"}, trained.channels, trained.resolution
    if kind is None:
        z = {"name": "z", "shape": ["N", trained.latent_dim()]} | numbers
        made = {"name": "images", "shape": ["N", channels, side, side]} | numbers
        chosen = trained.recipe.step.classes()
        inputs = [z | {"distribution": "standard normal", "classes": chosen}]
        return {"images": images, "inputs": inputs, "outputs": [made | {"range": [-1, 1]}]}
    numbers |= {"range": [-1, 1]}
    free = kind.side is None
    sides = ["H", "W"] if free else 2 * [kind.side]
    larger = [f"{kind.scale}*{x}" if free else kind.scale * x for x in sides]
    given = {"name": "images", "shape": ["N", channels, *sides]} | numbers
    made = {"name": "made", "shape": ["N", channels, *(larger if kind.scale > 1 else sides)]}
    facts = {k: v for k, v in vars(kind).items() if k != "directions"}
    way = kind.directions[0] if kind.directions else None
    return {
        "images": images,
        "inputs": [given],
        "outputs": [made | numbers],
        "translation": {"direction": way} | facts,
    }
