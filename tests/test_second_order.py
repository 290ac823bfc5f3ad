"""Gradients of gradients: right, and without what is known to be zero?"""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from engine.describe import FlopCount
from engine.networks import equalised, residual
from engine.networks.spec import ImageSpec
from engine.networks.spectral import spectral_norm
from engine.penalties import input_gradient
from kernels import second_order
from kernels.second_order import INSTEAD, frugal


class Middle(nn.Module):
    """The layers that are replaced, called as functions and as methods."""

    def __init__(self) -> None:
        super().__init__()
        self.first = equalised.Conv2d(3, 4, 3)
        self.back = nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1, bias=False)
        self.grouped = nn.Conv2d(4, 4, 3, padding="same", groups=2)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, 4, ...)."""
        x_NCHW = F.avg_pool2d(self.first(x_NCHW).relu(), 3, 2, 1, count_include_pad=False)
        return torch.relu(self.grouped(F.leaky_relu(self.back(x_NCHW), 0.1)))


class InPlace(nn.Module):
    """A block whose activation writes over what its shortcut takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(3, 2, 3)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, 2, ...)."""
        x_NCHW = self.first(x_NCHW)
        x_NCHW = x_NCHW + self.second(F.leaky_relu(x_NCHW, 0.3, inplace=True))
        return self.last(F.leaky_relu(F.relu(x_NCHW, inplace=True) - 0.1, -0.5).relu_())


CRITICS = {
    "flat": lambda: residual.FlatCritic(8).build(ImageSpec(3, 16)),
    "layer norm": lambda: residual.Critic(4).build(ImageSpec(3, 16)),
    "spectral": lambda: spectral_norm(residual.FlatCritic(8).build(ImageSpec(3, 16))),
    "all": Middle,
    "in place": InPlace,
}


def penalty(critic: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A penalty on the gradient, and its own gradients."""
    noise = torch.Generator().manual_seed(1)
    x_NCHW = torch.randn(3, 3, 16, 16, generator=noise).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        value = input_gradient(critic, x_NCHW).square().sum()
    trained = [p for p in critic.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, trained, materialize_grads=True)
    return [value.detach(), *found]


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CRITICS[name]().to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CRITICS)
def test_a_penalty_and_its_gradients_are_those_of_plain_operations(name, dtype, monkeypatch):
    found = penalty(made(name), dtype)
    monkeypatch.setattr("engine.penalties.frugal", nullcontext)
    wanted = penalty(made(name), dtype)
    allowed = 1e-4 if dtype == torch.float32 else 0.05
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            one, other, rtol=0, atol=allowed * float(other.abs().max() + 1e-6)
        )


class Zeros(TorchDispatchMode):
    """Counts convolutions' gradients of nothing."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution_backward" in str(func) and not args[0].any():
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["flat", "spectral"])
def test_nothing_is_computed_of_zeros(name):
    with Zeros() as zeros:
        penalty(made(name))
    assert not zeros.count


def test_a_penalty_costs_four_forward_passes_where_slopes_are_constant():
    critic, x_NCHW = made("flat"), torch.randn(2, 3, 16, 16)
    with FlopCount() as forward:
        critic(x_NCHW)
    with FlopCount() as whole:
        input_gradient(critic, x_NCHW).square().sum().backward()
    assert whole.total <= 4 * forward.total


def test_plain_pytorch_computes_zeros(monkeypatch):
    """What all this is for; if this fails, it can go."""
    monkeypatch.setattr("engine.penalties.frugal", nullcontext)
    with Zeros() as zeros:
        penalty(made("flat"))
    assert zeros.count


def test_every_replacement_serves(monkeypatch):
    """Each is called by the network that has them all, and takes what it is called with."""
    served = set()

    def watched(function, instead):
        def call(*args, **kwargs):
            found = instead(*args, **kwargs)
            if found is not NotImplemented:
                served.add(function)
            return found

        return call

    monkeypatch.setattr(second_order, "INSTEAD", {f: watched(f, i) for f, i in INSTEAD.items()})
    penalty(Middle())
    with frugal():
        F.relu(torch.ones(1)), torch.relu_(torch.ones(1)), torch.ones(1).relu_()
    assert served == set(INSTEAD)


def test_infinities_are_as_in_the_library():
    x = torch.tensor([-torch.inf, -1.0, 2.0, torch.inf], requires_grad=True)
    above = torch.tensor([torch.inf, 1.0, 1.0, torch.inf])
    with frugal():
        y = F.relu(x)
    (slope,) = torch.autograd.grad(y, x, above)
    assert y.tolist() == [0, 0, 2, torch.inf] and slope.tolist() == [0, 0, 1, torch.inf]
