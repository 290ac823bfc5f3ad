"""BatchNorm + LeakyReLU as a module: PyTorch's own inputs for BatchNorm, fusing, the plain form."""

import copy

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import module_db

from kernels import dispatch
from kernels.batchnorm_module import BatchNormLeakyReLU, fuse, plain
from tests import interpreted


def test_the_interpreted_tests_of_this_file_pass():
    interpreted.run(__file__, fewest=6)


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
