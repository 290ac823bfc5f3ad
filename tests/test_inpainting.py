"""Inpainting: sizes, losses by hand, what is known stays, figures beside trivial ones."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine import evaluate, masks, session
from engine.compile import Compiler
from engine.describe import parameters
from engine.networks import inpaint
from engine.networks.spec import ImageSpec
from engine.recipe import load
from engine.session import build_networks
from engine.steps.inpainting import HOLES, judging_update, repairing_update, spread
from kernels import philox
from pipelines.batch import Batch
from pipelines.sources import Synthetic
from tests.players import EPS, FP32, RANKS, pictures, steady
from tests.runs import toy
from tests.test_capture import Guard
from tests.trained import trained

COLOUR = ImageSpec(3, 128)
SIGNS = {"real": -1, "repaired": 1}


def holes(count: int, side: int) -> torch.Tensor:
    return masks.draw(philox.make_key(5), HOLES, torch.arange(count), (side, side), 0.5)


def test_sizes_are_those_of_the_papers_coarse_stage():
    """By hand: kernel and channels of each gated convolution, whose gates double what it makes."""
    layers = [(4, 24, 5), (24, 48, 3), (48, 48, 3), (48, 96, 3), *[(96, 96, 3)] * 8]
    layers += [(96, 48, 3), (48, 48, 3), (48, 24, 3), (24, 12, 3)]
    gated = sum(2 * after * (before * kernel**2 + 1) for before, after, kernel in layers)
    assert parameters(inpaint.Generator().build(COLOUR)) == gated + 12 * 3 * 9 + 3
    widths = [4, 64, 128, 256, 256, 256, 256]
    critic = sum(b * (a * 25 + 1) for a, b in pairwise(widths))
    assert parameters(inpaint.Discriminator().build(COLOUR)) == critic


def test_a_gate_says_how_much_a_feature_counts():
    layer = inpaint.Gated(2, 3)
    x = pictures(1, 8, 0)[:, :2]
    values = F.conv2d(x.double(), layer.both.weight.double(), layer.both.bias.double(), padding=1)
    wanted = F.elu(values[:, :3]) / (1 + (-values[:, 3:]).exp())
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-6)


def test_the_generator_does_not_see_what_is_in_the_holes():
    network = inpaint.Generator(width=4).build(COLOUR).eval()
    x, hole = pictures(2, 32, 0), holes(2, 32)
    other = torch.where(hole, pictures(2, 32, 1), x)
    assert torch.equal(network(x, hole), network(other, hole))
    assert not torch.equal(network(x, hole), network(x, ~hole))
    assert network(x[..., :28], hole[..., :28]).shape == (2, 3, 32, 28)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_known_stays_as_it_is(channels):
    recipe = toy("inpaint_celeba")[0]
    recipe = replace(recipe, data=replace(recipe.data, channels=channels))
    networks = build_networks(recipe)
    x, hole = pictures(4, 32, 0)[:, :channels], holes(4, 32)
    made = recipe.step.repair(networks, x, hole)
    everywhere = hole.expand_as(x)
    assert torch.equal(made[~everywhere], x[~everywhere])
    assert not (made == x)[everywhere].any()


class Given(nn.Module):
    """A generator that makes these images."""

    def __init__(self, made: torch.Tensor) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
        return self.made


def summing(x: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
    """A discriminator's outputs, two per image."""
    return torch.stack([x.sum((1, 2, 3)) / 50, (x * hole).sum((1, 2, 3)) / 9], 1)


def test_losses_are_those_of_the_papers_by_hand():
    """In float64, pixel by pixel."""
    real, made = pictures(3, 16, 0), pictures(3, 16, 1)
    key, position_N = philox.make_key(2), torch.arange(40, 43)
    loss, values = repairing_update(
        Given(made), summing, real, key, position_N, boxes=0.5, weights=(6.0, 1.0, 0.5)
    )
    judged, means = judging_update(summing, real, values["repaired"], values["holes"])

    hole = masks.draw(key, HOLES, position_N, (16, 16), 0.5).expand_as(real).numpy()
    x, g = real.double().numpy(), made.double().numpy()
    in_holes = known = 0.0
    repaired = x.copy()
    for at in np.ndindex(x.shape):
        if hole[at]:
            in_holes += abs(x[at] - g[at]) / x.size
            repaired[at] = g[at]
        else:
            known += abs(x[at] - g[at]) / x.size
    outputs = {
        name: np.stack([v.sum((1, 2, 3)) / 50, (v * hole).sum((1, 2, 3)) / 9], 1)
        for name, v in (("real", x), ("repaired", repaired))
    }
    fooling = -outputs["repaired"].mean()
    assert values["l1_hole"].item() == pytest.approx(in_holes, rel=1e-5)
    assert values["l1_valid"].item() == pytest.approx(known, rel=1e-5)
    assert loss.item() == pytest.approx(6 * in_holes + known + 0.5 * fooling, rel=1e-5)
    hinge = (
        np.maximum(0, 1 - outputs["real"]).mean() + np.maximum(0, 1 + outputs["repaired"]).mean()
    )
    assert judged.item() == pytest.approx(hinge, rel=1e-5)
    assert means["output_fake"].item() == pytest.approx(-fooling, rel=1e-4)


