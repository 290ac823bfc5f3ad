"""Convolutions with their gradients, and gradients of gradients, beside PyTorch's own.

    pytest bench/bench_convolutions.py --benchmark-only

`bench_map`: what a 4x4 layer of DCGAN-64 computes (`down` and `up` are its forward passes, one the
other's gradient by its input, `outer` its gradient by the weight), by the library and as a matrix
product. `bench_penalty`: WGAN-GP's penalty with its gradients, by PyTorch's operations, compiled,
and by ours, which leave out what is zero. Each tells its share of the floor: its FLOPs at the rate
of a square matrix product measured here, in the precision that a run would take.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import engine.penalties as penalties
from bench.brief import params
from bench.side_by_side import Turns, note, take_turns, timed
from engine.compile import missing_toolchain
from engine.convolutions import Call
from engine.describe import FlopCount
from engine.networks.residual import FlatCritic
from engine.networks.spec import ImageSpec
from engine.precision import DTYPES, choose_precision
from kernels.convolution import Geometry

BATCH, ROUNDS = 32, 9
LAYERS = {"64 to 128": (64, 128, 32), "128 to 256": (128, 256, 16), "256 to 512": (256, 512, 8)}
MAPS = ("down", "up", "outer")
WIDTH = 32  # of the critic, a quarter of the recipe's


@pytest.fixture(scope="module")
def dtype(device) -> torch.dtype:
    return DTYPES[choose_precision("auto", device).name]


@pytest.fixture(scope="module")
def rate(device, dtype) -> float:
    """FLOPs per second of a matrix product, 2048 square."""
    square = torch.randn(2048, 2048, device=device, dtype=dtype)
    clock = partial(timed, device=device)
    turns = take_turns("product", {"product": lambda: square @ square}, ROUNDS, clock)
    return 2 * 2048**3 / turns.median("product")


def called(layer: str, dtype: torch.dtype) -> Call:
    """What a layer is given."""
    large, small, side = LAYERS[layer]
    geometry = Geometry((side, side), 4, 2, 1)
    return Call(geometry, BATCH, large, small, dtype, torch.channels_last)


@pytest.fixture(scope="module")
def maps(device, dtype) -> Callable[[str], dict[str, Turns]]:
    """Of a layer's maps, the seconds of both ways in turns; measured once a layer."""
    found: dict[str, dict[str, Turns]] = {}
    clock = partial(timed, device=device)

    def of(layer: str) -> dict[str, Turns]:
        if layer not in found:
            ways = called(layer, dtype).ways(device)
            found[layer] = {m: take_turns("library", w, ROUNDS, clock) for m, w in ways.items()}
        return found[layer]

    return of


@pytest.mark.parametrize("map_", MAPS)
@pytest.mark.parametrize("layer", params(LAYERS, ["128 to 256", "256 to 512"]))
def bench_map(benchmark, row, maps, rate, layer, map_):
    turns, floor = maps(layer)[map_], called(layer, torch.float32).flops / rate
    shares = {way: floor / turns.median(way) for way in ("library", "matmul")}
    benchmark.extra_info["share_of_floor"] = shares
    note(benchmark, turns.beside("matmul", 1e3 * turns.median("matmul"), "ms"))
    told = "   ".join(f"{w} {1e3 * turns.median(w):6.1f} ms {shares[w]:4.0%}" for w in shares)
    row(f"{layer:11} {map_:6} {told}   {turns.ratio('matmul'):5.2f}x library")
    benchmark.pedantic(lambda: None, rounds=1)  # the figures are those above


def penalty(critic: nn.Module, images_NCHW: Tensor) -> Tensor:
    """WGAN-GP's, at these images."""
    steep_NCHW = penalties.input_gradient(critic, images_NCHW)
    return (steep_NCHW.flatten(1).norm(dim=1) - 1).square().mean()


def by_pytorch(critic: nn.Module, images_NCHW: Tensor) -> Tensor:
    """The same by PyTorch's own operations."""
    with mock.patch.object(penalties, "frugal", nullcontext):
        return penalty(critic, images_NCHW)


@pytest.fixture(scope="module")
def penalised(device) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """Of each variant what takes the penalty's gradients, and the FLOPs that it counts."""
    torch.manual_seed(0)
    critic = FlatCritic(WIDTH).build(ImageSpec(3, 32))
    critic = critic.to(device, memory_format=torch.channels_last)
    images_NCHW = torch.randn(BATCH, 3, 32, 32, device=device)
    images_NCHW = images_NCHW.to(memory_format=torch.channels_last)
    losses = {"plain": by_pytorch, "ours": penalty}
    flops: dict[str, float] = {}
    weights = [p for p in critic.parameters() if p.ndim > 1]

    def gradients(loss: Callable) -> object:
        return torch.autograd.grad(loss(critic, images_NCHW), weights)  # biases have no part in it

    for name, loss in losses.items():
        with FlopCount() as count:
            gradients(loss)
        flops[name] = count.total
    if device.type == "cuda" or not missing_toolchain():
        losses["compiled"] = torch.compile(penalty, fullgraph=True, dynamic=False)
    return {name: partial(gradients, loss) for name, loss in losses.items()}, flops


@pytest.fixture(scope="module")
def penalty_turns(device, penalised) -> Turns:
    """Seconds of each in turns."""
    return take_turns("plain", penalised[0], ROUNDS, partial(timed, device=device), 2)


@pytest.mark.parametrize("variant", ["plain", "ours", "compiled"])
def bench_penalty(benchmark, row, penalised, penalty_turns, rate, variant):
    if variant not in penalised[0]:
        pytest.skip(missing_toolchain())
    seconds, least = penalty_turns.median(variant), penalised[1]["ours"]
    benchmark.extra_info["share_of_floor"] = least / rate / seconds
    note(benchmark, penalty_turns.beside(variant, 1e3 * seconds, "ms"))
    counted = penalised[1].get(variant)
    told = f"{counted / 1e9:6.1f} GFLOP" if counted else " " * 12
    share = f"{least / rate / seconds:4.0%} of the floor"
    told += f" {share}   {penalty_turns.ratio(variant):5.2f}x plain"
    row(f"penalty {variant:9} {1e3 * seconds:7.1f} ms {told}")
    benchmark.pedantic(lambda: None, rounds=1)
