"""Metrics: the Frechet distance beside torchmetrics', and one evaluation of 10,000 images.

    pytest bench/bench_metrics.py --benchmark-only

The evaluation is dcgan_mnist's, 10,000 generated images against as many held-out ones; where MNIST
is not there, on computed images. Extractor and real features are made before, as in a run. It gives
all figures; its baseline, the generator in plain PyTorch and torchmetrics' class on the same
extractor, the Frechet and the kernel distance (no precision and recall).
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from bench.side_by_side import Turns, note, take_turns, timed
from engine.metrics.distances import frechet_distance
from engine.metrics.evaluator import BATCH, Evaluator, real_features, split_of
from engine.metrics.extractor import Extractor, open_extractor
from engine.metrics.images import quantised
from engine.metrics.statistics import Accumulator
from engine.recipe import load
from engine.session import build_networks
from engine.world import Ranks
from pipelines.datasets import DatasetMissing, find

CPU, GENERATED = torch.device("cpu"), 10_000


def feature_set(size: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    taken = Accumulator(size, torch.device("cpu"))
    for _ in range(10):
        taken.add(torch.randn(max(500, size // 4), size, generator=generator), None)
    return taken.join(Ranks(0, 0, 1, torch.device("cpu")))


def torchmetrics_fid(extractor: torch.nn.Module, **sets) -> FrechetInceptionDistance:
    """torchmetrics' public class, given the moments of sets of features (real, fake)."""
    extractor.num_features = len(sets["real"].sum_D)
    fid = FrechetInceptionDistance(extractor, reset_real_features=False)
    fid.orig_dtype = torch.float64  # which it notes at its first images
    for kind, part in sets.items():
        setattr(fid, f"{kind}_features_sum", part.sum_D)
        setattr(fid, f"{kind}_features_cov_sum", part.outer_DD)
        setattr(fid, f"{kind}_features_num_samples", torch.tensor(part.count))
    return fid


class Features(torch.nn.Module):
    """An extractor as torchmetrics takes it."""

    def __init__(self, extractor: Extractor) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return self.extractor.forward(images_NCHW)[0]


@pytest.mark.parametrize("size", [256, 2048])
def bench_frechet_distance(benchmark, row, size):
    real, fake = feature_set(size, 0), feature_set(size, 1)
    moments = (real.mean_D, real.covariance_DD, fake.mean_D, fake.covariance_DD)
    found = {}

    def theirs():
        fid = torchmetrics_fid(torch.nn.Identity(), real=real, fake=fake)
        found["theirs"] = float(fid.compute())

    def ours():
        found["ours"] = frechet_distance(*moments)

    variants = {"torchmetrics": theirs, "ours": ours}
    turns = take_turns("torchmetrics", variants, 3, partial(timed, device=CPU))
    assert abs(found["ours"] - found["theirs"]) < 1e-3 * max(1, found["theirs"])
    told(benchmark, row, f"Frechet distance, {size} features", turns)


def told(benchmark, row, what: str, turns: Turns) -> None:
    """The row of ours beside torchmetrics'."""
    seconds = turns.median("ours")
    note(benchmark, turns.beside("ours", seconds, "s"))
    row(
        f"{what}: {seconds:.3f} s, {turns.ratio('ours'):.2f}x torchmetrics "
        f"({turns.median('torchmetrics'):.3f} s)"
    )
    benchmark.pedantic(lambda: None, rounds=1)  # the figures are those above


def bench_evaluation_of_10k_images(benchmark, row, device):
    recipe = load("dcgan_mnist")
    try:
        find(recipe.data)
    except DatasetMissing:
        data, metrics = replace(recipe.data, name="synthetic"), recipe.metrics
        recipe = replace(recipe, data=data, metrics=replace(metrics, real=1000))
    ranks = Ranks(0, 0, 1, device)
    evaluator = Evaluator(recipe, ranks, print)
    networks = {k: v.to(device) for k, v in build_networks(recipe, 10).items()}
    networks["generator"].to(memory_format=torch.channels_last)
    plain = build_networks(recipe, 10)["generator"].to(device).eval()
    distances = plain_distances(recipe, ranks)
    variants = {
        "torchmetrics": lambda: plain_evaluation(plain, recipe.step.latent_dim(), distances),
        "ours": lambda: evaluator.evaluate(networks, True),
    }
    turns = take_turns("torchmetrics", variants, 2, partial(timed, device=device))
    protocol = evaluator.protocol(True)
    assert protocol.generated == GENERATED
    benchmark.extra_info.update(dataset=recipe.data.name, protocol=protocol.values())
    told(benchmark, row, f"evaluation of {GENERATED:,} images ({recipe.data.name})", turns)


def plain_distances(recipe, ranks):
    """torchmetrics' distances from the same real images by the same extractor."""
    settings, data = recipe.metrics, replace(recipe.data, flip=False)
    extractor = open_extractor(settings, data, ranks.device, print)
    real = real_features(split_of(data, settings.split), data, settings, extractor, ranks)
    fid = torchmetrics_fid(Features(extractor), real=real)
    kid = KernelInceptionDistance(Features(extractor), reset_real_features=False)
    kid.real_features = [real.features_ND]
    return fid.to(ranks.device), kid.to(ranks.device)


@torch.no_grad()
def plain_evaluation(generator, latent: int, distances) -> None:
    """The distances of as many images."""
    for distance in distances:
        distance.reset()
    for _ in range(GENERATED // BATCH):
        z_NL = torch.randn(BATCH, latent, device=distances[0].device)
        images_NCHW = quantised(generator(z_NL))
        for distance in distances:
            distance.update(images_NCHW, real=False)
    for distance in distances:
        distance.compute()
