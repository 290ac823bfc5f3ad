"""Losses: closed forms, independent formulations, derivatives, and extreme inputs."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn import functional as F

from engine.losses import (
    bernoulli_nll,
    discriminator_loss,
    gaussian_kl,
    gaussian_nll,
    nonsaturating_loss,
)

LOG_2 = math.log(2)


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def wide(*shape: int, random: torch.Generator) -> Tensor:
    """float64 numbers that need a gradient."""
    return torch.randn(*shape, dtype=torch.float64, generator=random).requires_grad_()


# adversarial losses


def test_an_undecided_discriminator_loses_log_4_and_its_generator_log_2():
    zero = torch.zeros(5)
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * LOG_2)
    assert nonsaturating_loss(zero).item() == pytest.approx(LOG_2)


def test_a_discriminator_that_is_right_loses_nothing_and_its_generator_loses_the_logit():
    sure = torch.full((4,), 100.0)
    assert discriminator_loss(sure, -sure).item() == pytest.approx(0, abs=1e-30)
    assert discriminator_loss(-sure, sure).item() == pytest.approx(200)
    assert nonsaturating_loss(-sure).item() == pytest.approx(100)


def test_they_equal_binary_cross_entropy_with_logits(random):
    real_N, fake_N = torch.randn(2, 33, generator=random) * 5
    ones, zeros = torch.ones(33), torch.zeros(33)
    bce = F.binary_cross_entropy_with_logits
    wanted = bce(real_N, ones) + bce(fake_N, zeros)
    torch.testing.assert_close(discriminator_loss(real_N, fake_N), wanted)
    torch.testing.assert_close(nonsaturating_loss(fake_N), bce(fake_N, ones))


def test_they_equal_the_equations_of_the_paper(random):
    real_N, fake_N = torch.randn(2, 33, generator=random)
    d_real, d_fake = real_N.double().sigmoid(), fake_N.double().sigmoid()
    wanted = -(d_real.log().mean() + (1 - d_fake).log().mean())
    assert discriminator_loss(real_N, fake_N).item() == pytest.approx(wanted.item(), rel=1e-6)
    assert nonsaturating_loss(fake_N).item() == pytest.approx(-d_fake.log().mean().item(), rel=1e-6)


def test_their_derivatives_are_those_of_the_logistic_function(random):
    real_N, fake_N = (torch.randn(9, generator=random).requires_grad_() for _ in range(2))
    loss = discriminator_loss(real_N, fake_N)
    real_grad, fake_grad = torch.autograd.grad(loss, (real_N, fake_N), create_graph=True)
    torch.testing.assert_close(real_grad, -torch.sigmoid(-real_N) / 9)
    torch.testing.assert_close(fake_grad, torch.sigmoid(fake_N) / 9)
    (second,) = torch.autograd.grad(fake_grad.sum(), fake_N)
    torch.testing.assert_close(second, torch.sigmoid(fake_N) * torch.sigmoid(-fake_N) / 9)
    (grad,) = torch.autograd.grad(nonsaturating_loss(fake_N), fake_N)
    torch.testing.assert_close(grad, -torch.sigmoid(-fake_N) / 9)


@pytest.mark.parametrize("logit", [-1e30, -1e4, -100.0, 100.0, 1e4, 1e30])
def test_extreme_logits_give_finite_losses_and_gradients(logit):
    real_N, fake_N = (torch.full((3,), logit, requires_grad=True) for _ in range(2))
    loss = discriminator_loss(real_N, fake_N) + nonsaturating_loss(fake_N)
    loss.backward()
    assert loss.isfinite()
    assert real_N.grad.isfinite().all() and fake_N.grad.isfinite().all()


def test_bf16_logits_are_computed_in_fp32(random):
    real_N, fake_N = torch.randn(2, 257, generator=random).bfloat16()
    loss = discriminator_loss(real_N, fake_N)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, discriminator_loss(real_N.float(), fake_N.float()))
    assert torch.equal(nonsaturating_loss(fake_N), nonsaturating_loss(fake_N.float()))
    rough = F.softplus(-real_N).mean() + F.softplus(fake_N).mean()
    assert rough.dtype == torch.bfloat16 and rough.float() != loss


# likelihood losses


def test_the_kl_of_a_standard_normal_to_itself_is_zero():
    assert gaussian_kl(torch.zeros(2, 5), torch.zeros(2, 5)).tolist() == [0, 0]


def test_the_kl_in_closed_form():
    kl_N = gaussian_kl(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, math.log(4)]]))
    assert kl_N.item() == pytest.approx(0.5 * 4 + 0.5 * (4 - 1 - math.log(4)))


def test_the_kl_equals_that_of_torch_distributions(random):
    mean_NL, log_variance_NL = torch.randn(2, 7, 20, generator=random, dtype=torch.float64)
    q = Normal(mean_NL, (0.5 * log_variance_NL).exp())
    wanted_N = kl_divergence(q, Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(gaussian_kl(mean_NL, log_variance_NL), wanted_N)


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
def test_the_kl_keeps_its_digits_near_zero_in_float32(size):
    """Against the series v^2/2 + v^3/6 + v^4/24, exact here to 1e-10 of its value."""
    v = torch.tensor([[size], [-size]], dtype=torch.float32)
    exact = v.double()
    spread = exact**2 / 2 + exact**3 / 6 + exact**4 / 24
    got_N = gaussian_kl(torch.zeros_like(v), v).double()
    torch.testing.assert_close(got_N, 0.5 * spread[:, 0], rtol=2e-3, atol=0)
    with_mean_N = gaussian_kl(v, v).double()
    torch.testing.assert_close(with_mean_N, 0.5 * (spread + exact**2)[:, 0], rtol=2e-3, atol=0)


def test_the_kl_written_as_in_the_paper_loses_its_digits_there():
    v = torch.tensor(1e-4)
    naive = -0.5 * (1 + v - v.exp())
    assert abs(naive.item() / 2.5e-9 - 1) > 0.1


def test_bernoulli_equals_torch_distributions_for_black_and_white(random):
    logits = torch.randn(3, 2, 4, 4, generator=random)
    target = (torch.rand(3, 2, 4, 4, generator=random) > 0.5).float()
    wanted_N = -Bernoulli(logits=logits).log_prob(target).sum((1, 2, 3))
    torch.testing.assert_close(bernoulli_nll(logits, target), wanted_N)


def test_bernoulli_of_grey_targets_is_the_cross_entropy(random):
    logits = torch.randn(3, 1, 4, 4, generator=random, dtype=torch.float64)
    target = torch.rand(3, 1, 4, 4, generator=random, dtype=torch.float64)
    p = logits.sigmoid()
    wanted = -(target * p.log() + (1 - target) * (1 - p).log())
    torch.testing.assert_close(bernoulli_nll(logits, target), wanted.sum((1, 2, 3)))
    assert bernoulli_nll(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.3)).item() == (
        pytest.approx(4 * LOG_2)
    )


def test_gaussian_equals_torch_distributions_without_the_constant(random):
    mean, target = torch.randn(2, 3, 2, 4, 4, generator=random, dtype=torch.float64)
    log_p_N = Normal(mean, 1.0).log_prob(target).sum((1, 2, 3))
    constant = 32 * 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(gaussian_nll(mean, target), -log_p_N - constant)


@pytest.mark.parametrize("value", [-1e4, 1e4])
def test_extreme_decoder_logits_give_finite_losses(value):
    logits = torch.full((2, 1, 2, 2), value, requires_grad=True)
    nll_N = bernoulli_nll(logits, torch.full((2, 1, 2, 2), 0.5))
    nll_N.sum().backward()
    assert nll_N.tolist() == [pytest.approx(4 * 0.5 * 1e4)] * 2
    assert logits.grad.isfinite().all()


def test_first_and_second_derivatives_of_the_likelihood_losses_are_right(random):
    mean, log_variance = wide(3, 4, random=random), wide(3, 4, random=random)
    pixels = wide(2, 1, 2, 2, random=random)
    target = torch.rand(2, 1, 2, 2, dtype=torch.float64, generator=random)
    for fn, inputs in (
        (gaussian_kl, (mean, log_variance)),
        (lambda x: bernoulli_nll(x, target), (pixels,)),
        (lambda x: gaussian_nll(x, target), (pixels,)),
    ):
        assert torch.autograd.gradcheck(fn, inputs)
        assert torch.autograd.gradgradcheck(fn, inputs)


def test_likelihoods_are_per_image_sums():
    x = torch.zeros(5, 3, 4, 4)
    assert bernoulli_nll(x, x).shape == gaussian_nll(x, x).shape == (5,)
    assert gaussian_nll(x, x + 1).tolist() == [24.0] * 5
    assert gaussian_kl(torch.ones(5, 6), torch.zeros(5, 6)).tolist() == [3.0] * 5
