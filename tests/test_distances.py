"""Distances between sets of features: analytic cases, the libraries', and brute force."""

import math

import pytest
import torch

from engine.metrics.distances import (
    figures,
    frechet_distance,
    inception_score,
    kernel_distance,
    neighbourhoods,
    radii,
)
from engine.metrics.statistics import Accumulator, FeatureSet
from engine.world import Ranks

ALONE = Ranks(0, 0, 1, torch.device("cpu"))


def features(n: int, size: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(99))
    return torch.randn(n, size, generator=generator) @ mixing + shift


def collect(features_ND: torch.Tensor, batch: int) -> FeatureSet:
    taken = Accumulator(features_ND.shape[1], torch.device("cpu"))
    for part_ND in features_ND.split(batch):
        taken.add(part_ND, None)
    return taken.join(ALONE)


def frechet(a: FeatureSet, b: FeatureSet) -> float:
    return frechet_distance(a.mean_D, a.covariance_DD, b.mean_D, b.covariance_DD)


def test_frechet_distance_of_diagonal_gaussians_is_the_formula():
    mean1, mean2 = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, -1.0])
    deviation1, deviation2 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 0.5])
    expected = (mean1 - mean2).square().sum() + (deviation1 - deviation2).square().sum()
    found = frechet_distance(mean1, deviation1.square().diag(), mean2, deviation2.square().diag())
    assert found == pytest.approx(float(expected), rel=1e-12)


def test_frechet_distance_of_commuting_covariances_is_the_formula():
    turn, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    one, other = torch.rand(2, 5, dtype=torch.float64)
    zero = torch.zeros(5, dtype=torch.float64)
    found = frechet_distance(zero, turn * one @ turn.T, zero, turn * other @ turn.T)
    assert found == pytest.approx(float((one.sqrt() - other.sqrt()).square().sum()), rel=1e-9)


def test_frechet_distance_to_itself_is_nothing_even_where_the_covariance_is_singular():
    flat = features(300, 6, 0)
    flat[:, 5] = flat[:, 4]
    one = collect(flat, 64)
    assert abs(frechet(one, one)) < 1e-6


class Small(torch.nn.Module):
    """A small extractor as torchmetrics takes one."""

    num_features = 24

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 24, 5, 3), torch.nn.GELU(), torch.nn.AdaptiveAvgPool2d(1)
        )

    @torch.no_grad()
    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return self.layers(images_NCHW.float() / 64).flatten(1)


def test_fid_equals_that_of_torchmetrics_and_torch_fidelity():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import FrechetInceptionDistance

    torch.manual_seed(1)
    real = torch.randint(0, 200, (400, 3, 16, 16), dtype=torch.uint8)
    fake = torch.randint(30, 256, (300, 3, 16, 16), dtype=torch.uint8)
    network = Small()
    ours = frechet(collect(network(real), 64), collect(network(fake), 77))
    theirs = FrechetInceptionDistance(network, normalize=False)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    statistics = [fid_features_to_statistics(network(x)) for x in (real, fake)]
    fidelity = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert ours > 0.5
    assert ours == pytest.approx(float(theirs.compute()), abs=1e-3)
    assert ours == pytest.approx(fidelity, abs=1e-3)


def test_streaming_in_any_batches_gives_the_same_moments():
    whole = features(500, 8, 0, shift=1000.0)  # a mean far from zero is where float32 would fail
    one, other = collect(whole, 500), collect(whole, 37)
    assert torch.allclose(one.covariance_DD, other.covariance_DD, rtol=1e-9)
    assert torch.allclose(one.covariance_DD, torch.cov(whole.double().T), rtol=1e-6)


def test_kernel_distance_tells_sets_apart_and_leaves_the_global_generator_alone():
    a, b, far = features(400, 8, 0), features(400, 8, 1), features(400, 8, 2, shift=2.0)
    state = torch.random.get_rng_state()
    near, apart = kernel_distance(a, b), kernel_distance(a, far)
    assert torch.equal(state, torch.random.get_rng_state())
    assert kernel_distance(a, b) == near
    assert abs(near) < 0.1 * apart


def test_inception_score_of_sure_and_even_classes_is_their_number():
    sure = torch.eye(10).repeat(100, 1) * 50
    assert inception_score(sure) == pytest.approx(10, rel=0.05)  # 100 images a split
    assert inception_score(torch.zeros(1000, 10)) == pytest.approx(1, abs=1e-4)


def test_neighbourhoods_equal_brute_force():
    real, fake = features(60, 4, 0), features(50, 4, 1, shift=0.7)
    found = neighbourhoods(real, fake)
    distance = (real[:, None] - fake[None]).norm(dim=2)

    def radius(x: torch.Tensor, k: int) -> torch.Tensor:
        return (x[:, None] - x[None]).norm(dim=2).sort(dim=1).values[:, k]

    inside = distance <= radius(real, 3)[:, None]
    recalled = distance <= radius(fake, 3)[None]
    near = distance <= radius(real, 5)[:, None]
    assert found["precision"] == pytest.approx(float(inside.any(0).float().mean()))
    assert found["recall"] == pytest.approx(float(recalled.any(1).float().mean()))
    assert found["density"] == pytest.approx(float(near.sum() / (5 * 50)))
    assert found["coverage"] == pytest.approx(float(near.any(1).float().mean()))


def test_chunks_do_not_change_the_radii(monkeypatch):
    x = features(55, 4, 0)
    whole = radii(x, [3, 5])
    monkeypatch.setattr("engine.metrics.distances.CHUNK", 7)
    assert torch.allclose(radii(x, [3, 5]), whole, atol=1e-4)


def test_a_set_against_itself_is_perfect_and_a_collapsed_one_is_not():
    real = features(200, 4, 0)
    same = neighbourhoods(real, real.clone())
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    collapsed = neighbourhoods(real, real[:1] + 1e-3 * features(200, 4, 1))
    assert collapsed["precision"] == 1
    assert collapsed["recall"] < 0.1
    assert collapsed["coverage"] < 0.2


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_features_and_logits_that_are_not_finite_are_an_error_naming_the_extractor(value):
    whole, broken = features(20, 4, 0), features(20, 4, 0)
    broken[3, 2] = value
    for pair in ((broken, None), (whole, broken)):
        taken = Accumulator(4, torch.device("cpu"), "TorchScript own.pt")
        taken.add(*pair)
        with pytest.raises(ValueError, match=r"^TorchScript own\.pt gives .* not finite"):
            taken.join(ALONE)


def test_all_figures_are_finite_where_the_features_are():
    found = figures(collect(features(200, 4, 1), 50), collect(features(200, 4, 0), 50))
    assert {"fid", "kid", "precision", "recall", "density", "coverage"} == set(found)
    assert all(math.isfinite(value) for value in found.values())
