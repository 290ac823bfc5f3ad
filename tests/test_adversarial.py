"""The adversarial step: which player moves when, on which fakes, and what does it report?"""

import math

import pytest
import torch
from torch import Tensor, nn

from engine import session
from engine.compile import Compiler
from engine.networks import cgan, dcgan, mlp, residual
from engine.networks.spec import ImageSpec, Network
from engine.session import Session
from engine.settings import Length, PlayerSettings, Recipe
from engine.steps.adversarial import Adversarial, discriminator_update
from kernels import philox
from pipelines.batch import Batch
from pipelines.settings import Data
from tests.players import BATCH, FP32, RANKS, moved, weights

ALONE = [kind for kind in Network.__subclasses__() if kind.alone]


def started(
    joint: bool = False, discriminator: Network | None = None, spectral_norm: bool = False
) -> Session:
    """A toy adversarial session at 16x16."""
    discriminator = discriminator or dcgan.Discriminator(width=4)
    recipe = Recipe(
        data=Data(resolution=16, channels=1, batch=BATCH),
        step=Adversarial(
            generator=PlayerSettings(dcgan.Generator(latent=6, width=4)),
            discriminator=PlayerSettings(discriminator, spectral_norm=spectral_norm),
            joint=joint,
        ),
        length=Length(steps=10),
    )
    return session.start(recipe, RANKS, FP32, Compiler(False, "test"), 80)


def advance(live: Session, steps: int) -> list[dict[str, Tensor]]:
    values = []
    for _ in range(steps):
        random = torch.Generator().manual_seed(live.clock.images)
        images = torch.rand(BATCH, 1, 16, 16, generator=random) * 2 - 1
        values.append(live.step(Batch(images, None, live.clock.position_N())))
        live.clock.advance()
    return values


def test_each_update_moves_its_own_player_alone_and_the_discriminator_comes_first(monkeypatch):
    live, order = started(), []

    def watched(name: str, other: str, kind: str) -> None:
        player, opponent = live.players[name], live.players[other]
        plain = getattr(player, kind)

        def update(*args):
            mine, theirs = weights(player.network), weights(opponent.network)
            values = plain(*args)
            assert moved(player.network, mine) and not moved(opponent.network, theirs)
            assert all(p.grad is None for p in opponent.parameters)
            order.append(name)
            return values

        monkeypatch.setattr(player, kind, update)

    watched("generator", "discriminator", "update_made")
    watched("discriminator", "generator", "update")
    advance(live, 2)
    assert order == ["discriminator", "generator"] * 2


def test_a_step_reports_both_players():
    (values,) = advance(started(), 1)
    assert set(values) == {
        *(f"discriminator/{n}" for n in ("loss", "real", "fake", "grad_norm")),
        *(f"generator/{n}" for n in ("loss", "grad_norm")),
    }
    assert all(v.ndim == 0 and v.isfinite() and not v.requires_grad for v in values.values())
    assert float(values["discriminator/loss"]) == pytest.approx(2 * math.log(2), abs=0.3)


def test_both_updates_of_a_step_see_the_same_fakes_made_once_and_the_next_step_others():
    live, made = started(), []
    live.players["generator"].network.register_forward_hook(
        lambda module, args, out: made.append(out.detach().clone())
    )
    advance(live, 2)
    assert len(made) == 2 and not torch.equal(*made)


def test_fakes_that_are_made_again_teach_the_same(monkeypatch):
    once, again, made = started(), started(), []
    monkeypatch.setattr(again.players["generator"].shared, "spread", True)
    again.players["generator"].network.register_forward_hook(
        lambda module, args, out: made.append(out.detach().clone())
    )
    for mine, theirs in zip(advance(once, 2), advance(again, 2), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert len(made) == 4 and torch.equal(*made[:2]) and torch.equal(*made[2:])
    state, other = (live.players["generator"].network.state_dict() for live in (once, again))
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_running_statistics_of_the_generator_move_once_in_a_step():
    live = started()
    advance(live, 3)
    norms = [m for m in live.players["generator"].network if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(int(m.num_batches_tracked) == 3 for m in norms)


def test_joint_equals_separate_for_a_discriminator_without_batchnorm():
    plain = mlp.Discriminator(channels=(4, 6))
    separate, joint = started(False, plain), started(True, plain)
    for a, b in zip(advance(separate, 3), advance(joint, 3), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for name, player in separate.players.items():
        for mine, theirs in zip(player.parameters, joint.players[name].parameters, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("discriminator", "spectral_norm", "joint", "seen"),
    [
        (mlp.Discriminator((4, 6)), False, False, [2 * BATCH, BATCH]),
        (mlp.Discriminator((4, 6)), True, False, [BATCH, BATCH, BATCH]),
        (mlp.Discriminator((4, 6)), False, True, [2 * BATCH, 2 * BATCH]),
        (dcgan.Discriminator(width=4), False, False, [BATCH, BATCH, BATCH]),
    ],
)
def test_real_and_fake_images_go_together_where_it_is_all_the_same(
    discriminator, spectral_norm, joint, seen
):
    live, found = started(joint, discriminator, spectral_norm), []
    network = live.players["discriminator"].network
    network.register_forward_pre_hook(lambda _, given: found.append(len(given[0])))
    advance(live, 1)
    assert found == seen


@pytest.mark.parametrize("settings", ALONE, ids=lambda c: f"{c.__module__}.{c.__name__}")
def test_networks_that_judge_alone_do(settings):
    torch.manual_seed(0)
    network = settings().build(ImageSpec(1, 16, classes=10)).train()
    before = {name: b.clone() for name, b in network.named_buffers()}
    x, y, other = (torch.randn(2, 1, 16, 16) for _ in range(3))
    labels = (torch.arange(4),) if settings.classes else ()
    beside, beside_other = (network(torch.cat([x, z]), *labels)[:2] for z in (y, other))
    assert torch.equal(beside, beside_other) and beside.std() > 0
    assert all(torch.equal(b, before[name]) for name, b in network.named_buffers())


def test_those_that_look_at_their_company_do_not_say_so():
    assert {mlp.Discriminator, cgan.Discriminator, residual.Critic} <= set(ALONE)
    assert dcgan.Discriminator not in ALONE  # BatchNorm


def judged(network, real, fake, joint=False):
    where = (None, philox.make_key(0), torch.arange(len(real)))
    settings = {"loss": "nonsaturating", "joint": joint, "kinds": ()}
    return discriminator_update(network, real, fake, *where, **settings)


def test_joint_differs_from_separate_with_batchnorm():
    network = dcgan.Discriminator(width=4).build(ImageSpec(1, 16))
    real, fake = torch.randn(BATCH, 1, 16, 16), torch.randn(BATCH, 1, 16, 16) * 0.1
    separate, _ = judged(network, real, fake)
    joint, _ = judged(network, real, fake, joint=True)
    assert abs(float(separate.detach() - joint.detach())) > 1e-4


def test_opinions_are_the_mean_probabilities_of_being_real():
    logits = torch.full((4, 1), 2.0)
    _, values = judged(nn.Flatten(0), logits, -logits)
    wanted = 1 / (1 + math.exp(-2))
    torch.testing.assert_close(values["real"], torch.tensor(wanted))
    torch.testing.assert_close(values["fake"], torch.tensor(1 - wanted))
