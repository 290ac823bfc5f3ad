"""BatchNorm + LeakyReLU: the plain form, and Triton's kernels in the interpreter."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from kernels import batchnorm_leaky_relu as front
from kernels import dispatch
from kernels.batchnorm_leaky_relu import backward_reference, batchnorm_leaky_relu
from tests import interpreted
from tests.interpreted import error

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
SHAPES = [
    *((6, 33), (3, 5, 33), (4, 3, 5, 7), (8, 40, 4, 4), (1, 3, 7, 7), (2, 16, 16, 16)),
    *((2, 3, 4, 5, 6), (2, 1, 1, 1025), (128, 2, 1, 1)),
]
# Norm of the error as a share of the norm, against float64. The interpreter cuts bf16 off instead
# of rounding it: twice the error.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-4, torch.bfloat16: 6e-3}


def given(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 50.0, std: float = 3.0):
    random = torch.Generator().manual_seed(3)
    x = (torch.randn(shape, generator=random) * std + mean).to(dtype)
    dy = torch.randn(shape, generator=random).to(dtype)
    weight, bias = torch.randn(2, shape[1], generator=random)
    return x, dy, weight, bias


def exact(x, dy, weight, bias, training, slope, momentum=0.1, running=True):
    """(y, dx, dweight, dbias, running mean, running variance) in float64."""
    x, weight, bias = (
        t.detach().clone().double().requires_grad_() if t is not None else None
        for t in (x, weight, bias)
    )
    tracked = statistics(x.shape[1], torch.float64) if running else (None, None)
    z = F.batch_norm(x, *tracked, weight, bias, training, momentum, 1e-5)
    y = F.leaky_relu(z, slope)
    y.backward(dy.double())
    return (
        y.detach(),
        x.grad,
        *(t.grad if t is not None else None for t in (weight, bias)),
        *tracked,
    )


def ours(x, dy, weight, bias, training, slope, momentum=0.1, running=True, save="input"):
    x, weight, bias = (
        t.detach().clone().requires_grad_() if t is not None else None for t in (x, weight, bias)
    )
    tracked = statistics(x.shape[1], torch.float32) if running else (None, None)
    y = batchnorm_leaky_relu(x, weight, bias, *tracked, training, momentum, 1e-5, slope, save)
    y.backward(dy)
    return (
        y.detach(),
        x.grad,
        *(t.grad if t is not None else None for t in (weight, bias)),
        *tracked,
    )


def statistics(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.full((channels,), 50.0, dtype=dtype), torch.full((channels,), 9.0, dtype=dtype)


def compare(found, wanted, dtype: torch.dtype, factor: float = 1.0) -> None:
    limits = [TOLERANCE[dtype]] * 2 + [2e-5] * 2 + [1e-6] * 2
    names = ("y", "dx", "dweight", "dbias", "running mean", "running variance")
    for name, a, b, limit in zip(names, found, wanted, limits, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert error(a, b) <= limit * factor, f"{name}: {error(a, b):.1e}"


def in_format(tensor: Tensor, last: bool) -> Tensor:
    return tensor.contiguous(memory_format=FORMATS[tensor.ndim]) if last else tensor


def layouts(shape: tuple[int, ...]) -> list[bool]:
    return [False, True] if len(shape) in FORMATS else [False]


# the plain form


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_plain_form_is_batchnorm_and_leaky_relu(shape, training, slope):
    with dispatch.using("reference"):
        arguments = given(shape, torch.float32)
        compare(
            ours(*arguments, training, slope), exact(*arguments, training, slope), torch.float32, 20
        )


def test_without_the_interpreter_cpu_tensors_take_plain_pytorch(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    assert not dispatch.serves(front.NAME, torch.zeros(2, 3))
    with dispatch.using("fused"):  # a session of another test may have left its own setting
        assert dispatch.choose(front.NAME, torch.device("cuda")).fused
    with dispatch.using("auto"):
        choice = dispatch.choose(front.NAME, torch.device("cuda"))
        assert not choice.fused and "--kernels fused" in choice.reason
    with dispatch.using("reference"):
        assert (
            dispatch.choose(front.NAME, torch.device("cuda")).reason == "the setting is reference"
        )


@pytest.mark.parametrize("fixed", [False, True])
def test_the_reference_of_the_gradient_is_the_gradient(fixed):
    x, dy, weight, bias = (t.double() for t in given((3, 4, 2, 2), torch.float32))
    stats = torch.stack([torch.full((4,), 50.0), torch.full((4,), 1 / 3.0)]).double()
    dx, gradients = backward_reference(dy, x, weight, bias, stats, 1e-5, 0.2, fixed)
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    running = (None, None) if not fixed else (stats[0], stats[1] ** -2 - 1e-5)
    y = F.leaky_relu(F.batch_norm(leaves[0], *running, *leaves[1:], not fixed, 0.0, 1e-5), 0.2)
    wanted = torch.autograd.grad(y, leaves, dy)
    assert error(dx, wanted[0]) < 1e-12
    assert error(gradients, torch.stack(wanted[1:])) < 1e-12
    assert torch.autograd.gradcheck(
        lambda *t: backward_reference(*t, stats, 1e-5, 0.2, fixed),
        [t.requires_grad_() for t in (dy, x, weight, bias)],
        fast_mode=True,
    )


@interpreted.either
@pytest.mark.parametrize(
    ("x", "options", "kind", "text"),
    [
        (torch.zeros(4, 3, dtype=torch.int64), {}, RuntimeError, "floating-point"),
        (torch.zeros(4), {}, ValueError, "2D to 5D"),
        (torch.zeros(4, 3), {"slope": 1.5}, ValueError, "slope 1.5"),
        (torch.zeros(4, 3), {"save": "both"}, ValueError, "save='both'"),
        (torch.zeros(4, 3), {"save": "output", "slope": 0.0}, ValueError, "slope above 0"),
        (
            torch.zeros(4, 3),
            {"weight": torch.ones(2), "bias": torch.ones(2)},
            RuntimeError,
            "should contain 3 elements not 2",
        ),
        (torch.zeros(1, 3, 1, 1), {}, ValueError, "more than 1 value per channel"),
    ],
)
def test_wrong_input_is_refused_kernel_or_not(x, options, kind, text):
    with pytest.raises(kind, match=text):
        batchnorm_leaky_relu(x, **options)


# the kernels, in the interpreter


def test_the_interpreted_tests_of_this_file_pass():
    interpreted.run(__file__, fewest=50)


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    if dispatch.INTERPRET:
        from kernels import batchnorm_launch

        monkeypatch.setattr(batchnorm_launch, "PROGRAMS", 8)
        monkeypatch.setattr(batchnorm_launch, "TILE", 512)


@interpreted.only
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_are_as_exact_as_their_dtype(shape, dtype):
    for last in layouts(shape):
        for training in (True, False):
            x, dy, weight, bias = given(shape, dtype)
            x = in_format(x, last)
            found = ours(x, dy, weight, bias, training, 0.2)
            wanted = exact(x, dy, weight, bias, training, 0.2)
            compare(found, wanted, dtype)
            with dispatch.using("reference"):
                eager = error(ours(x, dy, weight, bias, training, 0.2)[0], wanted[0])
            assert (
                error(found[0], wanted[0]) <= (4 if dtype == torch.bfloat16 else 2) * eager + 1e-7
            )
            assert found[0].dtype == found[1].dtype == dtype
            assert found[0].stride() == found[1].stride() == x.stride()


@interpreted.only
@pytest.mark.parametrize(
    "options", [{"affine": False}, {"running": False}, {"momentum": 1.0}], ids=str
)
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_kernels_without_affine_or_running_statistics(slope, options):
    x, dy, weight, bias = given((4, 3, 5, 7), torch.float32)
    if not options.pop("affine", True):
        weight = bias = None
    for training in (True,) if "running" in options else (True, False):
        found = ours(x, dy, weight, bias, training, slope, **options)
        compare(found, exact(x, dy, weight, bias, training, slope, **options), torch.float32)


@interpreted.only
@pytest.mark.parametrize("last", [False, True])
def test_kernels_that_split_a_channel_and_that_hold_it_whole_agree(last, monkeypatch):
    from kernels import batchnorm_launch as launch

    x, dy, weight, bias = given((4, 33, 4, 4), torch.float32, 2.0, 1.0)
    x = in_format(x, last)
    results, splits = [], []
    for programs, fewest in ((1, 1000), (3 if last else 66, 1000), (1, 1)):
        monkeypatch.setattr(launch, "PROGRAMS", programs)
        monkeypatch.setattr(launch, "TILE", 16)
        monkeypatch.setattr(launch, "FEWEST_CHANNELS", fewest)
        splits.append(launch.layout_of(x).splits)
        results.append(ours(x, dy, weight, bias, True, 0.2))
    assert splits[0] == 1 and splits[1] > 1
    for other in results[1:]:
        compare(other, results[0], torch.float32)


@interpreted.only
@pytest.mark.parametrize(
    ("dtype", "limits"),
    [(torch.float32, (5e-6, 2e-5, 2e-5)), (torch.bfloat16, (6e-3, 1e-2, 3e-2))],
    ids=["fp32", "bf16"],
)
def test_kernels_that_keep_the_output_alone(dtype, limits):
    """The gradient of the weight is from what rounding has left of y: coarser in bf16."""
    for shape in ((4, 3, 5, 7), (8, 40, 4, 4)):
        x, dy, weight, bias = given(shape, dtype)
        weight = weight.abs() + 0.5
        for training in (True, False):
            found = ours(x, dy, weight, bias, training, 0.2, save="output")
            wanted = exact(x, dy, weight, bias, training, 0.2)
            for a, b, limit in zip(found[:3], wanted, limits, strict=False):
                assert error(a, b) <= limit


@interpreted.only
def test_kernels_keep_their_digits_far_from_zero():
    """Mean over standard deviation 10,000: a difference of squares has none left."""
    x, dy, weight, bias = given((8, 40, 4, 4), torch.float32, mean=1e4, std=1.0)
    for last in (False, True):
        found = ours(in_format(x, last), dy, weight, bias, True, 0.2)
        wanted = exact(x, dy, weight, bias, True, 0.2)
        plain_error = error(
            F.leaky_relu(F.batch_norm(x, None, None, weight, bias, True), 0.2), wanted[0]
        )
        assert error(found[0], wanted[0]) <= max(2 * plain_error, 5e-6)
        assert error(found[5], wanted[5]) < 1e-4


@interpreted.only
def test_kernels_give_the_same_bits_twice_and_take_gradients_in_any_layout():
    x, dy, weight, bias = given((4, 6, 6, 6), torch.float32)
    first = ours(x, dy, weight, bias, True, 0.2)
    again = ours(x, in_format(dy, True), weight, bias, True, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    sliced = ours(torch.cat([x, x], 1)[:, :6], dy, weight, bias, True, 0.2)
    compare(sliced, exact(x, dy, weight, bias, True, 0.2), torch.float32)
    expanded = ours(x, torch.ones(()).expand(x.shape), weight, bias, True, 0.2)
    compare(expanded, exact(x, torch.ones_like(x), weight, bias, True, 0.2), torch.float32, 5)


@interpreted.only
def test_kernels_let_nan_and_infinity_through():
    for bad in (float("nan"), float("inf")):
        x, dy, weight, bias = given((8, 40, 4, 4), torch.float32)
        x[0, 1, 0, 0] = bad
        for last in (False, True):
            y, dx, *_ = ours(in_format(x, last), dy, weight, bias, True, 0.2)
            assert y[:, 1].isnan().all() and dx[:, 1].isnan().all()
            assert y[:, 0].isfinite().all() and dx[:, 2:].isfinite().all()


@interpreted.only
def test_kernels_with_weights_of_zero_and_below():
    x, dy, _, bias = given((4, 3, 5, 7), torch.float32)
    weight = torch.tensor([0.0, -1.0, -1e-6])
    compare(
        ours(x, dy, weight, bias, True, 0.2), exact(x, dy, weight, bias, True, 0.2), torch.float32
    )


@interpreted.only
@pytest.mark.parametrize("training", [True, False])
def test_kernels_have_second_derivatives(training):
    """A penalty on the gradient, differentiated once more, in eager mode."""
    x, dy, weight, bias = given((4, 3, 5, 7), torch.float32, mean=0.0, std=1.0)

    def penalty(function: Callable, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().clone().to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = function(*leaves)
        (gradient,) = torch.autograd.grad(
            (y * dy.to(dtype)).square().sum(), leaves[0], create_graph=True
        )
        gradient.square().sum().backward()
        return [t.grad for t in leaves]

    running = statistics(3, torch.float32)
    found = penalty(lambda *t: batchnorm_leaky_relu(*t, *running, training, 0.0), torch.float32)
    exactly = [r.double() for r in running]
    wanted = penalty(
        lambda *t: F.leaky_relu(F.batch_norm(t[0], *exactly, *t[1:], training, 0.0), 0.2),
        torch.float64,
    )
    for a, b in zip(found, wanted, strict=True):
        assert error(a, b) < 2e-5


@interpreted.only
def test_kernels_under_the_compiler_are_opaque_and_whole():
    x, dy, weight, bias = given((4, 3, 5, 7), torch.float32)
    compiled = torch.compile(batchnorm_leaky_relu, fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    compiled(*leaves).backward(dy)
    wanted = exact(x, dy, weight, bias, True, 0.2)
    for leaf, gradient in zip(leaves, wanted[1:4], strict=True):
        assert error(leaf.grad, gradient) < 2e-5


@interpreted.only
@pytest.mark.parametrize("fixed", [False, True])
def test_kernels_are_well_registered(fixed):
    x, dy, weight, bias = given((4, 3, 5, 7), torch.float32)
    stats = torch.stack([torch.full((3,), 50.0), torch.full((3,), 1 / 3.0), torch.full((3,), 9.0)])
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    rest = (1e-5, 0.2, False, fixed)
    torch.library.opcheck(front.forward_op, (*leaves, stats if fixed else None, *rest))
    torch.library.opcheck(front.backward_op, (dy.requires_grad_(), *leaves, stats, *rest))


# the graph that the compiler makes of them for a GPU, from tensors without data


class Driver:
    """A GPU driver that knows its GPU's kind, and no more."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.mark.skipif(dispatch.INTERPRET, reason="the interpreter's operations are opaque")
