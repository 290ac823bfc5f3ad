"""CycleGAN: sizes of the authors' networks, one update against a plain reference, translation."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine import session
from engine.compile import Compiler
from engine.describe import parameters
from engine.networks import cyclegan
from engine.networks.spec import ImageSpec
from engine.recipe import load
from engine.session import build_networks
from pipelines.batch import Batch
from tests.players import EPS, FP32, RANKS, pictures, steady
from tests.runs import toy

COLOUR = ImageSpec(3, 256)


def test_sizes_are_those_of_the_authors():
    """pytorch-CycleGAN-and-pix2pix prints 11.378 M for each generator, 2.765 M for each
    discriminator."""
    generators = cyclegan.Generators().build(COLOUR)
    critics = cyclegan.Discriminators(pool=0).build(COLOUR)
    assert parameters(generators.to_A) == parameters(generators.to_B) == 11_378_179
    assert parameters(critics.of_A) == parameters(critics.of_B) == 2_764_737
    assert critics.of_A(torch.zeros(1, 3, 70, 70)).shape == (1, 1, 6, 6)


def test_a_patch_of_70_pixels_is_judged():
    critic = cyclegan.patch_critic(1, 2, 3)
    for module in critic.modules():  # every input counts with a weight above 0
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 0.1)
    plain = nn.Sequential(*(m for m in critic if isinstance(m, nn.Conv2d)))
    x = torch.zeros(1, 1, 256, 256, requires_grad=True)
    plain(x)[0, 0, 15, 15].backward()
    rows = x.grad[0, 0].any(1).nonzero().flatten()
    assert len(rows) == 70


def test_an_update_is_that_of_a_plain_reference():
    """Losses and parameters of one iteration, as cycle_gan_model.py computes them: image by image,
    network by network, with torch's own Adam."""
    recipe = steady(toy("cyclegan_horse2zebra", 2)[0])
    side = recipe.data.resolution
    real_A, real_B = pictures(2, side, 1), pictures(2, side, 2)
    live = session.start(recipe, RANKS, FP32, Compiler(False, "test"), 100)
    values = live.step(Batch(real_A, None, live.clock.position_N(), pair_NCHW=real_B))

    networks = build_networks(recipe)
    G, D = networks["generators"].train(), networks["discriminators"].train()
    adam = {
        n: torch.optim.Adam(m.parameters(), 2e-4, (0.5, 0.999), EPS) for n, m in networks.items()
    }
    fake_B, fake_A = G.to_B(real_A), G.to_A(real_B)
    judged = [D.of_B(fake_B), D.of_A(fake_A)]
    fooling = sum(F.mse_loss(x, torch.ones_like(x)) for x in judged)
    cycle = F.l1_loss(G.to_A(fake_B), real_A) + F.l1_loss(G.to_B(fake_A), real_B)
    identity = F.l1_loss(G.to_B(real_B), real_B) + F.l1_loss(G.to_A(real_A), real_A)
    loss = fooling + 10 * cycle + 5 * identity
    loss.backward()
    adam["generators"].step()
    D.zero_grad()
    total = 0.0
    for critic, real, fake in ((D.of_A, real_A, fake_A), (D.of_B, real_B, fake_B)):
        right, wrong = critic(real), critic(fake.detach())
        true, false = torch.ones_like(right), torch.zeros_like(wrong)
        total = total + 0.5 * (F.mse_loss(right, true) + F.mse_loss(wrong, false))
    total.backward()
    adam["discriminators"].step()

    assert values["generators/loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert values["generators/cycle"].item() == pytest.approx(cycle.item(), rel=1e-5)
    assert values["discriminators/loss"].item() == pytest.approx(total.item(), rel=1e-5)
    assert not any("fake" in name for name in values)
    for name, module in networks.items():
        mine = dict(live.players[name].network.named_parameters())
        for path, wanted in module.named_parameters():
            torch.testing.assert_close(mine[path], wanted, rtol=1e-5, atol=1e-6, msg=path)


def test_other_data_is_refused():
    step = load("cyclegan_horse2zebra").step
    with pytest.raises(ValueError, match=r"--data.name unpaired"):
        step.check_data(replace(load("dcgan_celeba").data))
    with pytest.raises(ValueError, match=r"--cycle -1 must not"):
        replace(step, cycle=-1).check()
