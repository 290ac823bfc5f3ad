"""Synchronised BatchNorm + LeakyReLU: ranks with uneven batches equal one with the joined batch."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

from tests import interpreted
from tests.interpreted import error

SHARES = (3, 5)  # images of each rank
SHAPE = (sum(SHARES), 4, 3, 5)


def joined() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    x = torch.randn(SHAPE, generator=random) * 2 + 30
    return x, torch.randn(SHAPE, generator=random), *torch.randn(2, SHAPE[1], generator=random)


def rank(number: int, store: str, out: str, penalised: bool) -> None:
    """One rank's results, saved for the parent."""
    from kernels.batchnorm_module import BatchNormLeakyReLU, synchronise

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=number, world_size=len(SHARES))
    x, dy, weight, bias = joined()
    mine = slice(sum(SHARES[:number]), sum(SHARES[: number + 1]))
    module = synchronise(nn.Sequential(BatchNormLeakyReLU(SHAPE[1], slope=0.2)))[0]
    with torch.no_grad():
        module.weight.copy_(weight), module.bias.copy_(bias)
    x = x[mine].clone().requires_grad_()
    module.plain = penalised
    y = module(x)
    if penalised:
        (gradient,) = torch.autograd.grad((y * dy[mine]).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
    else:
        y.backward(dy[mine])
    result = [y.detach(), x.grad, module.weight.grad, module.bias.grad, *module.buffers()]
    torch.save(result, f"{out}/{number}.pt")
    dist.destroy_process_group()


def lonely(number: int, store: str, out: str) -> None:
    """A rank of two that has no images, beside one that has all."""
    from kernels.batchnorm_sync import sync_batchnorm_leaky_relu

    dist.init_process_group("gloo", f"file://{store}", rank=number, world_size=2)
    x = joined()[0][:0] if number else joined()[0]
    x = x.clone().requires_grad_()
    y = sync_batchnorm_leaky_relu(x, *joined()[2:], None, None)
    y.backward(joined()[1][: len(x)])
    torch.save([y.detach(), x.grad], f"{out}/{number}.pt")
    dist.destroy_process_group()


def test_a_rank_without_images_takes_part(tmp_path):
    mp.spawn(lonely, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    y, dx, *_ = wanted(False)
    parts = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    assert error(parts[0][0], y) < 5e-6 and error(parts[0][1], dx) < 5e-6
    assert parts[1][0].shape == parts[1][1].shape == (0, *SHAPE[1:])


def wanted(penalised: bool) -> list[Tensor]:
    """The same on the joined batch, in float64, by torch."""
    x, dy, weight, bias = (t.double() for t in joined())
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    mean, variance = torch.zeros(SHAPE[1]).double(), torch.ones(SHAPE[1]).double()
    y = F.leaky_relu(F.batch_norm(x, mean, variance, weight, bias, True, 0.1), 0.2)
    if penalised:
        (gradient,) = torch.autograd.grad((y * dy).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
    else:
        y.backward(dy)
    return [y.detach(), *(t.grad for t in leaves), mean, variance]


def check(tmp_path: Path, penalised: bool, limit: float) -> None:
    store, out = str(tmp_path / "store"), str(tmp_path)
    mp.spawn(rank, (store, out, penalised), nprocs=len(SHARES))
    parts = [torch.load(tmp_path / f"{r}.pt") for r in range(len(SHARES))]
    y, dx, dweight, dbias, mean, variance = wanted(penalised)
    assert error(torch.cat([p[0] for p in parts]), y) < limit
    assert error(torch.cat([p[1] for p in parts]), dx) < limit
    assert error(sum(p[2] for p in parts), dweight) < limit
    assert error(sum(p[3] for p in parts), dbias) < limit
    for part in parts:
        assert error(part[4], mean) < 1e-6 and error(part[5], variance) < 1e-5
        assert int(part[6]) == 1


def test_two_ranks_with_uneven_batches_equal_the_joined_batch(tmp_path):
    check(tmp_path, False, 5e-6)


def test_a_penalty_through_two_ranks_equals_that_of_the_joined_batch(tmp_path):
    check(tmp_path, True, 5e-5)


def test_the_kernels_do_so_too_in_the_interpreter(tmp_path, monkeypatch):
    if reason := interpreted.broken():
        pytest.skip(reason)
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    check(tmp_path, False, 5e-6)
