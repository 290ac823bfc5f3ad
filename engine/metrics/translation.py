"""Do translated images look like those of the other domain? More so than untouched ones?

Of each direction: the kernel distance of the translated images from the real ones of the domain
that they are to be of (`engine.metrics.distances`), and, where the extractor is a classifier of the
two domains, the share of them that it takes for that domain. `_identity`: of the images untouched,
the least that a translator has to beat.

Shapes: N images, C channels, H height, W width, K domains.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.algorithm import Networks
from engine.metrics.distances import kernel_distance
from engine.metrics.evaluator import (
    BATCH,
    Evaluation,
    as_on_rank_0,
    opened_extractor,
    real_features,
    share,
    split_of,
)
from engine.metrics.extractor import Extractor
from engine.metrics.held_out import HeldOut
from engine.metrics.images import decode, quantised
from engine.metrics.protocol import Protocol
from engine.metrics.statistics import Accumulator, FeatureSet
from engine.settings import Recipe
from engine.translation import DIRECTIONS, Direction
from engine.world import Ranks
from pipelines.datasets import Dataset

SMALL = 8
"""Images translated at a time: they are large."""


@dataclass(frozen=True)
class TranslationProtocol(Protocol):
    """Of figures of translated images.

    extractor, extractor_digest: the ruler. domain_A, domain_B: numbers of images, all of the split.
    """

    extractor: str
    extractor_digest: str
    dataset: str
    split: str
    resolution: str
    resize: str
    domain_A: int
    domain_B: int
    ema: bool


class TranslationEvaluator:
    """Measures the networks of a recipe that translates between two domains; every rank calls it,
    every rank gets the result."""

    def __init__(self, recipe: Recipe, ranks: Ranks, say: Callable[[str], None]) -> None:
        """Open the extractor and measure the real images, once. Raises ValueError naming a
        setting, and what finding and decoding a dataset raise."""
        self.recipe, self.ranks = recipe, ranks
        self._data = replace(recipe.data, flip=False)
        self._whole = split_of(self._data, recipe.metrics.split)
        self._domains = self._whole, self._whole.second
        self._extractor = opened_extractor(recipe.metrics, self._data, ranks, say)
        every = replace(recipe.metrics, real=0)
        self._real = [
            real_features(domain, self._data, every, self._extractor, ranks)
            for domain in self._domains
        ]
        self._untouched: dict[str, float] = {}
        self._held_out = HeldOut.open(recipe, ranks)

    def protocol(self, averaged: bool) -> TranslationProtocol:
        """What its figures are measured with."""
        fit = self._whole.fit
        return TranslationProtocol(
            extractor=self._extractor.name,
            extractor_digest=self._extractor.digest,
            dataset=f"{self._whole.name} {self._whole.identity()[:12]}",
            split=self.recipe.metrics.split,
            resolution=fit.words,
            resize=self._extractor.resize,
            domain_A=self._real[0].count,
            domain_B=self._real[1].count,
            ema=averaged,
        )

    @torch.no_grad()
    def evaluate(self, networks: Networks, averaged: bool) -> Evaluation:
        """Measure these networks, in eval mode with rank 0's statistics; they are left as they
        were. averaged: whether they are moving averages, for the protocol."""
        began = time.monotonic()
        with as_on_rank_0(networks, self.ranks), torch.random.fork_rng(devices=[]):
            values = self._held_out.figures(networks) if self._held_out else {}
            made = {way: self._features(way, networks) for way in DIRECTIONS}
        self._untouched = self._untouched or self._figures(
            {way: self._features(way, None) for way in DIRECTIONS}, "_identity"
        )
        values = self._figures(made, "") | self._untouched | values
        return Evaluation(values, self.protocol(averaged), time.monotonic() - began)

    def _figures(self, made: dict[Direction, FeatureSet], suffix: str) -> dict[str, float]:
        """Of both directions, with their mean distance first."""
        values = {}
        for way, features in made.items():
            goal = DIRECTIONS.index(way) ^ 1  # AtoB is to be of domain 1
            real = self._real[goal].features_ND
            values[f"kid_{way}{suffix}"] = kernel_distance(real, features.features_ND)
            logits_NK = features.logits_NK
            if logits_NK is not None and logits_NK.shape[1] == len(DIRECTIONS):
                taken = (logits_NK.argmax(1) == goal).double().mean()
                values[f"taken_{way}{suffix}"] = float(taken)
        both = sum(values[f"kid_{way}{suffix}"] for way in DIRECTIONS) / len(DIRECTIONS)
        return {f"kid{suffix}": both} | values

    def _features(self, way: Direction, networks: Networks | None) -> FeatureSet:
        """Features of all images of a domain, translated, or as they are without networks."""
        domain: Dataset = self._domains[DIRECTIONS.index(way)]
        extractor: Extractor = self._extractor
        taken = Accumulator(extractor.size, self.ranks.device, extractor.name)
        for rows in share(torch.arange(len(domain)), self.ranks).split(BATCH):
            images_NCHW, _ = decode(domain, self._data, rows.numpy())
            for part_NCHW in images_NCHW.split(SMALL):
                shown_NCHW = part_NCHW.to(self.ranks.device)
                if networks is not None:
                    shown_NCHW = self._translated(networks, shown_NCHW, way)
                taken.add(*extractor.forward(shown_NCHW))
        return taken.join(self.ranks)

    def _translated(self, networks: Networks, images_NCHW: Tensor, way: Direction) -> Tensor:
        given_NCHW = images_NCHW.float() / 127.5 - 1
        return quantised(self.recipe.step.translate(networks, given_NCHW, way))

    def close(self) -> None:
        """Let go of the held-out images."""
        if self._held_out:
            self._held_out.close()
