"""Figures of a model on held-out images: likelihood where it has one, and how well it reconstructs.

Shapes: N images, C channels, H height, W width.
"""

from dataclasses import dataclass, replace

import torch

from engine.metrics.images import quantised
from engine.metrics.pairs import Pairs
from engine.metrics.protocol import HELD_OUT_IMAGES as IMAGES
from engine.settings import Algorithm, Networks, Recipe
from engine.world import Ranks
from kernels import philox
from pipelines.batch import Clock
from pipelines.datasets import NoSplit, find
from pipelines.open import Pipeline, open_pipeline

BATCH = 500


@dataclass
class HeldOut:
    """The test split, of which each rank takes its share."""

    recipe: Recipe
    ranks: Ranks
    pipeline: Pipeline
    clock: Clock
    pairs: Pairs | None

    @classmethod
    def open(cls, recipe: Recipe, ranks: Ranks, reconstructions: bool = True) -> "HeldOut | None":
        """None where the family has no such figure or the dataset no test split. reconstructions:
        measure them too, if the family makes any. Raises ValueError where LPIPS cannot be had."""
        kind = type(recipe.step)
        reconstructions &= kind.reconstruct is not Algorithm.reconstruct
        if kind.held_out is Algorithm.held_out and not reconstructions:
            return None
        try:
            dataset = find(recipe.data, "test")
        except NoSplit:
            return None
        world = ranks.world_size
        batch = min(BATCH, max(len(dataset) // world, 1)) * world
        clock = Clock(batch, ranks.device, rank=ranks.rank, world_size=world)
        data = replace(recipe.data, flip=False, batch=batch, pipeline="auto", balanced=False)
        key = philox.make_key(0, device=ranks.device)
        pipeline = open_pipeline(dataset, data, clock, 0, key, say=lambda text: None)
        pairs = Pairs(ranks.device, recipe.metrics.lpips) if reconstructions else None
        return cls(recipe, ranks, pipeline, clock, pairs)

    @torch.no_grad()
    def figures(self, networks: Networks) -> dict[str, float]:
        """Means per image over at most IMAGES images. Networks are in eval mode."""
        step, clock = self.recipe.step, self.clock
        total = min(self.pipeline.images, IMAGES)
        key = philox.make_key(0, device=clock.device)
        if self.pairs:
            self.pairs.reset()
        sums: dict[str, float] = {}
        clock.seek(0)
        while clock.images < total:
            self.pipeline.ready(clock)
            batch = self.pipeline.batch(clock)
            take = int((batch.position_N < total).sum())
            for name, value_N in step.held_out(networks, batch, key).items():
                sums[name] = sums.get(name, 0.0) + float(value_N[:take].double().sum())
            if self.pairs and take:
                goal_NCHW = batch.images_NCHW[:take]
                self.pairs.add(
                    quantised(step.reconstruct(networks, goal_NCHW)), quantised(goal_NCHW)
                )
            clock.advance()
        sums |= self.pairs.sums if self.pairs else {}
        totals = self.ranks.gather(sums)
        return {name: sum(part[name] for part in totals) / total for name in sums}

    def close(self) -> None:
        """Let go of the images."""
        self.pipeline.close()
