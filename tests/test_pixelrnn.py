"""PixelRNN: its masks, its exact likelihood, and its sampler against the naive one."""

import itertools
import math
import time
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from engine import recipe as recipes
from engine import session, world
from engine.compile import Compiler
from engine.describe import parameters
from engine.export.__main__ import main as export
from engine.networks.pixelrnn import Drawing, PixelRNN, RowLSTM, Sampler, lstm
from engine.networks.spec import ImageSpec
from engine.precision import Precision
from engine.sample import main as sample
from engine.session import build_networks
from engine.steps.autoregressive import binarise, nll
from kernels import philox
from pipelines.batch import Batch
from tests.forked import train
from tests.runs import QUICK, toy

CPU = torch.device("cpu")
SMALL = PixelRNN(layers=3, hidden=4, head=5)


def built(resolution: int, network: PixelRNN = SMALL, seed: int = 0):
    """In float64, with all parameters far from their beginning, so that nothing is undecided."""
    torch.manual_seed(seed)
    module = network.build(ImageSpec(1, resolution)).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.6)
    return module


def latents(count: int, resolution: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, resolution**2, generator=generator, dtype=torch.float64)


@torch.no_grad()
def draw_naively(module, z_NL: torch.Tensor, resolution: int) -> torch.Tensor:
    """The whole image through the network for each pixel."""
    x_N1HW = z_NL.new_zeros(len(z_NL), 1, resolution, resolution)
    u_N1HW = torch.special.ndtr(z_NL).view_as(x_N1HW)
    for row, column in itertools.product(range(resolution), repeat=2):
        white_N = u_N1HW[:, 0, row, column] < module(x_N1HW)[:, 0, row, column].sigmoid()
        x_N1HW[:, 0, row, column] = white_N * 2.0 - 1
    return x_N1HW


# the network


def test_the_network_has_the_parameters_counted_by_hand():
    """van den Oord et al. 2016, table 1 and sections 3.4 and 5.1: h = 16, 2h = 32 features."""
    first = 32 * (3 * 7 + 3) + 32  # what mask A leaves of 7x7
    input_to_state = 64 * 32 * 2 + 64  # four gates; what mask B leaves of 3x1
    state_to_state = 64 * 16 * 3
    upsampling = 32 * 16 + 32  # 1x1 from h to 2h, before the residual connection
    first_state = 2 * 16  # learned
    layer = input_to_state + state_to_state + upsampling + first_state
    head = 2 * (32 * 32 + 32) + 32 + 1
    network = build_networks(recipes.load("pixelrnn_mnist"))["model"]
    assert parameters(network) == first + 7 * layer + head == 57_601


def test_a_cell_is_that_of_equation_3():
    gates, cell = [0.3, -1.2, 0.7, 0.4], 0.9  # o, f, i, g
    squashed = [1 / (1 + math.exp(-value)) for value in gates[:3]]
    new = squashed[1] * cell + squashed[2] * math.tanh(gates[3])
    found = lstm(*(torch.tensor(v, dtype=torch.float64) for v in (gates, [cell])))
    torch.testing.assert_close([float(v) for v in found], [squashed[0] * math.tanh(new), new])


