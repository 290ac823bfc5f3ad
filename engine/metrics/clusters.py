"""How well clusters agree with classes that no training saw."""

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor


def clustering(cluster_N: Tensor, label_N: Tensor) -> dict[str, float]:
    """Clustering accuracy and normalised mutual information of int64 (N,) each, on the host.

    accuracy: the share of images whose class is the one matched with their cluster, under the
    one-to-one matching for which that share is largest (Kuhn 1955, "The Hungarian method"; Yang et
    al. 2010, "Image clustering using local discriminant models and global integration", equation
    24). nmi: mutual information over the mean of both entropies.
    """
    clusters, classes = cluster_N.numpy(), label_N.numpy()
    size = int(max(clusters.max(), classes.max())) + 1
    together = np.zeros((size, size), dtype=np.int64)
    np.add.at(together, (clusters, classes), 1)
    matched = together[linear_sum_assignment(together, maximize=True)].sum()
    return {
        "accuracy": float(matched / len(classes)),
        "nmi": float(normalized_mutual_info_score(classes, clusters)),
    }
