"""Fused operations beside PyTorch's own, eager and compiled, in one run.

    pytest bench/bench_kernels.py --benchmark-only

BatchNorm + LeakyReLU forward, and forward with backward; the discriminator's loss; the VAE's sample
and KL; a batch of images out of packed bytes. Rows: eager, eager in place, both compiled and, on a
GPU, Triton's, each in turns with eager. Each tells its median and spread, the bandwidth it achieves
as a share of a copy measured in the same session, peak and saved memory, and its error against
float64. On a GPU tensors of 537 MB are timed with a cold L2 cache and DCGAN's sizes as replays of a
CUDA graph; a CPU runs two of DCGAN's sizes in plain PyTorch (where an activation in place that ends
the graph, as here, compiles badly: not so between convolutions).
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.brief import params
from bench.side_by_side import Turns, note, take_turns
from engine.compile import missing_toolchain
from engine.precision import DTYPES, choose_precision
from engine.stats import synchronize
from kernels import dispatch, gan_bce, gaussian_kl
from kernels.batchnorm_leaky_relu import batchnorm_leaky_relu
from kernels.image_batch import image_batch

CUDA = torch.cuda.is_available()
LARGE = (512, 128, 64, 64)
DCGAN = [(128, 64, 32, 32), (128, 128, 16, 16), (128, 256, 8, 8), (128, 512, 4, 4)]
SIZES = [LARGE, *DCGAN] if CUDA else [(32, *shape[1:]) for shape in (DCGAN[0], DCGAN[-1])]
ROUNDS = 5 if CUDA else 20  # on a GPU each is a median of many calls
GPU_ONLY = pytest.mark.skipif(not CUDA, reason="needs a GPU: Triton's rows are skipped")


def eager(x, weight, bias):
    return F.leaky_relu(F.batch_norm(x, None, None, weight, bias, True), 0.2)


def in_place(x, weight, bias):
    return F.leaky_relu_(F.batch_norm(x, None, None, weight, bias, True), 0.2)


def fused(x, weight, bias):
    with dispatch.using("fused"):
        return batchnorm_leaky_relu(x, weight, bias)


def compiled(function: Callable) -> Callable:
    if not CUDA and (reason := missing_toolchain()):
        pytest.skip(reason)
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


VARIANTS = {
    "eager": lambda: eager,
    "eager in place": lambda: in_place,
    "compiled": lambda: compiled(eager),
    "compiled in place": lambda: compiled(in_place),
    "fused": lambda: fused,
}
# Tensor reads and writes that cannot be avoided in two passes (one: 2 and 3 where it fits).
FLOOR = {"forward": 3, "both": 8}


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median of the rounds, and their 20th and 80th percentiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        ordered = sorted(seconds)
        fifth = len(ordered) // 5
        return cls(statistics.median(ordered), ordered[fifth], ordered[-1 - fifth])

    def __str__(self) -> str:
        return f"{self.median * 1e6:9.1f} us ({self.low * 1e6:.1f} to {self.high * 1e6:.1f})"


def clock(large: bool) -> Callable[[Callable], float]:
    """What times a call: on a GPU with a cold L2 cache, or as replays of a graph where launches
    would decide."""

    def seconds(function: Callable) -> float:
        if not CUDA:
            began = time.perf_counter()
            function()
            return time.perf_counter() - began
        from triton import testing

        run = testing.do_bench if large else testing.do_bench_cudagraph
        return run(function, rep=40, return_mode="median") / 1e3

    return seconds


def beside_eager(variant: str, eager: Callable, run: Callable, large: bool) -> Turns:
    """A variant and the eager form in turns."""
    return take_turns("eager", {"eager": eager, variant: run}, ROUNDS, clock(large))


@pytest.fixture(scope="module")
def copy_rate() -> dict[tuple, float]:
    """Bytes per second, read and written, of a copy of each size, measured here and now."""
    rates = {}
    for shape in SIZES:
        x = torch.randn(shape, device=device(), dtype=dtype())
        y = torch.empty_like(x)
        turns = take_turns(
            "copy", {"copy": lambda x=x, y=y: y.copy_(x)}, ROUNDS, clock(shape == LARGE)
        )
        rates[shape] = 2 * x.nbytes / turns.median("copy")
    return rates


def device() -> torch.device:
    return torch.device("cuda" if CUDA else "cpu")


def dtype() -> torch.dtype:
    return DTYPES[choose_precision("auto", device()).name]


def arguments(shape: tuple[int, ...], kind: torch.dtype, last: bool) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=random).to(device(), kind)
    x = x.to(memory_format=torch.channels_last) if last else x
    pair = torch.randn(2, shape[1], generator=random).to(device())
    return [t.requires_grad_() for t in (x, pair[0].clone(), pair[1].clone())]


def saved_bytes(function: Callable, given: list[Tensor]) -> int:
    """Bytes that one forward pass keeps for the backward pass, its input included."""
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        function(*given)
    return sum(kept.values())


def error(function: Callable, given: list[Tensor]) -> float:
    """Norm of the output's error as a share of its norm, against float64."""
    wanted = eager(*(t.detach().double() for t in given))
    return float((function(*given).detach().double() - wanted).norm() / wanted.norm())


MEASURED: dict[tuple, Timing] = {}


