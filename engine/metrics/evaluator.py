"""One evaluation: a model's samples against real images, over all ranks.

Shapes: N images, C channels, H height, W width, L latent, D features.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from engine.algorithm import Networks
from engine.metrics.distances import figures
from engine.metrics.extractor import Extractor, open_extractor
from engine.metrics.held_out import HeldOut
from engine.metrics.images import decode, quantised
from engine.metrics.protocol import FeatureProtocol, Protocol
from engine.metrics.statistics import Accumulator, FeatureSet
from engine.settings import Metrics, Recipe
from engine.world import Ranks
from kernels import philox
from pipelines.datasets import Dataset, NoSplit, find
from pipelines.order import Order
from pipelines.settings import Data

LATENTS = 4  # noise stream; training takes 1, a run's pictures 2, the sample verb 3
BATCH = 250


@dataclass(frozen=True)
class Evaluation:
    """Figures with what they were measured with, and the seconds that it took."""

    figures: dict[str, float]
    protocol: Protocol
    seconds: float


class Evaluator:
    """Measures the networks of a recipe; every rank calls it, every rank gets the result."""

    def __init__(self, recipe: Recipe, ranks: Ranks, say: Callable[[str], None]) -> None:
        """Open the extractor and measure the real images, once. Raises ValueError naming a
        setting, and what finding and decoding a dataset raise."""
        self.recipe, self.ranks = recipe, ranks
        settings, data = recipe.metrics, replace(recipe.data, flip=False)
        dataset = split_of(data, settings.split)
        self._extractor = opened_extractor(settings, data, ranks, say)
        self._real = real_features(dataset, data, settings, self._extractor, ranks)
        check_count(self._extractor, settings.generated, "--metrics.generated")
        check_count(self._extractor, self._real.count, "--metrics.real")
        self._held_out = HeldOut.open(recipe, ranks)
        self._dataset = dataset

    def protocol(self, averaged: bool) -> FeatureProtocol:
        """What its figures are measured with."""
        settings, fit = self.recipe.metrics, self._dataset.fit
        return FeatureProtocol(
            extractor=self._extractor.name,
            extractor_digest=self._extractor.digest,
            dataset=f"{self._dataset.name} {self._dataset.fingerprint()[:12]}",
            split=settings.split,
            resolution=fit.words,
            resize=self._extractor.resize,
            real=self._real.count,
            generated=settings.generated,
            ema=averaged,
            seed=settings.seed,
        )

    @torch.no_grad()
    def evaluate(self, networks: Networks, averaged: bool) -> Evaluation:
        """Measure these networks, in eval mode with rank 0's statistics; they are left as they
        were. averaged: whether they are moving averages, for the protocol."""
        began = time.monotonic()
        with as_on_rank_0(networks, self.ranks), torch.random.fork_rng(devices=[]):
            fake = self._generated(networks)
            values = self._held_out.figures(networks) if self._held_out else {}
        if fake is not None:
            found = figures(self._real, fake) if self.ranks.rank == 0 else {}
            values = self.ranks.share(found) | values
        return Evaluation(values, self.protocol(averaged), time.monotonic() - began)

    def close(self) -> None:
        """Let go of the held-out images."""
        if self._held_out:
            self._held_out.close()

    def _generated(self, networks: Networks) -> FeatureSet | None:
        """Features of generated images; None for a family that decodes no latents."""
        step, settings, ranks = self.recipe.step, self.recipe.metrics, self.ranks
        try:
            size = step.latent_dim()
        except ValueError:
            return None
        key = philox.make_key(settings.seed, device=ranks.device)
        taken = Accumulator(self._extractor.size, ranks.device, self._extractor.name)
        for position_N in share(torch.arange(settings.generated), ranks).split(BATCH):
            z_NL = philox.normal(key, LATENTS, position_N.to(ranks.device), size)
            taken.add(*self._extractor.forward(quantised(step.decode(networks, z_NL))))
        return taken.join(ranks)


def share(items: Tensor, ranks: Ranks) -> Tensor:
    """This rank's contiguous part of the items."""
    return items.tensor_split(ranks.world_size)[ranks.rank]


