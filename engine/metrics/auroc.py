"""How well does a score tell two kinds of images apart?"""

import math

import torch
from torch import Tensor


def auroc(score_N: Tensor, positive_N: Tensor) -> float:
    """Area under the ROC curve: the probability that a positive image scores above a negative one,
    equal scores counting half (Hanley and McNeil 1982, section III: the Wilcoxon statistic).

    score_N: float (N,). positive_N: bool (N,). Not a number where a kind is missing or a score is
    none.
    """
    positives = int(positive_N.sum())
    pairs = positives * (len(score_N) - positives)
    if not pairs or score_N.isnan().any():
        return math.nan
    _, place_N, count_K = torch.unique(score_N, return_inverse=True, return_counts=True)
    rank_K = count_K.cumsum(0) - (count_K - 1) / 2  # equal scores share their mean rank
    above = rank_K.double()[place_N[positive_N]].sum() - positives * (positives + 1) / 2
    return float(above / pairs)
