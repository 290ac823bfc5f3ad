"""Losses: pure functions of tensors, each citing its equation.

Shapes: N batch, L latent.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def discriminator_loss(real_N: Tensor, fake_N: Tensor) -> Tensor:
    """-E[log D(x)] - E[log(1 - D(G(z)))] from logits, () (Goodfellow et al. 2014, equation 1)."""
    return F.softplus(-wide(real_N)).mean() + F.softplus(wide(fake_N)).mean()


def nonsaturating_loss(fake_N: Tensor) -> Tensor:
    """-E[log D(G(z))] from logits, () (Goodfellow et al. 2014, section 3, end)."""
    return F.softplus(-wide(fake_N)).mean()


def gaussian_kl(mean_NL: Tensor, log_variance_NL: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) summed over L, (N,) in nats.

    Kingma and Welling 2014, appendix B: -1/2 sum(1 + log v - m^2 - v). expm1 keeps the digits
    that `exp(log v) - 1 - log v` loses near log v = 0.
    """
    spread = torch.expm1(log_variance_NL) - log_variance_NL
    return 0.5 * (spread + mean_NL.square()).sum(1)


def bernoulli_nll(logits_NCHW: Tensor, target_NCHW: Tensor) -> Tensor:
    """-log p(x|z) of a Bernoulli decoder, summed over pixels, (N,) in nats.

    Targets in [0, 1], grey values allowed (Kingma and Welling 2014, appendix C.1).
    """
    return F.binary_cross_entropy_with_logits(logits_NCHW, target_NCHW, reduction="none").sum(
        (1, 2, 3)
    )


def gaussian_nll(mean_NCHW: Tensor, target_NCHW: Tensor) -> Tensor:
    """1/2 ||x - mean||^2 summed over pixels, (N,): -log p(x|z) of a decoder of unit variance
    without its constant (Kingma and Welling 2014, appendix C.2)."""
    return 0.5 * (mean_NCHW - target_NCHW).square().sum((1, 2, 3))


def wide(x: Tensor) -> Tensor:
    """At least float32: a mean of bfloat16 logits keeps two digits."""
    return x.float() if x.dtype.itemsize < 4 else x
