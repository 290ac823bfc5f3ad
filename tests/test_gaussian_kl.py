"""A Gaussian's sample and KL divergence: closed forms, accuracy near nothing, derivatives, and
Triton's kernels in the interpreter."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.distributions import Normal, kl_divergence

from kernels import dispatch, gaussian_kl
from kernels.gaussian_kl import kl, sample_and_kl
from tests import interpreted
from tests.interpreted import error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half a unit in the last place of the dtype, or a little more; the interpreter cuts bf16 off
# instead of rounding it: twice the error.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3}
SHAPES = [(1, 1), (7, 20), (3, 1025), (2, 4097), (33, 128)]
# Every size of a log variance that float32 has: near nothing, about the branches, and the ends.
SIZES = torch.logspace(-12, 0.7, 2001)
LOG_VARIANCES = torch.cat(
    [SIZES, -SIZES, torch.linspace(-3, 3, 2001), torch.linspace(-99, 88, 997)]
)


def given(n: int, latents: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """An encoder's output (N, 2 L), whose halves are mean and log variance; and noise."""
    random = torch.Generator().manual_seed(0)
    return (
        torch.randn(n, 2 * latents, generator=random).to(dtype),
        torch.randn(n, latents, generator=random).to(dtype),
    )


def exact_spread(v: Tensor) -> Tensor:
    """e^v - 1 - v in float64; near 0 by ten terms of its series, exact there to 1e-17 of it."""
    v = v.double()
    term, series = v.square() / 2, torch.zeros_like(v)
    for k in range(3, 13):
        series = series + term
        term = term * v / k
    return torch.where(v.abs() < 0.05, series, torch.expm1(v) - v)


