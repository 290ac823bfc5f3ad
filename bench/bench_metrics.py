"""Metrics: the Frechet distance beside torchmetrics', and one evaluation of 10,000 images.

    pytest bench/bench_metrics.py --benchmark-only

The evaluation is dcgan_mnist's, 10,000 generated images against as many held-out ones; where MNIST
is not there, on computed images. Extractor and real features are made before, as in a run.
"""

import time
from dataclasses import replace

import pytest
import torch

from engine.metrics.distances import frechet_distance
from engine.metrics.evaluator import Evaluator
from engine.metrics.statistics import Accumulator
from engine.recipe import load
from engine.session import build_networks
from engine.world import Ranks
from pipelines.datasets import DatasetMissing, find


def feature_set(size: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    taken = Accumulator(size, torch.device("cpu"))
    for _ in range(10):
        taken.add(torch.randn(max(500, size // 4), size, generator=generator), None)
    return taken.join(Ranks(0, 0, 1, torch.device("cpu")))


def torchmetrics_fid(real, fake) -> float:
    """torchmetrics' distance of the same moments, through its public class."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    identity = torch.nn.Identity()
    identity.num_features = len(real.sum_D)
    fid = FrechetInceptionDistance(identity)
    for kind, part in (("real", real), ("fake", fake)):
        setattr(fid, f"{kind}_features_sum", part.sum_D)
        setattr(fid, f"{kind}_features_cov_sum", part.outer_DD)
        setattr(fid, f"{kind}_features_num_samples", torch.tensor(part.count))
    return float(fid.compute())


@pytest.mark.parametrize("size", [256, 2048])
def bench_frechet_distance(benchmark, row, size):
    real, fake = feature_set(size, 0), feature_set(size, 1)
    moments = (real.mean_D, real.covariance_DD, fake.mean_D, fake.covariance_DD)
    began = time.perf_counter()
    theirs = torchmetrics_fid(real, fake)
    baseline = time.perf_counter() - began
    ours = benchmark.pedantic(frechet_distance, moments, rounds=3, warmup_rounds=1)
    assert abs(ours - theirs) < 1e-3 * max(1, theirs)
    ratio = baseline / benchmark.stats["mean"]
    benchmark.extra_info.update(torchmetrics_s=baseline, ratio=ratio)
    row(
        f"Frechet distance, {size} features: {benchmark.stats['mean']:.3f} s, {ratio:.1f}x "
        f"torchmetrics ({baseline:.3f} s)"
    )


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
    run = lambda: evaluator.evaluate(networks, True)  # noqa: E731
    found = benchmark.pedantic(run, rounds=2, warmup_rounds=1)
    assert found.protocol.generated == 10_000
    seconds = benchmark.stats["mean"]
    benchmark.extra_info.update(dataset=recipe.data.name, protocol=found.protocol.values())
    row(f"evaluation of 10,000 images ({recipe.data.name}): {seconds:.1f} s")
