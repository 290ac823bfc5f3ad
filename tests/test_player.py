"""Players: is an update that of a plain loop, and what does it freeze, skip and keep?"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from engine.compile import Compiler
from engine.networks.norms import statistics_kept
from engine.networks.spec import Network
from engine.player import Player, frozen, learning_rate_factor
from engine.settings import Adam, PlayerSettings
from pipelines.batch import Clock
from tests.players import BATCH, CPU, FP32, RANKS, moved, weights

ADAM = Adam(lr=0.01)


def dense() -> nn.Module:
    """A small network without BatchNorm, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def player_of(
    network: nn.Module, adam: Adam = ADAM, accumulate: int = 1, **settings: float
) -> Player:
    return Player(
        "autoencoder",
        PlayerSettings(Network(), adam, **settings),
        network,
        ranks=RANKS,
        clock=Clock(BATCH, CPU),
        precision=FP32,
        compiler=Compiler(False, "test"),
        accumulate=accumulate,
        total_images=4000,
    )


def squares(network: nn.Module, x_NC: Tensor, scale: Tensor) -> tuple[Tensor, dict]:
    """A loss that is a mean over the batch; `scale` is 0-d."""
    out_NC = network(x_NC) * scale
    return out_NC.square().sum(1).mean(), {"first": out_NC[:, 0].mean()}


def batches(count: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, 3, generator=random) for _ in range(count)]


# the update