def test_an_update_is_that_of_a_plain_reference():
    """Parameters after one iteration, the generator first; without spectral normalisation, which
    tests/test_adversaries.py compares."""
    recipe = steady(toy("inpaint_celeba", 4)[0])
    plain = replace(recipe.step.discriminator, spectral_norm=False)
    recipe = replace(recipe, step=replace(recipe.step, discriminator=plain))
    real = pictures(4, recipe.data.resolution, 1)
    live = session.start(recipe, RANKS, FP32, Compiler(False, "test"), 100)
    position_N = live.clock.position_N()
    live.step(Batch(real, None, position_N))

    networks = build_networks(recipe)
    G, D = networks["generator"].train(), networks["discriminator"].train()
    adam = {
        n: torch.optim.Adam(m.parameters(), 1e-4, (0.5, 0.999), EPS) for n, m in networks.items()
    }
    key = philox.make_key(recipe.seed)
    m = masks.draw(key, HOLES, position_N, tuple(real.shape[2:]), 0.5).float()
    made = G(real, m > 0)
    y = m * made + (1 - m) * real
    apart = (made - real).abs()
    (6 * (m * apart).mean() + ((1 - m) * apart).mean() - D(y, m > 0).mean()).backward()
    adam["generator"].step()
    adam["discriminator"].zero_grad()
    judged = F.relu(1 - D(real, m > 0)).mean() + F.relu(1 + D(y.detach(), m > 0)).mean()
    judged.backward()
    adam["discriminator"].step()
    for name, module in networks.items():
        mine = dict(live.players[name].network.named_parameters())
        for path, wanted in module.named_parameters():
            torch.testing.assert_close(mine[path], wanted, rtol=1e-5, atol=1e-6, msg=path)


def test_surroundings_spread_into_holes():
    """Of one colour they are that colour; what is known stays; a slope goes on."""
    known = torch.ones(1, 1, 24, 20)
    known[..., 5:15, 4:14] = 0
    flat = torch.full((1, 3, 24, 20), 0.3)
    filled = spread(torch.where(known > 0, flat, -9.0), known)
    torch.testing.assert_close(filled, flat)
    slope = torch.linspace(-1, 1, 20).expand(1, 3, 24, 20)
    filled = spread(torch.where(known > 0, slope, 7.0), known)
    assert torch.equal(filled[(known > 0).expand_as(filled)], slope[(known > 0).expand_as(slope)])
    mean = torch.where(known > 0, slope, (slope * known).sum() / known.sum() / 3)
    assert (filled - slope).abs().mean() < 0.5 * (mean - slope).abs().mean()


def test_trivial_ones_and_columns_have_the_holes_of_what_is_remade():
    recipe = toy("inpaint_celeba")[0]
    step, networks = recipe.step, build_networks(recipe)
    batch = Batch(pictures(4, 32, 0), None, torch.arange(4))
    hole = step.holes(batch).expand_as(batch.images_NCHW)
    assert torch.equal(step.holes(batch), step.holes(batch))
    made, goal = step.remade(networks, batch)
    given, shown, original = step.columns(networks, batch)
    assert torch.equal(shown, made) and torch.equal(original, goal)
    assert (given[hole] == 0).all() and torch.equal(given[~hole], goal[~hole])
    for images in (made, *step.trivial(batch).values()):
        assert torch.equal(images[~hole], goal[~hole]) and not (images == goal)[hole].any()
    mean = step.trivial(batch)["mean"][1]
    for channel in range(3):
        wanted = goal[1, channel][~hole[1, channel]].double().mean().item()
        assert mean[channel][hole[1, channel]].unique().item() == pytest.approx(wanted, abs=1e-6)


def test_figures_stand_beside_trivial_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Synthetic, "__len__", lambda self: min(self.count, 40))
    run = trained(tmp_path, "inpaint_celeba", *toy("inpaint_celeba")[1])
    assert "--mask MASK" in capsys.readouterr().out
    monkeypatch.setenv("SADDLE_CACHE", str(tmp_path))
    assert evaluate.main([str(run), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for name in ("psnr", "psnr_mean", "psnr_surroundings", "ssim_mean", "ssim_surroundings"):
        assert name in printed


def test_wrong_settings():
    step = load("inpaint_celeba").step
    with pytest.raises(ValueError, match=r"--boxes 1\.5"):
        replace(step, boxes=1.5).check()
    for name in ("hole", "valid", "adversarial"):
        with pytest.raises(ValueError, match=f"--{name} -1"):
            replace(step, **{name: -1}).check()
    with pytest.raises(ValueError, match="no multiple of 4"):
        inpaint.Generator().build(ImageSpec(3, 30))


def test_an_iteration_keeps_the_capture_contract(monkeypatch):
    """Draws as on a GPU: no value is read back or brought in, no shape depends on data."""
    monkeypatch.setattr(philox, "by_numpy", lambda index_N: False)
    recipe = toy("inpaint_celeba", 4)[0]
    live = session.start(recipe, RANKS, FP32, Compiler(False, "test"), 100)
    images = pictures(4, recipe.data.resolution, 1)
    batches = [Batch(images, None, live.clock.position_N()) for _ in range(2)]
    live.step(batches[0])
    with Guard() as guard:
        live.step(batches[1])
    assert "where" in {name.partition(".")[0] for name in guard.seen}