def exact(mean: Tensor, log_variance: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """As the paper has it, by torch.distributions, in float64."""
    mean, scale = mean.double(), (0.5 * log_variance.double()).exp()
    return mean + scale * noise.double(), kl_divergence(Normal(mean, scale), Normal(0, 1)).sum(1)


def values_and_gradient(fn: Callable, encoded: Tensor, noise: Tensor) -> list[Tensor]:
    """z, KL, and the gradient of a function of both with respect to the encoder's output."""
    encoded = encoded.detach().requires_grad_()
    z, nats = fn(*encoded.chunk(2, 1), noise)
    weight = torch.arange(1, 1 + len(nats), dtype=nats.dtype)
    loss = (z.to(nats.dtype) * torch.linspace(-2, 1, z.shape[1])).sum() + (nats * weight).sum()
    (gradient,) = torch.autograd.grad(loss, encoded)
    return [z.detach(), nats.detach(), gradient]


def assert_right(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    z, nats, gradient = found
    assert (z.dtype, nats.dtype, gradient.dtype) == (dtype, torch.float32, dtype)
    assert [t.shape for t in found] == [t.shape for t in wanted]
    assert error(z, wanted[0]) <= TOLERANCE[dtype]
    torch.testing.assert_close(nats.double(), wanted[1].double(), rtol=1e-6, atol=0)
    assert error(gradient, wanted[2]) <= TOLERANCE[dtype]


# both, whichever serves


def check_accuracy() -> None:
    """1e-6 of the KL and of its gradient, and of exp(v / 2), at every size; likewise the mean's."""
    v = LOG_VARIANCES[:, None].clone().requires_grad_()
    zero = torch.zeros_like(v)
    nats = kl(zero, v)
    torch.testing.assert_close(nats.double(), exact_spread(v)[:, 0] / 2, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(nats.sum(), v)
    torch.testing.assert_close(gradient.double(), torch.expm1(v.double()) / 2, rtol=1e-6, atol=0)
    z, _ = sample_and_kl(zero, v, torch.ones_like(v))
    torch.testing.assert_close(z.double(), torch.exp(v.double() / 2), rtol=1e-6, atol=0)
    for size in (1e-8, 1e-4):
        mean = torch.full((1, 64), size)
        wanted = (exact_spread(mean) + mean.double().square()).sum() / 2
        assert kl(mean, mean).item() == pytest.approx(wanted.item(), rel=1e-6)


def check_extremes() -> None:
    one = torch.ones(1, 1)
    for log_variance, scale in ((176.0, 1.6516363e38), (88.7, 1.8237260e19), (-1e30, 0.0)):
        v = torch.full((1, 1), log_variance, requires_grad=True)
        z, nats = sample_and_kl(0 * one, v, one)
        assert z.item() == pytest.approx(scale, rel=1e-6)
        assert torch.autograd.grad(z.sum(), v)[0].item() == pytest.approx(scale / 2, rel=1e-6)
    assert kl(0 * one, 88.7 * one).item() == pytest.approx(1.66298843e38, rel=1e-6)
    assert kl(0 * one, 89 * one).item() == kl(1e25 * one, one).item() == torch.inf
    assert nats.item() == pytest.approx(5e29)


def check_nan() -> None:
    for at in range(3):
        inputs = [torch.zeros(2, 5) for _ in range(3)]
        inputs[at][1, 2] = torch.nan
        z, nats = sample_and_kl(*inputs)
        assert nats.isnan().tolist() == [False, at < 2]
        assert z.isnan().nonzero().tolist() == [[1, 2]]
        assert kl(*inputs[:2]).isnan().tolist() == [False, at < 2]


# the reference, on the CPU


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_kl_and_gradients_equal_torch_distributions(dtype):
    encoded, noise = given(7, 20, dtype)
    with dispatch.using("reference"):
        found = values_and_gradient(sample_and_kl, encoded, noise)
        assert torch.equal(kl(*encoded.chunk(2, 1)), found[1])
    assert_right(found, values_and_gradient(exact, encoded.double(), noise), dtype)


@pytest.mark.parametrize("check", [check_accuracy, check_extremes, check_nan])
def test_plain_pytorch_is_accurate_at_all_sizes_and_survives_extremes(check):
    with dispatch.using("reference"):
        check()


def test_first_and_second_derivatives_are_right_also_those_of_noise():
    random = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(3, 4, dtype=torch.float64, generator=random).requires_grad_() for _ in range(3)
    ]
    assert torch.autograd.gradcheck(sample_and_kl, inputs)
    assert torch.autograd.gradgradcheck(sample_and_kl, inputs)
    assert torch.autograd.gradgradcheck(kl, inputs[:2])


def test_empty_batches_and_float64_are_taken():
    assert [t.shape for t in sample_and_kl(*torch.empty(3, 0, 4))] == [(0, 4), (0,)]
    assert kl(*torch.empty(2, 3, 0)).tolist() == [0, 0, 0]
    assert kl(*torch.zeros(2, 3, 4, dtype=torch.float64)).dtype == torch.float64


def test_shapes_that_differ_are_refused():
    x = torch.zeros(3, 4)
    for inputs in ((x, x[:, :3], x), (x, x, x[:1]), (x[0], x[0], x[0])):
        with pytest.raises(ValueError, match=r"one shape \(N, L\)"):
            sample_and_kl(*inputs)


@pytest.mark.skipif(dispatch.INTERPRET, reason="without the interpreter")
def test_tensors_on_a_cpu_take_the_reference_and_leave_triton_alone(monkeypatch):
    monkeypatch.setattr(gaussian_kl, "_SampleAndKl", None)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "kernels.gaussian_kl_triton", raising=False)
    values_and_gradient(sample_and_kl, *given(3, 4))
    assert "kernels.gaussian_kl_triton" not in sys.modules


@pytest.mark.skipif(dispatch.INTERPRET, reason="without the interpreter")
def test_the_reference_compiles_whole():
    compiled = torch.compile(sample_and_kl, fullgraph=True, backend="aot_eager")
    found = values_and_gradient(compiled, *given(3, 4))
    for f, w in zip(found, values_and_gradient(sample_and_kl, *given(3, 4)), strict=True):
        torch.testing.assert_close(f, w)


# the kernels, in the interpreter


@pytest.mark.skipif(dispatch.INTERPRET, reason="this starts the interpreter")
def test_the_interpreted_tests_of_this_file_pass():
    interpreted.run(__file__, fewest=25)


@interpreted.only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_torch_distributions(dtype, shape):
    encoded, noise = given(*shape, dtype)
    found = values_and_gradient(sample_and_kl, encoded, noise)
    assert_right(found, values_and_gradient(exact, encoded.double(), noise), dtype)
    alone = encoded.clone().requires_grad_()
    nats = kl(*alone.chunk(2, 1))
    assert torch.equal(nats.detach(), found[1])
    wide = encoded.double().requires_grad_()
    (gradient,) = torch.autograd.grad(nats.sum(), alone)
    (wanted,) = torch.autograd.grad(exact(*wide.chunk(2, 1), noise)[1].sum(), wide)
    assert error(gradient, wanted) <= TOLERANCE[dtype]


@interpreted.only
@pytest.mark.parametrize("check", [check_accuracy, check_extremes, check_nan])
def test_kernels_are_accurate_at_all_sizes_and_survive_extremes(check):
    check()


@interpreted.only
def test_kernels_take_two_dtypes():
    encoded, noise = given(5, 20)
    mean, log_variance = encoded.chunk(2, 1)
    mean = mean.bfloat16().requires_grad_()
    log_variance = log_variance.clone().requires_grad_()
    z, nats = sample_and_kl(mean, log_variance, noise.half())
    gradients = torch.autograd.grad(z.float().sum() + nats.sum(), (mean, log_variance))
    assert (z.dtype, *(g.dtype for g in gradients)) == (*[torch.bfloat16] * 2, torch.float32)
    wanted_z, wanted = exact(mean, log_variance, noise.half())
    assert error(z.detach(), wanted_z.detach()) <= TOLERANCE[torch.bfloat16]
    torch.testing.assert_close(nats.double(), wanted, rtol=1e-6, atol=0)
    exact_gradients = torch.autograd.grad(wanted_z.sum() + wanted.sum(), (mean, log_variance))
    assert error(gradients[0], exact_gradients[0]) <= TOLERANCE[torch.bfloat16]
    assert error(gradients[1], exact_gradients[1]) <= TOLERANCE[torch.float32]


@interpreted.only
@pytest.mark.parametrize("transposed", [False, True])
def test_kernels_take_views_and_copy_only_what_is_not_in_rows(transposed, monkeypatch):
    """Inputs and gradients of odd strides; a chunk and a broadcast row are read where they lie."""
    encoded, noise = given(6, 10)
    if transposed:
        encoded = encoded.t().contiguous().t()
    noise = noise[:1].expand(6, 10)
    with dispatch.using("reference"):
        wanted = values_and_gradient(sample_and_kl, encoded, noise)
    copies, contiguous = [], Tensor.contiguous
    monkeypatch.setattr(
        Tensor, "contiguous", lambda x, *a, **k: copies.append(1) or contiguous(x, *a, **k)
    )
    assert_right(values_and_gradient(sample_and_kl, encoded, noise), wanted, torch.float32)
    assert len(copies) == (4 if transposed else 0)


@interpreted.only
def test_kernels_give_the_same_bits_each_time():
    first, second = (values_and_gradient(sample_and_kl, *given(5, 5000)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@interpreted.only
def test_kernels_are_launched_once_each_way(monkeypatch):
    from kernels import gaussian_kl_triton as triton

    launched = []
    monkeypatch.setattr(triton, "launchable", lambda k: launched.append(k.fn.__name__) or k)
    values_and_gradient(sample_and_kl, *given(128, 128))
    assert launched == ["forward_kernel", "backward_kernel"]


@interpreted.only
@pytest.mark.parametrize("sample", [True, False])
def test_kernels_have_second_and_third_derivatives(sample):
    def derivatives(encoded: Tensor, noise: Tensor) -> list[Tensor]:
        encoded = encoded.clone().requires_grad_()
        mean, log_variance = encoded.chunk(2, 1)
        if sample:
            z, nats = sample_and_kl(mean, log_variance, noise)
            value = z.pow(3).sum() + nats.square().sum()
        else:
            value = kl(mean, log_variance).square().sum()
        found = []
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, encoded, create_graph=True)
            found.append(gradient.detach())
            value = gradient.square().sum()
        return found

    encoded, noise = given(3, 5)
    found, wanted = derivatives(encoded, noise), derivatives(encoded.double(), noise.double())
    for f, w in zip(found, wanted, strict=True):
        assert f.dtype == torch.float32
        assert error(f, w) <= 5e-6


@interpreted.only
def test_kernels_leave_float64_empty_batches_and_noise_with_a_gradient_alone(monkeypatch):
    monkeypatch.setattr(gaussian_kl, "_SampleAndKl", None)
    test_empty_batches_and_float64_are_taken()
    encoded, noise = given(3, 4)
    noise.requires_grad_()
    z, _ = sample_and_kl(*encoded.chunk(2, 1), noise)
    (gradient,) = torch.autograd.grad(z.sum(), noise)
    torch.testing.assert_close(gradient, torch.exp(0.5 * encoded.chunk(2, 1)[1]))


@interpreted.only
@pytest.mark.parametrize("latents", [20, 4097])
def test_kernels_compile_as_one_opaque_operation(latents):
    graphs = []

    def backend(module: torch.fx.GraphModule, inputs: list):
        graphs.append(str(module.graph))
        return aot_eager(module, inputs)

    def fn(mean: Tensor, log_variance: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        z, nats = sample_and_kl(mean, log_variance, noise)
        return 2 * z, nats + kl(mean, log_variance)

    compiled = torch.compile(fn, fullgraph=True, backend=backend)
    found = values_and_gradient(compiled, *given(3, latents))
    wanted = values_and_gradient(fn, *given(3, latents))
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
    assert len(graphs) == 1
    assert graphs[0].count("saddle.gaussian_kl_forward") == 2


@interpreted.only
@pytest.mark.parametrize("sample", [True, False])
def test_kernels_pass_the_checks_of_custom_operations(sample):
    forward, backward = gaussian_kl.forward_op, gaussian_kl.backward_op
    mean, log_variance, dz = (torch.randn(7, 20, requires_grad=True) for _ in range(3))
    noise = torch.randn(7, 20) if sample else None
    dz = dz if sample else torch.zeros(0, 20)
    torch.library.opcheck(forward, (mean, log_variance.half(), noise))
    dkl = torch.ones(7, requires_grad=True)
    torch.library.opcheck(backward, (dz, dkl, mean, log_variance.half(), noise))
