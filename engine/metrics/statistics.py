"""What is kept of a set of images: float64 moments of their features, streamed, and some features.

Shapes: N images, D features, K classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.world import Ranks

KEPT = 10_000
"""Features kept for the metrics that need more than moments; their cost grows with the square."""


@dataclass
class FeatureSet:
    """Features of a set of images, in the order of the images.

    count; sum_D and outer_DD: float64 sums of the features and of their outer products over all
    images. features_ND: float32, the first KEPT of them. logits_NK: float32, or None where the
    extractor has no classes.
    """

    count: int
    sum_D: Tensor
    outer_DD: Tensor
    features_ND: Tensor
    logits_NK: Tensor | None = None

    @property
    def mean_D(self) -> Tensor:
        """Mean feature, float64."""
        return self.sum_D / self.count

    @property
    def covariance_DD(self) -> Tensor:
        """Unbiased covariance of the features, float64."""
        centre_DD = torch.outer(self.sum_D, self.mean_D)
        return (self.outer_DD - centre_DD) / (self.count - 1)


class Accumulator:
    """Takes in one rank's contiguous share of the features and joins the ranks' shares. name: of
    the extractor, for errors."""

    def __init__(self, size: int, device: torch.device, name: str = "the extractor") -> None:
        self.count, self._name = 0, name
        self.sum_D = torch.zeros(size, dtype=torch.float64, device=device)
        self.outer_DD = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._features: list[Tensor] = []
        self._logits: list[Tensor] = []

    def add(self, features_ND: Tensor, logits_NK: Tensor | None) -> None:
        """Take in a batch."""
        exact_ND = features_ND.double()
        self.sum_D += exact_ND.sum(0)
        self.outer_DD += exact_ND.T @ exact_ND
        if self.count < KEPT:
            self._features.append(features_ND[: KEPT - self.count].float())
        if logits_NK is not None:
            self._logits.append(logits_NK.float())
        self.count += len(features_ND)

    def join(self, ranks: Ranks) -> FeatureSet:
        """The features of all ranks in the order of ranks, on every rank. Raises ValueError, on
        every rank, where one is not finite."""
        shares = ranks.gather(
            (self.count, self.sum_D.cpu(), self.outer_DD.cpu(), _cat(self._features))
        )
        logits = [x for x in ranks.gather(_cat(self._logits)) if x is not None]
        counts, sums, outers, features = zip(*shares, strict=True)
        kept_ND = torch.cat([x for x in features if x is not None])[:KEPT]
        sum_D, outer_DD = torch.stack(sums).sum(0), torch.stack(outers).sum(0)
        logits_NK = torch.cat(logits) if logits else None
        self._check_finite(sum_D, outer_DD, logits_NK)
        return FeatureSet(sum(counts), sum_D, outer_DD, kept_ND, logits_NK)

    def _check_finite(self, *parts: Tensor | None) -> None:
        """The images are uint8, whatever a generator made: the extractor alone is to blame."""
        if not all(x.isfinite().all() for x in parts if x is not None):
            raise ValueError(
                f"{self._name} gives features that are not finite (NaN or infinity) for some of "
                f"the images: correct it, or take another extractor (--metrics.weights FILE, "
                f"--metrics.extractor classifier)"
            )


def _cat(parts: list[Tensor]) -> Tensor | None:
    return torch.cat(parts).cpu() if parts else None
