"""Losses: pure functions of tensors, each citing its equation.

Shapes: N batch, L latent.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from kernels import gan_bce
from kernels import gaussian_kl as gaussian


def discriminator_loss(real_N: Tensor, fake_N: Tensor) -> Tensor:
    """-E[log D(x)] - E[log(1 - D(G(z)))] from logits, () (Goodfellow et al. 2014, equation 1)."""
    return gan_bce.discriminator(real_N, fake_N)


def nonsaturating_loss(fake_N: Tensor) -> Tensor:
    """-E[log D(G(z))] from logits, () (Goodfellow et al. 2014, section 3, end)."""
    return gan_bce.generator(fake_N)


def minimax_loss(fake_N: Tensor) -> Tensor:
    """E[log(1 - D(G(z)))] from logits, () (Goodfellow et al. 2014, equation 1)."""
    return -F.softplus(fake_N.float()).mean()


def hinge_discriminator_loss(real_N: Tensor, fake_N: Tensor) -> Tensor:
    """E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))], () (Miyato et al. 2018, equation 16)."""
    return F.relu(1 - real_N.float()).mean() + F.relu(1 + fake_N.float()).mean()


def critic_generator_loss(fake_N: Tensor) -> Tensor:
    """-E[D(G(z))], (): of the hinge loss (Miyato et al. 2018, equation 17) and of Wasserstein's
    (Arjovsky et al. 2017, algorithm 1, line 11)."""
    return -fake_N.float().mean()


def wasserstein_critic_loss(real_N: Tensor, fake_N: Tensor) -> Tensor:
    """-(E[f(x)] - E[f(G(z))]), () (Arjovsky et al. 2017, equation 3 and algorithm 1, line 5)."""
    return fake_N.float().mean() - real_N.float().mean()


def least_squares_discriminator_loss(real_N: Tensor, fake_N: Tensor) -> Tensor:
    """1/2 E[(D(x) - 1)^2] + 1/2 E[D(G(z))^2], () (Mao et al. 2017, equation 9)."""
    return 0.5 * ((real_N.float() - 1).square().mean() + fake_N.float().square().mean())


def least_squares_generator_loss(fake_N: Tensor) -> Tensor:
    """1/2 E[(D(G(z)) - 1)^2], () (Mao et al. 2017, equation 9)."""
    return 0.5 * (fake_N.float() - 1).square().mean()


ADVERSARIES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "nonsaturating": (discriminator_loss, nonsaturating_loss),
    "minimax": (discriminator_loss, minimax_loss),
    "hinge": (hinge_discriminator_loss, critic_generator_loss),
    "least-squares": (least_squares_discriminator_loss, least_squares_generator_loss),
    "wasserstein": (wasserstein_critic_loss, critic_generator_loss),
}
"""By name: the loss of the discriminator, (real_N, fake_N) -> (), and of the generator,
(fake_N) -> (), from the discriminator's outputs."""


def sample_and_kl(
    mean_NL: Tensor, log_variance_NL: Tensor, noise_NL: Tensor
) -> tuple[Tensor, Tensor]:
    """z = mean + exp(log variance / 2) noise, (N, L), and KL(N(mean, variance) || N(0, 1)) summed
    over L, (N,) in nats (Kingma and Welling 2014, equation 10 and appendix B)."""
    return gaussian.sample_and_kl(mean_NL, log_variance_NL, noise_NL)


def gaussian_kl(mean_NL: Tensor, log_variance_NL: Tensor) -> Tensor:
    """That KL alone, (N,) in nats."""
    return gaussian.kl(mean_NL, log_variance_NL)


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
