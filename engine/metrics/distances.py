"""Distances between a set of real and a set of generated images, in the space of their features.

Pure functions of features or of their moments. Shapes: N images, D features, K classes.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.metrics.statistics import FeatureSet

KID_SUBSETS, KID_SUBSET = 100, 1000  # Binkowski et al. 2018, section 4
IS_SPLITS = 10  # Salimans et al. 2016, section 4
PRECISION_NEIGHBOUR = 3  # Kynkaanniemi et al. 2019, section 3
COVERAGE_NEIGHBOUR = 5  # Naeem et al. 2020, section 4
CHUNK = 1000


def figures(real: FeatureSet, fake: FeatureSet) -> dict[str, float]:
    """All figures of a set of generated images; features are finite, as an Accumulator's are."""
    moments = (real.mean_D, real.covariance_DD, fake.mean_D, fake.covariance_DD)
    kept = real.features_ND, fake.features_ND
    values = {"fid": frechet_distance(*moments), "kid": kernel_distance(*kept)}
    if fake.logits_NK is not None:
        values["inception_score"] = inception_score(fake.logits_NK)
    return values | neighbourhoods(*kept)


def frechet_distance(
    mean1_D: Tensor, covariance1_DD: Tensor, mean2_D: Tensor, covariance2_DD: Tensor
) -> float:
    """Squared Frechet distance of two Gaussians (Heusel et al. 2017, equation 6), in float64.

    The trace of the root of S1 S2 is that of the root of S1^(1/2) S2 S1^(1/2), which is symmetric
    and positive: its eigenvalues are real, exact and an order faster to have.
    """
    root_DD = _root(covariance1_DD.double())
    middle_DD = root_DD @ covariance2_DD.double() @ root_DD
    cross = torch.linalg.eigvalsh((middle_DD + middle_DD.T) / 2).clamp(min=0).sqrt().sum()
    shift = (mean1_D.double() - mean2_D.double()).square().sum()
    traces = covariance1_DD.double().trace() + covariance2_DD.double().trace()
    return float(shift + traces - 2 * cross)


def _root(matrix_DD: Tensor) -> Tensor:
    """Symmetric root of a symmetric matrix that is positive up to rounding."""
    values_D, vectors_DD = torch.linalg.eigh(matrix_DD)
    return (vectors_DD * values_D.clamp(min=0).sqrt()) @ vectors_DD.T


def kernel_distance(real_ND: Tensor, fake_ND: Tensor) -> float:
    """KID (Binkowski et al. 2018, section 4): unbiased squared MMD with the kernel
    (x.y / D + 1)^3, mean over random subsets."""
    from torchmetrics.image.kid import KernelInceptionDistance

    subset = min(KID_SUBSET, len(real_ND), len(fake_ND))
    options = {"subsets": KID_SUBSETS, "subset_size": subset, "sync_on_compute": False}
    with _own_randomness():
        kid = KernelInceptionDistance(_features_are_given(), **options)
        kid.update(real_ND, real=True)
        kid.update(fake_ND, real=False)
        return float(kid.compute()[0])


def inception_score(logits_NK: Tensor) -> float:
    """exp of the mean KL of p(y|x) from p(y) (Salimans et al. 2016, section 4), mean over ten
    splits of the images in random order."""
    from torchmetrics.image.inception import InceptionScore

    splits = min(IS_SPLITS, len(logits_NK))
    with _own_randomness():
        score = InceptionScore(_features_are_given(), splits=splits, sync_on_compute=False)
        score.update(logits_NK)
        return float(score.compute()[0])


@contextmanager
def _own_randomness() -> Iterator[None]:
    """The library shuffles by PyTorch's global generator and warns that it keeps features."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `.*` will save all extracted features")
        torch.manual_seed(0)
        yield


def _features_are_given() -> torch.nn.Module:
    """What torchmetrics takes for an extractor where the features are there already."""
    identity = torch.nn.Identity()
    identity.num_features = 1
    return identity


def neighbourhoods(real_ND: Tensor, fake_ND: Tensor) -> dict[str, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 and 2) and density and
    coverage (Naeem et al. 2020, equations 3 and 4), by balls round each image's k-th neighbour."""
    ks = [
        k for k in (PRECISION_NEIGHBOUR, COVERAGE_NEIGHBOUR) if k < min(len(real_ND), len(fake_ND))
    ]
    if len(ks) < 2:
        return {}
    real_radius_Nk, fake_radius_Nk = radii(real_ND, ks), radii(fake_ND, ks)
    inside_real, inside_fake, covered, count = [], [], [], 0
    for part_ND, radius_Nk in zip(real_ND.split(CHUNK), real_radius_Nk.split(CHUNK), strict=True):
        distance_NM = torch.cdist(part_ND, fake_ND)  # real by generated
        inside_real.append((distance_NM <= radius_Nk[:, :1]).any(0))
        inside_fake.append((distance_NM <= fake_radius_Nk[:, 0]).any(1))
        near_NM = distance_NM <= radius_Nk[:, 1:]
        covered.append(near_NM.any(1))
        count += int(near_NM.sum())
    return {
        "precision": float(torch.stack(inside_real).any(0).float().mean()),
        "recall": float(torch.cat(inside_fake).float().mean()),
        "density": count / (COVERAGE_NEIGHBOUR * len(fake_ND)),
        "coverage": float(torch.cat(covered).float().mean()),
    }


def radii(features_ND: Tensor, ks: list[int]) -> Tensor:
    """Distance of each image to its k-th nearest other image, for each k, (N, len(ks))."""
    parts = []
    for part_ND in features_ND.split(CHUNK):
        nearest = torch.cdist(part_ND, features_ND).topk(max(ks) + 1, largest=False).values
        parts.append(nearest[:, ks])  # the nearest of all is the image itself
    return torch.cat(parts)
