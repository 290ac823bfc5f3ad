"""Convolutions as three maps: each the library's convolution, by either way, to any order?"""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn import functional as F

from engine.penalties import input_gradient
from kernels.convolution import MAPS, Geometry, down, outer, up
from kernels.convolution_module import MappedConv2d, map_convolutions, mappable

WAYS = {"library": frozenset(), "matmul": frozenset(MAPS), "outer": frozenset({"outer"})}
PLACES = [  # kernel, stride, padding, height of the large image
    *((4, 2, 1, 8), (4, 2, 1, 9), (4, 1, 1, 8), (4, 4, 0, 8), (4, 4, 2, 8), (4, 2, 3, 9)),
    *((3, 1, 1, 8), (3, 1, 0, 8), (3, 1, 2, 5), (3, 2, 1, 7), (3, 2, 1, 8)),
    *((5, 2, 2, 8), (6, 2, 2, 11), (7, 1, 3, 9), (2, 2, 1, 9), (1, 1, 0, 5)),
]


def factors(g: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """A large image, a small one and a weight, float64, that want gradients."""
    noise = torch.Generator().manual_seed(0)
    shapes = ((2, 3, *g.size), (2, 5, *g.small), (5, 3, g.kernel, g.kernel))
    large, small, weight = (
        torch.randn(shape, generator=noise, dtype=torch.float64) for shape in shapes
    )
    return large.requires_grad_(), small.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kernel", "stride", "padding", "height"), PLACES)
def test_the_maps_are_a_convolution_and_its_gradients(kernel, stride, padding, height, way):
    g = Geometry((height, height + stride), kernel, stride, padding, WAYS[way])
    large, small, weight = factors(g)
    wanted = F.conv2d(large, weight, None, stride, padding)
    torch.testing.assert_close(down(large, weight, g), wanted)
    by_large, by_weight = grad(wanted, (large, weight), small)
    torch.testing.assert_close(up(small, weight, g), by_large)
    torch.testing.assert_close(outer(large, small, g), by_weight)


@pytest.mark.parametrize("way", ["library", "matmul"])
@pytest.mark.parametrize(("kernel", "stride", "padding", "height"), PLACES[::3])
def test_gradients_of_gradients_are_right(kernel, stride, padding, height, way):
    g = Geometry((height, height), kernel, stride, padding, WAYS[way])
    large, small, weight = factors(g)
    for map_, inputs in ((down, (large, weight)), (up, (small, weight)), (outer, (large, small))):
        assert gradcheck(lambda *x, f=map_: f(*x, g), inputs, fast_mode=True)
        assert gradgradcheck(lambda *x, f=map_: f(*x, g), inputs, fast_mode=True)


@pytest.mark.parametrize("way", ["library", "matmul"])
def test_a_factor_that_wants_no_gradient_is_left_out(way, monkeypatch):
    g = Geometry((8, 8), 4, 2, 1, WAYS[way])
    large, _, weight = factors(g)
    calls: list[str] = []
    monkeypatch.setattr("kernels.convolution.outer", lambda *_: calls.append("outer"))
    monkeypatch.setattr("kernels.convolution.up", lambda *_: calls.append("up"))
    for wanted, map_ in ((large, "up"), (weight, "outer")):
        inputs = [x if x is wanted else x.detach() for x in (large, weight)]
        with pytest.raises(RuntimeError, match=r"returned None|unused|undefined"):
            grad(down(*inputs, g).sum(), wanted)
        assert calls == [map_]
        calls.clear()


def network() -> nn.Sequential:
    """Both kinds of layers, with what is left to the library between."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1, bias=False),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 3, 4, 2, 1),
    ).to(memory_format=torch.channels_last)


IMAGES_NCHW = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def trained_once(net: nn.Module, autocast: bool = False) -> list[Tensor]:
    """Output and gradients of a forward and backward pass."""
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = net(IMAGES_NCHW)
    out.float().square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in net.parameters())]


def assert_all_close(found: list[Tensor], wanted: list[Tensor], rtol: float = 1e-4) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        spread = other.float().abs().max()
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=rtol * spread)


def test_a_network_computes_the_same_in_place_and_keeps_its_names():
    plain, mapped = network(), map_convolutions(network())
    assert [type(m) is MappedConv2d for m in mapped][:3] == [True, False, False]
    assert list(mappable(plain)) == ["0", "3", "5"]
    assert list(mapped.state_dict()) == list(plain.state_dict())
    assert_all_close(trained_once(mapped), trained_once(plain))
    assert_all_close(trained_once(copy.deepcopy(mapped)), trained_once(plain))


def test_only_the_maps_that_are_named_change():
    mapped = map_convolutions(network(), {"3": frozenset({"outer"}), "0": frozenset()})
    assert [hasattr(m, "matmul") for m in mapped] == [False] * 3 + [True] + [False] * 2
    assert_all_close(trained_once(mapped), trained_once(network()))


def test_mixed_precision_is_that_of_the_library():
    found, wanted = (trained_once(n, True) for n in (map_convolutions(network()), network()))
    assert found[0].dtype == torch.bfloat16
    assert_all_close(found, wanted, rtol=0.03)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_penalty_on_the_gradient_has_the_gradients_of_the_library(compiled):
    def penalty(critic: nn.Module) -> list[Tensor]:
        def loss() -> Tensor:
            steep = input_gradient(critic, IMAGES_NCHW).square().sum()
            return steep + critic(IMAGES_NCHW).square().sum()

        value = torch.compile(loss, fullgraph=True)() if compiled else loss()
        return list(grad(value, [p for p in critic.parameters() if p.requires_grad]))

    assert_all_close(penalty(map_convolutions(network())), penalty(network()), rtol=1e-3)