def test_updates_equal_those_of_a_plain_loop_with_adam():
    player, plain, scale = player_of(dense()), dense(), torch.tensor(1.0)
    adam = torch.optim.Adam(plain.parameters(), lr=0.01, betas=(0.5, 0.999), fused=False)
    for x_NC in batches(10):
        values = player.update(squares, x_NC, scale)
        adam.zero_grad()
        loss, wanted = squares(plain, x_NC, scale)
        loss.backward()
        norm = torch.stack([p.grad.square().sum() for p in plain.parameters()]).sum().sqrt()
        adam.step()
        assert set(values) == {"autoencoder/loss", "autoencoder/first", "autoencoder/grad_norm"}
        torch.testing.assert_close(values["autoencoder/loss"], loss.detach())
        torch.testing.assert_close(values["autoencoder/first"], wanted["first"].detach())
        torch.testing.assert_close(values["autoencoder/grad_norm"], norm)
        assert all(p.grad is None for p in player.parameters)
    for mine, theirs in zip(player.parameters, plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_an_update_is_algorithm_1_of_the_adam_paper():
    """Kingma and Ba 2015, algorithm 1, written out in float64 for one weight."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 2.0)
    player = player_of(network, Adam(lr=0.1, betas=(0.5, 0.9), eps=1e-3))
    theta, m, v = 2.0, 0.0, 0.0
    for t in range(1, 6):
        player.update(lambda net, x: (net(x).square().mean(), {}), torch.ones(BATCH, 1))
        g = 2 * theta
        m, v = 0.5 * m + 0.5 * g, 0.9 * v + 0.1 * g * g
        theta -= 0.1 * (m / (1 - 0.5**t)) / (math.sqrt(v / (1 - 0.9**t)) + 1e-3)
        assert network.weight.item() == pytest.approx(theta, rel=1e-5)


def test_four_micro_batches_equal_one_batch():
    whole, parts = player_of(dense()), player_of(dense(), accumulate=4)
    for x_NC in batches(5):
        wanted = whole.update(squares, x_NC, torch.tensor(1.5))
        got = parts.update(squares, x_NC, torch.tensor(1.5))
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(parts.parameters, whole.parameters, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_micro_batches_split_tensors_with_a_batch_axis_and_nothing_else():
    seen = []

    def loss(net: nn.Module, x_NC: Tensor, scale: Tensor, judge: nn.Module) -> tuple[Tensor, dict]:
        seen.append((x_NC.clone(), scale, judge))
        return net(x_NC).mean() * scale, {}

    judge, scale, (x_NC,) = nn.Identity(), torch.tensor(2.0), batches(1)
    player_of(dense(), accumulate=4).update(loss, x_NC, scale, judge)
    assert torch.equal(torch.cat([part for part, _, _ in seen]), x_NC) and len(seen) == 4
    assert all(s is scale and j is judge for _, s, j in seen)


@pytest.mark.parametrize(("clip", "clipped"), [(0.0, False), (0.5, True), (1e9, False)])
def test_clipping_bounds_the_norm_that_the_optimizer_sees_and_reports_the_true_one(clip, clipped):
    player, (x_NC,) = player_of(dense(), clip=clip), batches(1)
    norm = player.update(squares, x_NC, torch.tensor(10.0))["autoencoder/grad_norm"]
    assert float(norm) > 10
    moments = [player.optimizer.state[p]["exp_avg"] for p in player.parameters]
    seen = torch.stack([m.square().sum() for m in moments]).sum().sqrt() / (1 - 0.5)
    assert float(seen) == pytest.approx(clip if clipped else float(norm), rel=1e-4)


def test_a_rehearsed_update_computes_its_values_and_changes_nothing():
    player, (x_NC,) = player_of(dense(), ema_kimg=1), batches(1)
    before, shadow = weights(player.network), weights(player.average.network)
    player.rehearsing = True
    values = player.update(squares, x_NC, torch.tensor(1.0))
    player.rehearsing = False
    assert float(values["autoencoder/loss"]) > 0
    assert not moved(player.network, before) and not moved(player.average.network, shadow)
    assert not player.optimizer.state


# learning rate


@pytest.mark.parametrize(
    ("adam", "images", "wanted"),
    [
        (Adam(warmup_kimg=1), 0, 0.001),
        (Adam(warmup_kimg=1), 499, 0.5),
        (Adam(warmup_kimg=1), 999, 1.0),
        (Adam(warmup_kimg=1), 3000, 1.0),
        (Adam(decay_kimg=1), 0, 1.0),
        (Adam(decay_kimg=1), 3000, 1.0),
        (Adam(decay_kimg=1), 3500, 0.5),
        (Adam(decay_kimg=1), 3999, 0.001),
        (Adam(decay_kimg=1), 4500, 0.0),
        (Adam(warmup_kimg=4, decay_kimg=4), 1999, 0.5),  # decays in the second half at most
        (Adam(warmup_kimg=4, decay_kimg=4), 2999, 0.75 * 1001 / 2000),
    ],
)
def test_the_learning_rate_warms_up_and_decays_with_the_images_seen(adam, images, wanted):
    factor = learning_rate_factor(adam, torch.tensor(images), 4000)
    assert float(factor) == pytest.approx(wanted, rel=1e-5)
    player, (x_NC,) = player_of(dense(), replace(adam, lr=0.02)), batches(1)
    player.clock.seek(images)
    before = weights(player.network)
    player.update(squares, x_NC, torch.tensor(1.0))
    assert moved(player.network, before) == (wanted > 0)
    assert float(player.lr) == pytest.approx(0.02 * wanted, rel=1e-5)
    assert player.optimizer.param_groups[0]["lr"] is player.lr
    assert learning_rate_factor(ADAM, torch.tensor(images), 4000) is None  # a constant one


# non-finite values


def bad_loss(network: nn.Module, x_NC: Tensor) -> tuple[Tensor, dict]:
    return network(x_NC).square().mean() + torch.tensor(math.inf), {}


def bad_gradient(network: nn.Module, x_NC: Tensor) -> tuple[Tensor, dict]:
    return (network(x_NC).square() * 0).sqrt().mean(), {}


def bad_both(network: nn.Module, x_NC: Tensor) -> tuple[Tensor, dict]:
    return network(x_NC * math.nan).mean(), {}


@pytest.mark.parametrize(
    ("loss", "losses", "gradients"), [(bad_loss, 1, 1), (bad_gradient, 0, 1), (bad_both, 1, 1)]
)
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_non_finite_update_is_skipped_and_counted_by_its_kind(loss, losses, gradients, clip):
    player, (first, second, third) = player_of(dense(), clip=clip, ema_kimg=1), batches(3)
    undisturbed, scale = player_of(dense(), clip=clip, ema_kimg=1), torch.tensor(1.0)
    for each in (player, undisturbed):
        each.update(squares, first, scale)
    before = weights(player.network)
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in player.optimizer.state.items()}
    values = player.update(loss, second)
    assert not (values["autoencoder/loss"] + values["autoencoder/grad_norm"]).isfinite()
    assert not moved(player.network, before)
    for p, entries in state.items():
        for key, tensor in entries.items():
            assert torch.equal(player.optimizer.state[p][key], tensor), key
    assert (int(player.bad_losses), int(player.bad_gradients)) == (losses, gradients)
    for each in (player, undisturbed):
        each.update(squares, third, scale)
    assert not moved(player.network, weights(undisturbed.network))
    assert (int(player.bad_losses), int(player.bad_gradients)) == (losses, gradients)
    assert all(t.isfinite().all() for t in weights(player.average.network))


def test_fp16_skips_an_overflowing_gradient_and_lowers_its_scale():
    player, (first, second) = player_of(dense()), batches(2)
    player.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    player.update(squares, first, torch.tensor(1.0))
    before = weights(player.network)
    player.update(bad_gradient, second)
    assert not moved(player.network, before)
    assert player.scaler.get_scale() == 512 and int(player.bad_gradients) == 0
    player.update(squares, second, torch.tensor(1.0))
    assert moved(player.network, before)


def test_fp16_loss_scaling_leaves_no_trace_in_the_update():
    scaled, plain, (x_NC,) = player_of(dense()), player_of(dense()), batches(1)
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    wanted = plain.update(squares, x_NC, torch.tensor(1.0))
    got = scaled.update(squares, x_NC, torch.tensor(1.0))
    torch.testing.assert_close(got, wanted)
    for mine, theirs in zip(scaled.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(mine, theirs)


# frozen, statistics_kept


def test_a_frozen_player_gets_no_gradient_but_lets_it_through():
    player, (x_NC,) = player_of(dense()), batches(1)
    x_NC.requires_grad_()
    with frozen(player) as network:
        assert network is player.network
        network(x_NC).sum().backward()
    assert x_NC.grad is not None and x_NC.grad.any()
    assert all(p.grad is None and p.requires_grad for p in player.parameters)


def test_a_frozen_player_thaws_after_an_exception():
    player = player_of(dense())
    with pytest.raises(KeyError), frozen(player) as network:
        assert not any(p.requires_grad for p in network.parameters())
        raise KeyError
    assert all(p.requires_grad for p in player.parameters)


def test_parameters_that_never_learn_stay_so_after_freezing():
    network = dense()
    network[0].weight.requires_grad_(False)
    player = player_of(network)
    with frozen(player):
        pass
    assert [p.requires_grad for p in network.parameters()] == [False, True, True, True]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3))])
def test_kept_statistics_stay_while_the_batch_normalises(norm):
    (x_NC,) = batches(1)
    norm.train()
    norm(x_NC)
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    with statistics_kept(norm):
        out_NC = norm(5 * x_NC + 3)
    torch.testing.assert_close(out_NC.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out_NC.var(0, correction=0), torch.ones(3), atol=1e-3, rtol=0)
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
    norm(x_NC)
    assert not all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


def test_statistics_move_again_after_an_exception():
    norm, (x_NC,) = nn.BatchNorm1d(3), batches(1)
    with pytest.raises(KeyError), statistics_kept(norm):
        raise KeyError
    norm(x_NC)
    assert int(norm.num_batches_tracked) == 1
