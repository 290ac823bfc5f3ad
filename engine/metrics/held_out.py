"""Figures of a model on held-out images: likelihood where it has one, and how well it reconstructs.

Shapes: N images, C channels, H height, W width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.algorithm import Algorithm, Networks, Values
from engine.metrics.images import quantised
from engine.metrics.pairs import Pairs
from engine.metrics.protocol import HELD_OUT_IMAGES as IMAGES
from engine.settings import Recipe
from engine.world import Ranks
from kernels import philox
from pipelines.batch import Batch, Clock
from pipelines.datasets import Dataset, NoSplit, find
from pipelines.open import Pipeline, open_pipeline

BATCH = 500
LABELS = "labels"
MODEL = ""


@dataclass
class HeldOut:
    """The test split, of which each rank takes its share."""

    recipe: Recipe
    ranks: Ranks
    dataset: Dataset
    pipeline: Pipeline
    clock: Clock
    pairs: dict[str, Pairs]
    """Of the model, and of what stands in for it (`Algorithm.trivial`), by name."""

    @classmethod
    def open(cls, recipe: Recipe, ranks: Ranks, reconstructions: bool = True) -> "HeldOut | None":
        """None where the family has no such figure or the dataset no test split. reconstructions:
        measure them too, if the family makes any. Raises ValueError where LPIPS cannot be had."""
        kind = type(recipe.step)
        remakes = kind.reconstruct is not Algorithm.reconstruct
        reconstructions &= remakes or kind.remade is not Algorithm.remade
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
        pairs = {MODEL: Pairs(ranks.device, recipe.metrics.lpips)} if reconstructions else {}
        return cls(recipe, ranks, dataset, pipeline, clock, pairs)

    @torch.no_grad()
    def figures(self, networks: Networks) -> dict[str, float]:
        """Over at most IMAGES images: what the family makes of its values per image, and the means
        of how well it reconstructs. Networks are in eval mode."""
        step, clock = self.recipe.step, self.clock
        total = min(self.pipeline.images, IMAGES)
        key = philox.make_key(0, device=clock.device)
        for pairs in self.pairs.values():
            pairs.reset()
        values: dict[str, list[Tensor]] = {}
        clock.seek(0)
        while clock.images < total:
            self.pipeline.ready(clock)
            batch = self.pipeline.batch(clock)
            take = int((batch.position_N < total).sum())
            found = step.held_out(networks, batch, key)
            if batch.labels_N is not None:
                found = found | {LABELS: batch.labels_N}
            for name, value_N in found.items():
                values.setdefault(name, []).append(value_N[:take].cpu())
            if self.pairs and take:
                self._compare(networks, batch, take)
            clock.advance()
        return self._summary({name: torch.cat(parts) for name, parts in values.items()}, total)

    def _compare(self, networks: Networks, batch: Batch, take: int) -> None:
        """Add the first images of a batch, as the model makes them and as one has them without."""
        step = self.recipe.step
        made_NCHW, goal_NCHW = step.remade(networks, batch)
        goal_NCHW = quantised(goal_NCHW[:take])
        for name, images_NCHW in ({MODEL: made_NCHW} | step.trivial(batch)).items():
            if name not in self.pairs:
                self.pairs[name] = Pairs(self.clock.device, self.recipe.metrics.lpips)
            self.pairs[name].add(quantised(images_NCHW[:take]), goal_NCHW)

    def _summary(self, own: Values, total: int) -> dict[str, float]:
        """Of the values of all ranks."""
        near = {
            f"{figure}_{name}" if name else figure: value
            for name, pairs in self.pairs.items()
            for figure, value in pairs.sums.items()
        }
        parts = self.ranks.gather((own, near))
        whole = {name: torch.cat([values[name] for values, _ in parts]) for name in own}
        labels_N = whole.pop(LABELS, None)
        doubles = {name: value_N.double() for name, value_N in whole.items()}
        step, without = self.recipe.step, self.recipe.data.without
        figures = step.summarise(doubles, labels_N, without) if doubles else {}
        sums = [sums for _, sums in parts]
        return figures | {k: sum(part[k] for part in sums) / total for k in sums[0]}

    def close(self) -> None:
        """Let go of the images."""
        self.pipeline.close()
