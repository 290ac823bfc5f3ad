"""Adversarial losses from logits: closed forms, derivatives, extremes, and Triton's kernels in the
interpreter."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F

from engine.losses import discriminator_loss, nonsaturating_loss
from kernels import dispatch, gan_bce
from kernels.gan_bce import DISCRIMINATOR, GENERATOR, discriminator, generator
from tests import interpreted
from tests.interpreted import error

FORMS = list(DISCRIMINATOR)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half a unit in the last place of the gradients' dtype, or a little more; the interpreter cuts
# bf16 off instead of rounding it: twice the error.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3}
SIZES = [((1,), (1,)), ((7,), (3, 1)), ((1025, 1), (7,)), ((2, 1, 3, 4), (8193,))]


def logits(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=random) * 3).to(dtype)


def exact_discriminator(real: Tensor, fake: Tensor, form: str, a: float = 1.0, b: float = 0.0):
    """The formulas as papers and PyTorch have them, in float64."""
    real, fake = real.double(), fake.double()
    if form in ("bce", "minimax"):
        bce = F.binary_cross_entropy_with_logits
        return bce(real, torch.full_like(real, a)) + bce(fake, torch.full_like(fake, b))
    if form == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()  # no slope at 0
    if form == "least_squares":
        return F.mse_loss(real, torch.ones_like(real)) / 2 + fake.pow(2).mean() / 2
    return fake.mean() - real.mean()


def exact_generator(fake: Tensor, form: str) -> Tensor:
    fake = fake.double()
    if form == "bce":
        return F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))
    if form == "minimax":
        return torch.log1p(-torch.sigmoid(fake)).mean()
    if form == "least_squares":
        return F.mse_loss(fake, torch.ones_like(fake)) / 2
    return -fake.mean()


def value_and_gradients(loss: Callable, *given: Tensor, scale: float = 1.0) -> list[Tensor]:
    given = [x.detach().requires_grad_() for x in given]
    value = loss(*given)
    return [value.detach(), *torch.autograd.grad(value * scale, given)]


def assert_right(found: list[Tensor], wanted: list[Tensor]) -> None:
    torch.testing.assert_close(found[0].double(), wanted[0].double(), rtol=1e-6, atol=1e-6)
    for f, w in zip(found[1:], wanted[1:], strict=True):
        assert f.shape == w.shape
        assert error(f, w) <= TOLERANCE[f.dtype], (f.dtype, error(f, w))


# the reference, on the CPU


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_and_gradients_equal_the_formulas_in_float64(form, dtype):
    real, fake = logits(33, dtype=dtype), logits(2, 5, dtype=dtype, seed=1)
    with dispatch.using("reference"):
        found = value_and_gradients(lambda r, f: discriminator(r, f, form), real, fake)
        assert_right(
            found, value_and_gradients(lambda r, f: exact_discriminator(r, f, form), real, fake)
        )
        found = value_and_gradients(lambda f: generator(f, form), fake)
    assert found[0].dtype == torch.float32 and found[0].shape == ()
    assert_right(found, value_and_gradients(lambda f: exact_generator(f, form), fake))


def test_bce_with_targets_is_that_of_pytorch_and_without_that_of_the_engine():
    real, fake = logits(33), logits(9, seed=1)
    for a, b in ((0.9, 0.0), (0.9, 0.1), (0.0, 1.0)):
        found = discriminator(real, fake, "bce", a, b)
        assert found.item() == pytest.approx(exact_discriminator(real, fake, "bce", a, b).item())
    assert torch.equal(discriminator(real, fake), discriminator_loss(real, fake))
    assert torch.equal(generator(fake), nonsaturating_loss(fake))


def test_targets_of_least_squares_are_its_labels_a_and_b():
    real, fake = logits(33), logits(9, seed=1)
    found = discriminator(real, fake, "least_squares", 2.0, -1.0)
    wanted = (real - 2).square().mean() / 2 + (fake + 1).square().mean() / 2
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_first_and_second_derivatives_are_right(form):
    real, fake = (logits(n, seed=n).double().requires_grad_() for n in (5, 3))
    for fn, inputs in (
        (lambda r, f: discriminator(r, f, form), (real, fake)),
        (lambda f: generator(f, form), (fake,)),
    ):
        assert torch.autograd.gradcheck(fn, inputs)
        assert torch.autograd.gradgradcheck(fn, inputs)


def test_whole_numbers_and_float64_are_taken():
    whole = torch.tensor([3, -1])
    assert torch.equal(discriminator(whole, whole), discriminator(whole.float(), whole.float()))
    assert generator(whole.double()).dtype == torch.float64


def test_an_unknown_form_is_refused_and_the_known_are_named():
    names = "bce, minimax, hinge, least_squares, wasserstein"
    with pytest.raises(ValueError, match=names):
        generator(logits(3), "lsgan")
    with pytest.raises(ValueError, match=names):
        discriminator(logits(3), logits(3), "")
    assert list(GENERATOR) == FORMS


def test_no_logits_and_targets_without_a_use_are_refused():
    with pytest.raises(ValueError, match=r"no logits .* \(0, 1\)"):
        discriminator(logits(3), torch.empty(0, 1))
    with pytest.raises(ValueError, match="no logits"):
        generator(torch.empty(0))
    for form in ("hinge", "wasserstein"):
        with pytest.raises(ValueError, match="has no targets"):
            discriminator(logits(3), logits(3), form, real_target=0.9)


@pytest.mark.skipif(dispatch.INTERPRET, reason="without the interpreter")
def test_tensors_on_a_cpu_take_the_reference_and_leave_triton_alone(monkeypatch):
    monkeypatch.setattr(gan_bce, "_Loss", None)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "kernels.gan_bce_triton", raising=False)
    real = logits(5).requires_grad_()
    discriminator(real, logits(3)).backward()
    assert "kernels.gan_bce_triton" not in sys.modules


@pytest.mark.skipif(dispatch.INTERPRET, reason="without the interpreter")
def test_the_reference_compiles_whole():
    real, fake = logits(5), logits(3)
    compiled = torch.compile(discriminator, fullgraph=True, backend="aot_eager")
    for f, w in zip(
        value_and_gradients(compiled, real, fake),
        value_and_gradients(discriminator, real, fake),
        strict=True,
    ):
        torch.testing.assert_close(f, w)


# both, whichever serves


def check_extremes(dtype: torch.dtype, largest: float) -> None:
    for form in ("bce", "minimax", "hinge", "wasserstein"):
        for sign in (1, -1):
            x = torch.full((3,), sign * largest, dtype=dtype)
            found = value_and_gradients(lambda r, f, form=form: discriminator(r, f, form), x, x)
            found += value_and_gradients(lambda f, form=form: generator(f, form), x)
            assert all(t.isfinite().all() for t in found)


def check_tails() -> None:
    """Logits of which the discriminator is sure keep all the digits of a vanishing gradient."""
    x = torch.tensor([-40.0, -20.0, -10.0, 10.0, 20.0, 40.0])
    found = value_and_gradients(lambda r, f: discriminator(r, f), x, x, scale=6)
    wanted = [None, -torch.sigmoid(-x.double()), torch.sigmoid(x.double())]
    for f, w in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(f.double(), w, rtol=1e-5, atol=0)
    sure = torch.tensor([40.0])
    assert discriminator(sure, -sure).item() == pytest.approx(8.497e-18, rel=1e-3)


def check_nan() -> None:
    for form in FORMS:
        for at in (0, 1):
            given = [logits(5), logits(4, seed=1)]
            given[at][2] = torch.nan
            value, *gradients = value_and_gradients(
                lambda r, f, form=form: discriminator(r, f, form), *given
            )
            assert value.isnan()
            assert gradients[1 - at].isfinite().all()
            assert gradients[at][[0, 1, 3]].isfinite().all()
            assert gradients[at][2].isnan() or form in ("hinge", "wasserstein")
        assert generator(given[1], form).isnan()


def check_loss_scaling() -> None:
    """A PatchGAN's fp16 gradients, 1e-6 each, are below fp16 until the loss is scaled."""
    real, fake = (logits(128, 1, 30, 30, dtype=torch.float16, seed=s) for s in (0, 1))
    assert real.numel() == 115_200
    scaled = value_and_gradients(discriminator, real, fake, scale=65536.0)
    wanted = value_and_gradients(
        lambda r, f: exact_discriminator(r, f, "bce"), real.double(), fake.double(), scale=65536.0
    )
    for f, w in zip(scaled[1:], wanted[1:], strict=True):
        assert error(f, w) <= TOLERANCE[torch.float16]
    rough = value_and_gradients(discriminator, real, fake)[1].double() * 65536
    assert error(rough, wanted[1]) > 5 * TOLERANCE[torch.float16]


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e30), (torch.float16, 65504.0)])
def test_extreme_logits_give_finite_losses_and_gradients(dtype, largest):
    with dispatch.using("reference"):
        check_extremes(dtype, largest)