@pytest.mark.parametrize(
    ("shape", "forward", "backward"),
    [
        ((128, 64, 32, 32), ["statistics", "apply"], ["sums", "apply_gradient"]),
        ((128, 256, 8, 8), ["whole"], ["whole_gradient"]),
    ],
    ids=["two passes", "one"],
)
def test_compiled_for_a_gpu_there_are_these_launches_and_no_copies(
    shape, forward, backward, monkeypatch
):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(), raising=False)
    with FakeTensorMode():
        x, dy = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        pair = [torch.empty(shape[1], device="cuda") for _ in range(2)]
        stats = torch.empty(3, shape[1], device="cuda")
        rest = (1e-5, 0.2, False, False)
        assert launches(lambda *t: front.forward_op(*t, None, *rest), x, *pair) == forward
        given = (dy, x, *pair, stats)
        assert launches(lambda *t: front.backward_op(*t, *rest), *given) == backward


def launches(function: Callable, *given: Tensor) -> list[str]:
    """Names of the kernels that a function launches; fails on anything else but allocations."""
    graph = make_fx(dispatch_functionalize(function))(*given).graph
    names = []
    for node in graph.nodes:
        if "triton_kernel_wrapper" in node.name:
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            names.append(kernel.fn.__name__)
        elif node.op == "call_function":
            assert node.target.__name__.split(".")[0] in ("getitem", "empty_like", "new_empty")
    return names


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_elements_than_32_bits_count():
    x = torch.randn(2**21 + 8, 8, 8, 17, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    y = batchnorm_leaky_relu(x)
    part = slice(-1000, None)
    wanted = F.leaky_relu(
        (x[part].float() - x.mean((0, 2, 3), dtype=torch.float32).view(1, -1, 1, 1)), 0.2
    )
    torch.testing.assert_close(y[part].float(), wanted, rtol=0.02, atol=0.02)
