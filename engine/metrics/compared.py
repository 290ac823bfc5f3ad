"""Figures of held-out images (`engine.metrics.held_out`), beside what one has without a model: how
near those are that the model makes to those that they should be equal to (for an autoencoder the
images themselves), and the family's own."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.algorithm import Networks
from engine.metrics.evaluator import Evaluation, as_on_rank_0
from engine.metrics.held_out import HeldOut
from engine.metrics.protocol import HELD_OUT_IMAGES, Protocol
from engine.settings import Recipe
from engine.world import Ranks


@dataclass(frozen=True)
class ComparedProtocol(Protocol):
    """Of figures of held-out images; split is always `test`."""

    dataset: str
    split: str
    resolution: str
    images: int
    ema: bool


class ComparedEvaluator:
    """Measures the networks of a recipe; every rank calls it, every rank gets the result."""

    def __init__(self, recipe: Recipe, ranks: Ranks, say: Callable[[str], None]) -> None:
        """Open the held-out images. Raises ValueError where there are none."""
        self.ranks, self._held_out = ranks, HeldOut.open(recipe, ranks)
        if self._held_out is None:
            raise ValueError(
                f"data.name={recipe.data.name} has no held-out images to measure on: give it "
                f"some (for celeba list_eval_partition.txt says which; README's table of datasets "
                f"has the others), or leave --metrics.every-kimg at 0"
            )

    def protocol(self, averaged: bool) -> ComparedProtocol:
        """What its figures are measured with."""
        dataset = self._held_out.dataset
        fit, images = dataset.fit, min(dataset.images, HELD_OUT_IMAGES)
        return ComparedProtocol(
            dataset=f"{dataset.name} {dataset.identity()[:12]}",
            split=dataset.split,
            resolution=fit.words,
            images=images,
            ema=averaged,
        )

    @torch.no_grad()
    def evaluate(self, networks: Networks, averaged: bool) -> Evaluation:
        """Measure these networks, in eval mode with rank 0's statistics; they are left as they
        were. averaged: whether they are moving averages, for the protocol."""
        began = time.monotonic()
        with as_on_rank_0(networks, self.ranks), torch.random.fork_rng(devices=[]):
            values = self._held_out.figures(networks)
        return Evaluation(values, self.protocol(averaged), time.monotonic() - began)

    def close(self) -> None:
        """Let go of the images."""
        self._held_out.close()