def check_count(extractor: Extractor, count: int, flag: str) -> None:
    """Raise ValueError where there are too few images for a covariance of full rank."""
    if count <= extractor.size:
        raise ValueError(
            f"{flag}: {count:,} images are too few for the {extractor.size:,} features of "
            f"{extractor.name}; the Frechet distance needs more images than features: give more"
        )


def split_of(data: Data, split: str) -> Dataset:
    """The real images to measure against. Raises ValueError where there is no such split, and what
    `find` raises."""
    try:
        return find(data, split)
    except NoSplit as reason:
        raise ValueError(f"--metrics.split {split}: {reason}") from None


def opened_extractor(
    settings: Metrics, data: Data, ranks: Ranks, say: Callable[[str], None]
) -> Extractor:
    """The extractor, on rank 0 first, which may have to train or fetch it; its ValueError on every
    rank."""
    made, problem = None, None
    for turn in (ranks.rank == 0, ranks.rank > 0):
        if turn:
            try:
                made = open_extractor(settings, data, ranks.device, say)
            except ValueError as error:
                problem = str(error)
        problem = ranks.share(problem) if ranks.world_size > 1 else problem
        if problem:
            raise ValueError(problem)
    return made


def real_features(
    dataset: Dataset, data: Data, settings: Metrics, extractor: Extractor, ranks: Ranks
) -> FeatureSet:
    """Features of the first images in a fixed random order, cached by content and protocol."""
    count = min(settings.real or len(dataset), len(dataset))
    identity = [3, dataset.stamp(), str(dataset.fit), count]
    identity += [extractor.digest, extractor.resize]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    path = data.cache_folder() / f"features-{dataset.name}-{dataset.split}-{digest}.safetensors"
    known = ranks.share(_read(path) if ranks.rank == 0 else None)
    if known is not None:
        return known
    rows = share(torch.from_numpy(Order(len(dataset), 0).rows(np.arange(count))), ranks)
    taken = Accumulator(extractor.size, ranks.device, extractor.name)
    with torch.no_grad():
        for part in rows.split(BATCH):
            images_NCHW, _ = decode(dataset, data, part.numpy())
            taken.add(*extractor.forward(images_NCHW.to(ranks.device)))
    features = taken.join(ranks)
    if ranks.rank == 0:
        _write(path, features)
    return features


def _read(path: Path) -> FeatureSet | None:
    try:
        stored = safetensors.torch.load_file(path)
        count, moments = int(stored["count"]), (stored["sum_D"], stored["outer_DD"])
        finite = all(x.isfinite().all() for x in moments)  # measured again, the error is raised
        return FeatureSet(count, *moments, stored["features_ND"]) if finite else None
    except (OSError, KeyError, safetensors.SafetensorError):
        return None


def _write(path: Path, features: FeatureSet) -> None:
    stored = {"count": torch.tensor(features.count), "sum_D": features.sum_D}
    stored |= {"outer_DD": features.outer_DD, "features_ND": features.features_ND}
    scratch = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch.write_bytes(safetensors.torch.save(stored))
    scratch.rename(path)


@contextmanager
def as_on_rank_0(networks: Networks, ranks: Ranks) -> Iterator[None]:
    """Eval mode, and rank 0's running statistics on all ranks, as a checkpoint is sampled later."""
    modes = [(network, network.training) for network in networks.values()]
    buffers = [b for network, _ in modes for b in network.buffers()] if ranks.world_size > 1 else []
    own = [b.clone() for b in buffers]
    try:
        for network, _ in modes:
            network.eval()
        for buffer, value in zip(buffers, ranks.share([b.cpu() for b in buffers]), strict=True):
            buffer.copy_(value)
        yield
    finally:
        for network, training in modes:
            network.train(training)
        for buffer, value in zip(buffers, own, strict=True):
            buffer.copy_(value)