def test_layers_side_by_side_equal_layers_one_after_the_other():
    """The stack against convolutions with explicit masks, layer by layer and row by row."""
    torch.manual_seed(0)
    stack = RowLSTM(layers=3, hidden=2).double()
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter)
    for height in (5, 2):  # more rows than layers, and fewer
        x_NFHW = torch.randn(2, 4, height, 6, dtype=torch.float64)
        found = stack(x_NFHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for layer in range(3):
            x_NFHW = by_convolutions(stack, layer, x_NFHW)
        torch.testing.assert_close(found, x_NFHW)


def by_convolutions(stack: RowLSTM, layer: int, x_NFHW: torch.Tensor) -> torch.Tensor:
    def kernel(weight_KG: torch.Tensor, taps: int) -> torch.Tensor:
        return weight_KG.unflatten(0, (taps, -1)).permute(2, 1, 0)

    masked = F.pad(kernel(stack.input_to_state_LKG[layer], 2), (0, 1))  # 3x1 with mask B
    state = kernel(stack.state_to_state_LKG[layer], 3)
    shape_NDW = (len(x_NFHW), 2, x_NFHW.shape[3])
    hidden = stack.first_hidden_L11D[layer, 0].T.expand(shape_NDW)
    cell = stack.first_cell_L11D[layer, 0].T.expand(shape_NDW)
    rows = []
    for row_NFW in x_NFHW.unbind(2):
        gates_NGW = F.conv1d(row_NFW, masked, stack.bias_L1G[layer, 0], padding=1)
        o, f, i, g = (gates_NGW + F.conv1d(hidden, state, padding=1)).chunk(4, 1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        up = torch.einsum("ndw,df->nfw", hidden, stack.up_LDF[layer])
        rows.append(row_NFW + up + stack.up_bias_L1F[layer, 0, :, None])
    return torch.stack(rows, 2)


def test_no_logit_sees_its_own_pixel_or_a_later_one():
    side = 6
    module = built(side)
    x_N1HW = torch.randn(1, 1, side, side, dtype=torch.float64, requires_grad=True)
    logits_L = module(x_N1HW).flatten()
    for i, (row, column) in enumerate(itertools.product(range(side), repeat=2)):
        (gradient,) = torch.autograd.grad(logits_L[i], x_N1HW, retain_graph=True)
        assert not gradient.flatten()[i:].any(), i
        seen = gradient[0, 0] != 0
        # the 7x7 kernel's reach, and the triangle above of figure 4 that widens by one column a row
        assert seen[row, max(column - 3, 0) : column].all(), i
        if row:
            assert seen[row - 1, max(column - 3, 0) : column + 4].all(), i
            assert seen[0, max(column - 3, 0) : column + 3 + row].all(), i


def test_other_images_are_refused():
    with pytest.raises(ValueError, match=r"data\.channels=3.*--data\.channels 1"):
        PixelRNN().build(ImageSpec(3, 28))
    live = recipes.parse("pixelrnn_mnist", ["--data.resolution", "14"]).recipe
    with pytest.raises(ValueError, match=r"--latent 784 .*data\.resolution=14.*--latent 196"):
        start(live)


# likelihood


def every_image(side: int) -> torch.Tensor:
    """All binary images of so many pixels' side."""
    values = list(itertools.product((-1.0, 1.0), repeat=side * side))
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, side, side)


def test_the_probabilities_of_all_images_sum_to_one():
    module, x_N1HW = built(3), every_image(3)
    nll_N = nll(module, x_N1HW, philox.make_key(0), torch.arange(512))  # binary stay what they are
    probabilities_N = torch.exp(-nll_N).detach()
    assert len(probabilities_N) == 512
    torch.testing.assert_close(float(probabilities_N.sum()), 1.0, rtol=0, atol=1e-12)
    assert float(probabilities_N.max() / probabilities_N.min()) > 1e3  # far from uniform


def test_images_are_drawn_as_often_as_they_are_likely():
    """Pearson's statistic over all 16 images of 2x2 pixels, 15 degrees of freedom."""
    module, x_N1HW, count = built(2, seed=3), every_image(2), 20_000
    expected_N = count * torch.exp(-nll(module, x_N1HW, philox.make_key(0), torch.arange(16)))
    with torch.no_grad():
        drawn_N1HW = Sampler(module)(latents(count, 2))
    bits = 2 ** torch.arange(3, -1, -1)
    found_N = ((drawn_N1HW.flatten(1) > 0) * bits).sum(1).bincount(minlength=16)
    likely = expected_N > 5
    statistic = ((found_N - expected_N) ** 2 / expected_N)[likely].sum()
    assert likely.sum() >= 8 and float(statistic.detach()) < 37.7  # 0.1 % of draws exceed it


def test_grey_images_become_binary_as_often_as_they_are_bright():
    key, place_N = philox.make_key(0), torch.arange(4000)
    grey = torch.tensor([-1.0, -0.5, 0.2, 1.0]).view(1, 1, 2, 2).expand(4000, 1, 2, 2)
    x_NCHW = binarise(grey, key, place_N)
    assert set(x_NCHW.unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(
        x_NCHW.mean(0).flatten(), torch.tensor([-1.0, -0.5, 0.2, 1.0]), rtol=0, atol=0.05
    )
    assert torch.equal(x_NCHW[7:9], binarise(grey[7:9], key, place_N[7:9]))
    assert not torch.equal(x_NCHW, binarise(grey, key, place_N + 60_000))


def start(recipe):
    ranks, fp32 = world.Ranks(0, 0, 1, CPU), Precision("fp32", "", "cpu")
    return session.start(recipe, ranks, fp32, Compiler(False, ""), 100)


def test_held_out_figures_are_nats_and_bits_per_pixel():
    """An untrained head that gives logit 0 everywhere: 784 ln 2 nats, one bit a pixel."""
    small = toy("pixelrnn_mnist")[0]
    networks = start(small).samplers()
    for parameter in networks["model"].head[-1].parameters():
        torch.nn.init.zeros_(parameter)
    images = torch.rand(3, 1, 28, 28) * 2 - 1
    batch = Batch(images, None, torch.arange(3))
    with torch.no_grad():
        values = small.step.held_out(networks, batch, philox.make_key(0))
    figures = small.step.summarise({k: v.double() for k, v in values.items()}, None)
    assert figures == pytest.approx({"nll": 784 * math.log(2), "bits_per_dim": 1.0}, rel=1e-5)


def test_autocast_gives_logits_in_float32_near_those_without():
    module = built(8).float()
    x_N1HW = binarise(torch.zeros(4, 1, 8, 8), philox.make_key(0), torch.arange(4))
    with torch.autocast("cpu", torch.bfloat16):
        logits = module(x_N1HW)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, module(x_N1HW), rtol=0.1, atol=0.3)


# sampling


def test_sampling_with_states_kept_equals_the_naive_way_and_is_far_faster():
    side, z_NL = 12, latents(8, 12)
    module = built(side)
    began = time.perf_counter()
    with torch.no_grad():
        quick = Sampler(module)(z_NL)
    between = time.perf_counter()
    assert torch.equal(quick, draw_naively(module, z_NL, side))
    assert time.perf_counter() - between > 4 * (between - began)
    assert 0.02 < float((quick > 0).double().mean()) < 0.98
    assert not torch.equal(quick[0], quick[1])


def test_infinite_latents_fix_their_pixels_and_the_rest_is_drawn_given_them():
    side, z_NL = 6, latents(5, 6)
    module = built(side)
    free, fixed = z_NL.clone(), z_NL.clone()
    with torch.no_grad():
        drawn = Sampler(module)(free)
        fixed[:, :18] = torch.where(drawn.flatten(1)[:, :18] > 0, -math.inf, math.inf)
        assert torch.equal(Sampler(module)(fixed), drawn)
        fixed[:, :18] = -fixed[:, :18]
        other = Sampler(module)(fixed)
    assert torch.equal(other.flatten(1)[:, :18], -drawn.flatten(1)[:, :18])
    assert not torch.equal(other.flatten(1)[:, 18:], drawn.flatten(1)[:, 18:])


def test_a_completion_keeps_the_upper_half_and_draws_the_lower():
    small = toy("pixelrnn_mnist")[0]
    networks = start(small).samplers()
    images = torch.where(torch.rand(3, 1, 28, 28) < 0.5, -1.0, 1.0)
    with torch.no_grad():
        made = small.step.reconstruct(networks, images)
        again = small.step.reconstruct(networks, images)
    assert torch.equal(made[:, :, :14], images[:, :, :14])
    assert not torch.equal(made[:, :, 14:], images[:, :, 14:])
    assert torch.equal(made, again)
    assert set(made.unique().tolist()) == {-1.0, 1.0}


def test_a_sampler_is_rebuilt_from_its_sizes():
    small = toy("pixelrnn_mnist")[0]
    networks = start(small).samplers()
    sampler = small.step.sampler(networks)
    twin = small.step.sampler_settings().build(ImageSpec(1, 28))
    twin.load_state_dict(sampler.state_dict())
    z_NL = latents(2, 28).float()
    with torch.no_grad():
        assert torch.equal(twin(z_NL), sampler(z_NL))
    assert small.step.sampler_settings() == Drawing(small.step.model.network)
    assert replace(small.step, latent=4).latent_dim() == 4


def test_an_export_has_the_one_form_that_a_loop_fits_in(tmp_path, capsys):
    flags = [*toy("pixelrnn_mnist", 8)[1], *QUICK, "--steps", "1", "--runs", str(tmp_path)]
    train("pixelrnn_mnist", *flags, "--run", "r")
    run = str(tmp_path / "pixelrnn_mnist" / "r")
    assert export([run]) == 0
    assert "safetensors alone: pixelrnn_mnist draws in a loop" in capsys.readouterr().out
    assert sample([f"{run}/export", "--num", "4", "--out", str(tmp_path / "grid.png")]) == 0
    assert export([run, "--formats", "onnx"]) == 2
    assert "give --formats safetensors" in capsys.readouterr().err