@pytest.mark.parametrize("direction", params(FLOOR, FLOOR if CUDA else ["both"]))
@pytest.mark.parametrize(
    "last", params([False, True], [False, True] if CUDA else [True]), ids=["NCHW", "NHWC"]
)
@pytest.mark.parametrize("shape", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=GPU_ONLY if v == "fused" else ()) for v in VARIANTS]
)
def bench_batchnorm_leaky_relu(benchmark, row, copy_rate, variant, shape, last, direction):
    function, given = VARIANTS[variant](), arguments(shape, dtype(), last)
    dy = torch.randn_like(given[0])

    def run(function=function):
        y = function(*given)
        if direction == "both":
            torch.autograd.grad(y, given, dy)
        return y

    run()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        run()
    peak = torch.cuda.max_memory_allocated() if CUDA else None
    turns = beside_eager(variant, lambda: run(eager), run, shape == LARGE)
    timing = Timing.of(turns.costs[variant])
    case = (shape, last, direction)
    MEASURED[(variant, *case)] = timing
    moved = FLOOR[direction] * given[0].nbytes
    facts = {
        "share_of_copy": moved / timing.median / copy_rate[shape],
        "peak_bytes": peak,
        "saved_bytes": saved_bytes(function, given),
        "error": error(function, given) if shape != LARGE else None,
        "median_s": timing.median,
        "dtype": str(dtype()),
    }
    benchmark.extra_info.update(facts)
    note(benchmark, turns.beside(variant, 1e6 * timing.median, "us"))
    benchmark.pedantic(_synchronised(run), rounds=3)
    rivals = [
        MEASURED[v, *case] for v in ("compiled", "compiled in place") if (v, *case) in MEASURED
    ]
    best = min((r.median for r in rivals), default=0.0)
    ratio = f"  {best / timing.median:5.2f}x the better compiled" if variant == "fused" else ""
    layout = "NHWC" if last else "NCHW"
    name = f"{variant:17} {'x'.join(map(str, shape)):14} {layout} {direction:7}"
    ratio = f"  {turns.ratio(variant):5.2f}x eager{ratio}"
    row(f"{name} {timing}  {facts['share_of_copy']:5.1%} of copy{ratio}")


def _synchronised(run: Callable) -> Callable:
    def whole():
        run()
        synchronize(device())

    return whole


def plain_loss(real, fake):
    return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()


def plain_sample(mean, log_variance, noise):
    z = mean + (0.5 * log_variance).exp() * noise
    return z, -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)


LOSSES = {
    "gan_bce 128": (plain_loss, gan_bce.discriminator, [(128,)] * 2),
    "gan_bce 115200": (plain_loss, gan_bce.discriminator, [(115_200,)] * 2),
    "gaussian_kl 128x128": (plain_sample, gaussian_kl.sample_and_kl, [(128, 128)] * 3),
}


@pytest.mark.parametrize("variant", ["eager", "compiled", pytest.param("fused", marks=GPU_ONLY)])
@pytest.mark.parametrize("loss", LOSSES)
def bench_losses(benchmark, row, loss, variant):
    plain, ours, shapes = LOSSES[loss]
    function = {"eager": plain, "fused": ours}.get(variant) or compiled(plain)
    given = [torch.randn(s, device=device()).requires_grad_() for s in shapes]

    def run(function=function):
        with dispatch.using("fused"):
            outs = function(*given)
        outs = outs if isinstance(outs, tuple) else (outs,)
        torch.autograd.grad(sum(o.sum() for o in outs), given[:2])

    run()
    turns = beside_eager(variant, lambda: run(plain), run, False)
    timing = Timing.of(turns.costs[variant])
    benchmark.extra_info["median_s"] = timing.median
    note(benchmark, turns.beside(variant, 1e6 * timing.median, "us"))
    benchmark.pedantic(_synchronised(run), rounds=3)
    row(f"{variant:17} {loss:24} both  {timing}  {turns.ratio(variant):5.2f}x eager")


def plain_batch(images_NHWC, rows_M, size, flip_M):
    batch = images_NHWC.index_select(0, rows_M)
    batch = torch.where(flip_M[:, None, None, None], batch.flip(2), batch)
    return batch.float().sub(127.5).mul(1 / 127.5).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def packed() -> Tensor:
    """A dataset of random bytes, larger than any cache."""
    shape = (50_000 if CUDA else 10_000, 64, 64, 3)
    return torch.empty(shape, dtype=torch.uint8, device=device()).random_()


@pytest.mark.parametrize("variant", ["eager", "compiled", "image_batch"])
@pytest.mark.parametrize("batch", [2048, 64])
def bench_image_batch(benchmark, row, packed, batch, variant):
    """Half of the images mirrored; image_batch is Triton's on a GPU and PyTorch's on a CPU. The
    rate counts what must be moved: each byte once, and the float made of it."""
    function = {"eager": plain_batch, "image_batch": image_batch}.get(variant)
    function = function or compiled(plain_batch)
    rows = torch.randint(len(packed), (batch,), device=device())
    flip = torch.arange(batch, device=device()) % 2 == 0

    def run(function=function):
        with dispatch.using("fused"):
            return function(packed, rows, packed.shape[1], flip)

    assert torch.equal(run(), plain_batch(packed, rows, packed.shape[1], flip))
    turns = beside_eager(variant, lambda: run(plain_batch), run, batch == 2048)
    timing = Timing.of(turns.costs[variant])
    moved = 5 * batch * packed[0].numel()
    facts = {
        "median_s": timing.median,
        "bytes_per_s": moved / timing.median,
        "images_per_s": batch / timing.median,
    }
    benchmark.extra_info.update(facts)
    note(benchmark, turns.beside(variant, facts["images_per_s"], "images/s"))
    benchmark.pedantic(_synchronised(run), rounds=3)
    ratio = f"  {turns.ratio(variant):5.2f}x eager"
    rates = f"{facts['bytes_per_s'] / 1e9:7.1f} GB/s  {facts['images_per_s'] / 1e6:7.3f} M images/s"
    row(f"{variant:17} {f'image_batch {batch} x 64x64x3':31} {timing}  {rates}{ratio}")