def test_vanishing_gradients_nan_and_loss_scaling_in_plain_pytorch():
    with dispatch.using("reference"):
        check_tails()
        check_nan()
        check_loss_scaling()


# the kernels, in the interpreter


@pytest.mark.skipif(dispatch.INTERPRET, reason="this starts the interpreter")
def test_the_interpreted_tests_of_this_file_pass():
    interpreted.run(__file__, fewest=60)


@interpreted.only
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SIZES, ids=str)
def test_kernels_equal_the_formulas_in_float64(form, dtype, shapes):
    real, fake = (logits(*s, dtype=dtype, seed=n) for n, s in enumerate(shapes))
    scale = float(max(real.numel(), fake.numel()))  # gradients of fp16's size
    found = value_and_gradients(lambda r, f: discriminator(r, f, form), real, fake, scale=scale)
    assert found[0].dtype == torch.float32 and found[0].shape == ()
    assert [g.dtype for g in found[1:]] == [dtype, dtype]
    exact = value_and_gradients(
        lambda r, f: exact_discriminator(r, f, form), real.double(), fake.double(), scale=scale
    )
    assert_right(found, exact)
    found = value_and_gradients(lambda f: generator(f, form), fake, scale=scale)
    exact = value_and_gradients(lambda f: exact_generator(f, form), fake.double(), scale=scale)
    assert_right(found, exact)


