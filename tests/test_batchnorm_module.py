"""BatchNorm + LeakyReLU as a module: PyTorch's own inputs for BatchNorm, fusing, the plain form."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing._internal.common_modules import module_db

from kernels import dispatch
from kernels.batchnorm_leaky_relu import batchnorm_leaky_relu
from kernels.batchnorm_module import BatchNormLeakyReLU, fuse, plain
from tests import interpreted


def test_the_interpreted_tests_of_this_file_pass():
    interpreted.run(__file__, fewest=15)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2, inplace=True)]
    layers += [nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True))]
    return nn.Sequential(*layers, nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Tanh())


def test_fusing_keeps_keys_parameters_and_results():
    apart, together = network(), network()
    parameters = list(together.parameters())
    fuse(together)
    assert sum(isinstance(m, BatchNormLeakyReLU) for m in together.modules()) == 2
    assert [m.slope for m in together.modules() if isinstance(m, BatchNormLeakyReLU)] == [0.2, 0.0]
    assert all(a is b for a, b in zip(together.parameters(), parameters, strict=True))
    together.load_state_dict(apart.state_dict())
    x = torch.randn(5, 1, 9, 9)
    for _ in range(2):
        for a, b in ((apart, together), (together, apart)):
            a.zero_grad()
            a(x).square().sum().backward()
            assert torch.equal(a(x), b(x)) or dispatch.INTERPRET
        for p, q in zip(apart.parameters(), together.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        apart.eval(), together.eval()
    for name, value in apart.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], value)


def norms() -> list:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return [info for info in module_db if info.module_cls in kinds]


@interpreted.either
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("info", norms(), ids=lambda i: i.module_cls.__name__)
def test_pytorchs_own_inputs_for_batchnorm_kernel_or_not(info, training):
    """torch.testing's module database: every constructor and input that it has for BatchNorm."""
    seen = 0
    for case in info.module_inputs_func(info, "cpu", torch.float32, True, training):
        args, options = case.constructor_input.args, case.constructor_input.kwargs
        theirs = info.module_cls(*args, **options)
        mine = BatchNormLeakyReLU.of(copy.deepcopy(theirs), 1.0)
        x = case.forward_input.args[0].detach()
        outputs = []
        for module in (theirs.train(training), mine.train(training)):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
            gradients = [p.grad for p in module.parameters()]
            outputs.append([y.detach(), leaf.grad, *gradients, *module.buffers()])
        for a, b in zip(*outputs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        seen += 1
    assert seen > 1


def test_the_module_is_plain_where_a_penalty_needs_it():
    module = BatchNormLeakyReLU(3)
    with plain(nn.Sequential(module)):
        assert module.plain
    assert not module.plain


class Residual(nn.Sequential):
    """A Sequential that does more than its layers in a row."""

    def forward(self, x):
        return x + self[1](self[0](x)) * self[0](x)


def test_only_a_plain_row_without_hooks_is_fused():
    hooked = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    hooked[0].register_forward_hook(lambda *_: None)
    for kept in (Residual(nn.BatchNorm2d(3), nn.ReLU()), hooked):
        fuse(kept)
        assert type(kept[0]) is nn.BatchNorm2d and type(kept[1]) is nn.ReLU


def test_pytorchs_converter_to_sync_batchnorm_does_not_take_the_activation_away():
    network = fuse(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(network)[0]) is BatchNormLeakyReLU
    assert "slope=0.0" in repr(network) and "synchronised=False" in repr(network)


@interpreted.either
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels", [1, 6, 10])
def test_other_channels_are_refused_as_batchnorm_does_and_change_nothing(channels, training):
    x = torch.randn(4, channels, 2, 2)
    for module in (BatchNormLeakyReLU(8, affine=False), nn.BatchNorm2d(8, affine=False)):
        before = module.running_mean.clone()
        with pytest.raises(RuntimeError, match=f"should contain {channels} elements not 8"):
            module.train(training)(x)
        assert torch.equal(module.running_mean, before)


@interpreted.either
def test_scale_and_shift_may_be_strided_or_expanded():
    x, pair = torch.randn(4, 6, 3, 3), torch.randn(6, 2)
    for weight, bias in (pair.unbind(1), (torch.full((1,), 1.5).expand(6), pair[:, 0])):
        wanted = F.leaky_relu(F.batch_norm(x, None, None, weight, bias, True), 0.2)
        torch.testing.assert_close(batchnorm_leaky_relu(x, weight, bias), wanted)


@interpreted.only
def test_a_third_derivative_is_that_of_the_formula():
    def third(function, dtype):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        y = function(x).tanh()
        for _ in range(3):
            (y,) = torch.autograd.grad(
                (y * torch.linspace(-1, 1, 24).view(4, 6)).sum(), x, create_graph=True
            )
        return y

    def formula(x):
        centred = x - x.mean(0)
        return F.leaky_relu(centred * (centred.square().mean(0) + 1e-5).rsqrt(), 0.2)

    found, wanted = third(batchnorm_leaky_relu, torch.float32), third(formula, torch.float64)
    assert interpreted.error(found.detach(), wanted.detach()) < 1e-4


@interpreted.either
def test_statistics_in_half_precision_are_computed_in_float32():
    x = torch.randn(64, 6).bfloat16()
    mean, variance = torch.randn(6).bfloat16(), torch.rand(6).bfloat16() + 0.5
    y = batchnorm_leaky_relu(x, None, None, mean, variance, training=False)
    wanted = F.leaky_relu((x.double() - mean.double()) / (variance.double() + 1e-5).sqrt(), 0.2)
    assert interpreted.error(y, wanted) < 5e-3


def test_a_setting_that_is_none_is_refused():
    with pytest.raises(ValueError, match="kernels='Fused' must be one of auto, fused, reference"):
        dispatch.use("Fused")
