"""pix2pix: sizes of the authors' networks, dropout that is given, one update against a plain
reference, figures beside trivial ones, and bad input."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from engine import evaluate, session, translate
from engine.compile import Compiler
from engine.describe import parameters
from engine.networks import pix2pix
from engine.networks.spec import ImageSpec
from engine.recipe import load
from engine.session import build_networks
from engine.steps.paired import DROPOUT
from kernels import philox
from pipelines.batch import Batch
from tests.players import EPS, FP32, RANKS, pictures, steady
from tests.runs import toy
from tests.trained import refused_by, trained

COLOUR = ImageSpec(3, 256)
refused = refused_by(lambda *arguments: translate.main([str(a) for a in arguments]))


def test_sizes_are_those_of_the_authors():
    """pytorch-CycleGAN-and-pix2pix prints 54.414 M for unet_256 and 2.769 M for the
    discriminator."""
    generator, critic = pix2pix.Generator().build(COLOUR), pix2pix.Discriminator().build(COLOUR)
    assert round(parameters(generator) / 1e6, 3) == 54.414
    assert round(parameters(critic) / 1e6, 3) == 2.769
    assert generator.draws(256, 256) == 512 * (4**2 + 8**2 + 16**2)
    x = torch.zeros(1, 3, 70, 70)
    assert critic(x, x).shape == (1, 1, 6, 6)


def test_half_of_the_values_are_dropped_by_the_numbers_given():
    network = pix2pix.Generator(width=4, depth=4).build(ImageSpec(3, 32)).eval()
    x, count = pictures(2, 32, 0), network.draws(32, 32)
    uniform = torch.rand(2, count, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network(x, uniform), network(x, uniform))
    assert not torch.equal(network(x, uniform), network(x, 1 - uniform))
    values = pix2pix.halved(torch.ones(1, 2, 2, 2), torch.tensor([[0.1, 0.9] * 4]))
    assert values.flatten().tolist() == [2.0, 0.0] * 4
    alone = network(x[:1], uniform[:1])
    torch.testing.assert_close(alone, network(x, uniform)[:1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_an_update_is_that_of_a_plain_reference(direction):
    """Losses and parameters of one iteration, as pix2pix_model.py computes them but for the order:
    there and here the discriminator is first."""
    recipe = steady(toy("pix2pix_facades", 2)[0])
    recipe = replace(recipe, step=replace(recipe.step, direction=direction))
    side = recipe.data.resolution
    left, right = pictures(2, side, 1), pictures(2, side, 2)
    given, goal = (left, right) if direction == "AtoB" else (right, left)
    live = session.start(recipe, RANKS, FP32, Compiler(False, "test"), 100)
    position_N = live.clock.position_N()
    values = live.step(Batch(left, None, position_N, pair_NCHW=right))

    networks = build_networks(recipe)
    G, D = networks["generator"].train(), networks["discriminator"].train()
    adam = {
        n: torch.optim.Adam(m.parameters(), 2e-4, (0.5, 0.999), EPS) for n, m in networks.items()
    }
    key = philox.make_key(recipe.seed)
    fake = G(given, philox.uniform(key, DROPOUT, position_N, G.draws(side, side)))
    true, false = D(given, goal), D(given, fake.detach())
    entropy = F.binary_cross_entropy_with_logits
    judged = 0.5 * (entropy(true, torch.ones_like(true)) + entropy(false, torch.zeros_like(false)))
    judged.backward()
    adam["discriminator"].step()
    judgement, l1 = D(given, fake), F.l1_loss(fake, goal)
    loss = entropy(judgement, torch.ones_like(judgement)) + 100 * l1
    loss.backward()
    adam["generator"].step()

    assert values["discriminator/loss"].item() == pytest.approx(judged.item(), rel=1e-5)
    assert values["generator/loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert values["generator/l1"].item() == pytest.approx(l1.item(), rel=1e-5)
    for name, module in networks.items():
        mine = dict(live.players[name].network.named_parameters())
        for path, wanted in module.named_parameters():
            torch.testing.assert_close(mine[path], wanted, rtol=1e-5, atol=1e-6, msg=path)


def test_figures_stand_beside_trivial_ones_and_translation_goes_one_way(tmp_path, capsys):
    run = trained(tmp_path, "pix2pix_facades", *toy("pix2pix_facades")[1])
    assert evaluate.main([str(run), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("psnr_identity", "psnr_mean", "ssim_mean"))
    Image.new("L", (37, 21), 90).save(tmp_path / "grey.png")
    out = ("--out", tmp_path / "out")
    error = refused(capsys, 2, run, tmp_path / "grey.png", *out, "--direction", "AtoB")
    assert "goes BtoA alone" in error
    assert translate.main([str(run), str(tmp_path / "grey.png"), *map(str, out)]) == 0
    with Image.open(tmp_path / "out" / "grey.png") as made:
        assert made.size == (37, 21)


def test_wrong_settings():
    recipe = load("pix2pix_facades")
    with pytest.raises(ValueError, match="--l1 -1"):
        replace(recipe.step, l1=-1).check()
    with pytest.raises(ValueError, match="--loss wasserstein"):
        replace(recipe.step, loss="wasserstein").check()
    with pytest.raises(ValueError, match=r"--data.name pairs"):
        recipe.step.check_data(load("dcgan_celeba").data)
    with pytest.raises(ValueError, match=r"--generator.depth fewer"):
        pix2pix.Generator().build(ImageSpec(3, 64))
    with pytest.raises(ValueError, match="give at least 3"):
        pix2pix.Generator(depth=2).build(ImageSpec(3, 64))