@interpreted.only
def test_kernels_take_targets_and_two_dtypes():
    real, fake = logits(33, dtype=torch.bfloat16), logits(5, 9, seed=1)
    found = value_and_gradients(lambda r, f: discriminator(r, f, "bce", 0.9, 0.1), real, fake)
    assert [g.dtype for g in found[1:]] == [torch.bfloat16, torch.float32]
    exact = value_and_gradients(
        lambda r, f: exact_discriminator(r, f, "bce", 0.9, 0.1), real.double(), fake.double()
    )
    assert_right(found, exact)


@interpreted.only
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, ::2, 1:],
        lambda x: x.transpose(1, 3),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x[:1, :1].expand(4, 3, 4, 5),
    ],
    ids=["sliced", "transposed", "channels_last", "expanded"],
)
def test_kernels_take_views(view):
    def loss(r: Tensor, f: Tensor) -> Tensor:
        return discriminator(view(r), view(f)) + generator(view(f), "hinge")

    real, fake = logits(4, 3, 4, 5), logits(2, 3, 4, 5, seed=1)
    found = value_and_gradients(loss, real, fake)
    with dispatch.using("reference"):
        assert_right(found, value_and_gradients(loss, real, fake))


@interpreted.only
@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e30), (torch.float16, 65504.0)])
def test_kernels_survive_extreme_logits(dtype, largest):
    check_extremes(dtype, largest)


@interpreted.only
@pytest.mark.parametrize("check", [check_tails, check_nan, check_loss_scaling])
def test_kernels_keep_tails_nan_and_small_gradients(check):
    check()


@interpreted.only
def test_kernels_give_the_same_bits_each_time():
    real, fake = logits(20_000), logits(9_000, seed=1)
    first, second = (value_and_gradients(discriminator, real, fake) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@interpreted.only
@pytest.mark.parametrize("count", [128, 8192])
def test_kernels_are_launched_once_each_way(count, monkeypatch):
    from kernels import gan_bce_triton as triton

    launched = []
    monkeypatch.setattr(triton, "launchable", lambda k: launched.append(k.fn.__name__) or k)
    value_and_gradients(discriminator, logits(count), logits(count))
    assert launched == ["loss_kernel", "gradient_kernel"]


@interpreted.only
@pytest.mark.parametrize("form", FORMS)
def test_kernels_have_second_and_third_derivatives(form):
    real, fake = logits(7), logits(3, seed=1)

    def penalty(loss: Callable, *given: Tensor) -> list[Tensor]:
        given = [x.clone().requires_grad_() for x in given]
        first = torch.autograd.grad(loss(*given).square(), given, create_graph=True)
        value = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(value, given, create_graph=True)
        return [*second, *torch.autograd.grad(sum(g.square().sum() for g in second), given)]

    for found, wanted in (
        (
            penalty(lambda r, f: discriminator(r, f, form), real, fake),
            penalty(lambda r, f: discriminator(r, f, form), real.double(), fake.double()),
        ),
        (
            penalty(lambda f: generator(f, form), fake),
            penalty(lambda f: generator(f, form), fake.double()),
        ),
    ):
        assert found[0].dtype == torch.float32
        for f, w in zip(found, wanted, strict=True):
            assert error(f.detach(), w.detach()) <= 5e-6


@interpreted.only
def test_kernels_leave_float64_and_whole_numbers_to_the_reference(monkeypatch):
    monkeypatch.setattr(gan_bce, "_Loss", None)
    assert generator(logits(3).double()).dtype == torch.float64
    assert discriminator(torch.tensor([3, -1]), logits(3)).isfinite()


@interpreted.only
@pytest.mark.parametrize("form", FORMS)
def test_kernels_compile_as_one_opaque_operation(form):
    graphs = []

    def backend(module: torch.fx.GraphModule, inputs: list):
        graphs.append(str(module.graph))
        return aot_eager(module, inputs)

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(real: Tensor, fake: Tensor) -> Tensor:
        return 2 * discriminator(real, fake, form) + generator(fake, form)

    def eager(real: Tensor, fake: Tensor) -> Tensor:
        return 2 * discriminator(real, fake, form) + generator(fake, form)

    given = logits(33), logits(9, 1, seed=1)
    found, wanted = value_and_gradients(compiled, *given), value_and_gradients(eager, *given)
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
    assert len(graphs) == 1
    assert graphs[0].count("saddle.gan_bce_forward") == 2


@interpreted.only
def test_kernels_pass_the_checks_of_custom_operations():
    forward, backward = gan_bce.forward_op, gan_bce.backward_op
    real, fake = logits(7).requires_grad_(), logits(3, 1).half().requires_grad_()
    grad = torch.tensor(2.0, requires_grad=True)
    for given, term, ts in (([real, fake], "bce", [0.9, 0.0]), ([fake.mT], "linear", [-1.0])):
        torch.library.opcheck(forward, (given, term, ts))
        torch.library.opcheck(backward, (grad, given, term, ts))
