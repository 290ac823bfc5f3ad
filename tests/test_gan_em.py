"""GAN-EM: its losses, whose turn it is, that labels teach nothing, how clusters are measured."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from engine import session
from engine.compile import Compiler
from engine.describe import parameters
from engine.export.write import describe
from engine.metrics.clusters import clustering
from engine.networks import gan_em
from engine.networks.conditional import ByClass, Choosing
from engine.networks.load import rebuild
from engine.networks.spec import ImageSpec
from engine.recipe import load
from engine.session import Session, build_networks
from engine.steps.gan_em import (
    expected_r1,
    fake_loss,
    fooling_loss,
    labels,
    real_loss,
    responsibilities,
    warped,
)
from pipelines.batch import Batch
from tests.players import BATCH, FP32, RANKS, weights
from tests.runs import toy

MNIST = ImageSpec(1, 28)


def started(seed: int = 0, **changes) -> Session:
    recipe = replace(toy("gan_em_mnist", BATCH)[0], seed=seed)
    recipe = replace(recipe, step=replace(recipe.step, **changes))
    recipe.step.check()
    return session.start(recipe, RANKS, FP32, Compiler(False, "test"), 1000)


def advance(live: Session, steps: int, label_N: Tensor | None = None) -> list[dict[str, Tensor]]:
    values = []
    for _ in range(steps):
        random = torch.Generator().manual_seed(live.clock.images)
        images = torch.rand(BATCH, 1, 28, 28, generator=random) * 2 - 1
        values.append(live.step(Batch(images, label_N, live.clock.position_N())))
        live.clock.advance()
    return values


# losses


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


LOGITS = [[0.3, -1.2, 2.0, 0.7], [1.5, 0.0, -0.4, -2.2]]  # two images, three classes and "fake"
LOGITS_NO = torch.tensor(LOGITS)


def test_the_loss_of_real_images_weighs_each_class_by_its_responsibility():
    weight = [[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]]
    wanted = 0.0
    for logit, share in zip(LOGITS, weight, strict=True):
        wanted -= sum(w * math.log(sigmoid(d)) for w, d in zip(share, logit[:3], strict=True))
        wanted -= 2 * math.log(1 - sigmoid(logit[3]))
    found = real_loss(LOGITS_NO, torch.tensor(weight))
    torch.testing.assert_close(found, torch.tensor(wanted / 2))


def test_the_loss_of_generated_images_is_that_they_are_of_no_class_but_fake():
    wanted = 0.0
    for logit in LOGITS:
        wanted -= sum(math.log(1 - sigmoid(d)) for d in logit[:3]) + math.log(sigmoid(logit[3]))
    torch.testing.assert_close(fake_loss(LOGITS_NO), torch.tensor(wanted / 2))


def test_the_generator_wants_the_class_it_was_given_and_no_other_output():
    wanted = 0.0
    for logit, label in zip(LOGITS, (2, 0), strict=True):
        for k, d in enumerate(logit):
            wanted -= math.log(sigmoid(d) if k == label else 1 - sigmoid(d))
    found = fooling_loss(LOGITS_NO, torch.tensor([2, 0]))
    torch.testing.assert_close(found, torch.tensor(wanted / 2))


def test_losses_are_float32_and_finite_for_large_bfloat16_logits():
    logits_NO = torch.tensor([[500.0, -500.0, 500.0], [-500.0, 500.0, -500.0]]).bfloat16()
    weight_NK = torch.full((2, 2), 0.5)
    losses = (
        real_loss(logits_NO, weight_NK),
        fake_loss(logits_NO),
        fooling_loss(logits_NO, torch.tensor([0, 1])),
    )
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses)


def test_the_penalty_is_of_the_expected_logit_of_being_real():
    """For a linear critic W x the gradient is w W_classes - W_fake at every image."""
    critic = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    weight_NK = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    matrix = critic[1].weight
    wanted = ((weight_NK @ matrix[:2] - matrix[2]) ** 2).sum(dim=1).mean()
    found = expected_r1(critic, torch.randn(2, 1, 2, 2), weight_NK)
    torch.testing.assert_close(found, wanted)


def test_responsibilities_sum_to_one_in_float32():
    encoder = gan_em.Encoder(clusters=5, width=4, hidden=6).build(MNIST)
    share_NK = responsibilities(encoder, torch.randn(3, 1, 28, 28))
    assert share_NK.shape == (3, 5) and share_NK.dtype == torch.float32
    torch.testing.assert_close(share_NK.sum(dim=1), torch.ones(3))


# networks


def test_the_e_net_has_the_layers_of_the_authors_code():
    """https://github.com/zhaowt61/GAN-EM, GANEM.py: 4x4 convolutions 1-64-128-256, then
    2304-1024-10; without BatchNorm."""
    convolutions = (16 + 1) * 64 + (64 * 16 + 1) * 128 + (128 * 16 + 1) * 256
    found = parameters(gan_em.Encoder().build(MNIST))
    assert found == convolutions + (2304 + 1) * 1024 + 1025 * 10 == 3_027_402


def test_generator_and_discriminator_have_the_parameters_counted_by_hand():
    networks = build_networks(load("gan_em_mnist"))
    generator = 40 * 256 + 2 * 256 + 256 * 512 + 2 * 512 + 513 * 784  # no bias before BatchNorm
    assert parameters(networks["generator"]) == generator
    assert parameters(networks["discriminator"]) == 785 * 512 + 513 * 256 + 257 * 11


def test_an_image_too_small_for_the_e_net_is_named_with_a_remedy():
    with pytest.raises(ValueError, match=r"data\.resolution=7 .*at least 8"):
        gan_em.Encoder(width=4, hidden=4).build(ImageSpec(1, 7))
    gan_em.Encoder(width=4, hidden=4).build(ImageSpec(1, 8))


def test_the_generator_hears_class_and_latents():
    torch.manual_seed(0)
    generator = gan_em.Generator(latent=5, clusters=3, hidden=(32, 32)).build(MNIST).eval()
    z_NL = torch.randn(1, 5).repeat(4, 1)
    z_NL[3] += 1
    first, again, other_class, other_z = generator(z_NL, torch.tensor([0, 0, 1, 0])).detach()
    torch.testing.assert_close(first, again)
    for other in (other_class, other_z):
        assert float((first - other).abs().max()) > 0.01


def test_the_largest_of_the_last_latents_chooses_the_class():
    torch.manual_seed(0)
    settings = ByClass(gan_em.Generator(latent=5, clusters=3, hidden=(8, 6)))
    sampler = settings.build(MNIST).eval()
    z_NL = torch.randn(6, 8)
    label_N = torch.tensor([max(range(3), key=lambda k: float(z_L[5 + k])) for z_L in z_NL])
    assert torch.equal(sampler(z_NL), sampler.generator(z_NL[:, :5], label_N))


def test_normal_latents_choose_all_classes_alike():
    torch.manual_seed(0)
    sampler = Choosing(lambda z_NL, label_N: label_N, 62)
    count_K = torch.bincount(sampler(torch.randn(20_000, 72)), minlength=10)
    assert all(1_800 < count < 2_200 for count in count_K.tolist())


def test_an_export_of_the_sampler_rebuilds_it():
    recipe = toy("gan_em_mnist")[0]
    networks = build_networks(recipe)
    sampler = recipe.step.sampler(networks).eval()
    config = {"network": describe(recipe.step.sampler_settings()), "images": vars(MNIST)}
    again = rebuild(config, sampler.state_dict())
    z_NL = torch.randn(4, recipe.step.latent_dim())
    assert torch.equal(again(z_NL), sampler(z_NL))


# the step


def test_classes_to_generate_come_in_turn():
    assert labels(torch.arange(7), 3).tolist() == [0, 1, 2, 0, 1, 2, 0]


def watched(live: Session, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the players as they are updated; an update that moves another fails."""
    order: list[str] = []

    def watch(name: str) -> None:
        kind = "update_made" if name == "generator" else "update"
        plain = getattr(live.players[name], kind)

        def update(*args):
            before = {n: weights(p.network) for n, p in live.players.items()}
            values = plain(*args)
            for other, player in live.players.items():
                same = all(map(torch.equal, weights(player.network), before[other]))
                assert same == (other != name), (name, other)
            order.append(name)
            return values

        monkeypatch.setattr(live.players[name], kind, update)

    for name in live.players:
        watch(name)
    return order


def test_an_e_step_comes_before_so_many_m_updates(monkeypatch):
    live = started(m_updates=3, e_updates=2, uniform_updates=3)
    order = watched(live, monkeypatch)
    advance(live, 4)
    both = ["discriminator", "generator"]
    assert order == ["encoder"] * 2 + both * 3 + ["encoder"] * 2 + both


def test_the_first_m_step_gives_each_image_to_all_clusters_alike(monkeypatch):
    live, seen = started(m_updates=2, uniform_updates=2), []
    player = live.players["discriminator"]
    plain = player.update
    monkeypatch.setattr(player, "update", lambda *args: (seen.append(args[-1]), plain(*args))[1])
    advance(live, 3)
    classes = live.recipe.step.clusters
    for weight_NK in seen[:2]:
        assert torch.equal(weight_NK, torch.full((BATCH, classes), 1 / classes))
    assert seen[2].std() > 0
    torch.testing.assert_close(seen[2].sum(dim=1), torch.ones(BATCH))
    assert not seen[2].requires_grad


def test_the_e_net_learns_from_other_fakes_in_each_update():
    live, made = started(m_updates=1, e_updates=3), []
    live.players["generator"].network.register_forward_hook(
        lambda module, args, out: made.append(out.detach().clone())
    )
    advance(live, 1)
    assert len(made) == 3 + 1  # the last for discriminator and generator
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(made, 2))


def test_running_statistics_of_the_generator_move_once_in_an_iteration():
    live = started(m_updates=1, e_updates=3)
    advance(live, 2)
    norms = [m for m in live.players["generator"].network.modules() if hasattr(m, "running_mean")]
    assert norms and all(int(m.num_batches_tracked) == 2 for m in norms)


def test_labels_teach_nothing():
    """Other labels, or none: the same parameters bit for bit."""
    found = []
    for label_N in (torch.arange(BATCH), torch.arange(BATCH).flip(0), None):
        live = started(m_updates=2, uniform_updates=2)
        advance(live, 4, label_N)
        found.append([p for player in live.players.values() for p in weights(player.network)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_kinds_show_every_update_that_is_ever_made():
    step = started(m_updates=4, uniform_updates=9, r1=1.0, r1_every=6).recipe.step
    assert (step.period(), step.settles()) == (12, 9)
    shown = {step.turns(kind) for kind in step.kinds()}
    assert shown == {step.turns(iteration) for iteration in range(100)}
    for iteration in range(9, 60):
        assert step.turns(iteration) == step.turns(iteration + 12)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"m_updates": 0}, "--m-updates"),
        ({"e_updates": 0}, "--e-updates"),
        ({"uniform_updates": -1}, "--uniform-updates"),
        ({"noise": -0.1}, "--noise"),
        ({"warp": -0.1}, "--warp"),
        ({"r1": -1.0}, "--r1"),
    ],
)
def test_settings_that_cannot_be_trained_with_are_named(changes, flag):
    with pytest.raises(ValueError, match=flag):
        started(**changes)


def test_players_of_different_numbers_of_classes_are_refused():
    step = load("gan_em_mnist").step
    other = replace(step.encoder, network=replace(step.encoder.network, clusters=20))
    with pytest.raises(ValueError, match=r"--encoder\.clusters 20"):
        replace(step, encoder=other).check()


def test_the_e_nets_affine_maps_are_the_identity_plus_so_much():
    torch.manual_seed(0)
    images_NCHW = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(warped(images_NCHW, torch.zeros(2, 6)), images_NCHW)
    change_N6 = torch.tensor([[0.0, 0, 0, 0, 0, 0], [0, 0, 0.25, 0, 0, 0]])
    still_CHW, moved_CHW = warped(images_NCHW, change_N6)  # a quarter of half an image: a pixel
    torch.testing.assert_close(still_CHW, images_NCHW[0])
    torch.testing.assert_close(moved_CHW[:, :, :-1], images_NCHW[1, :, :, 1:])


# clusters


def brute_force(cluster_N: Tensor, label_N: Tensor, size: int) -> float:
    """The best share over all one-to-one namings of clusters."""
    best = 0.0
    for names in itertools.permutations(range(size)):
        named_N = torch.tensor(names)[cluster_N]
        best = max(best, float((named_N == label_N).double().mean()))
    return best


def test_accuracy_is_that_of_the_best_of_all_matchings():
    for seed in range(5):
        random = torch.Generator().manual_seed(seed)
        cluster_N, label_N = torch.randint(0, 5, (2, 40), generator=random)
        found = clustering(cluster_N, label_N)["accuracy"]
        assert found == pytest.approx(brute_force(cluster_N, label_N, 5))


def test_renamed_classes_are_perfect_clusters_and_one_cluster_is_worth_one_class():
    label_N = torch.arange(100) % 10
    assert clustering((label_N + 3) % 10, label_N) == pytest.approx({"accuracy": 1.0, "nmi": 1.0})
    alone = clustering(torch.zeros_like(label_N), label_N)
    assert alone == pytest.approx({"accuracy": 0.1, "nmi": 0.0})


def test_more_clusters_than_classes_leave_some_without_one():
    cluster_N, label_N = torch.tensor([0, 1, 2, 3, 3, 3]), torch.tensor([0, 0, 1, 1, 1, 1])
    assert clustering(cluster_N, label_N)["accuracy"] == pytest.approx(4 / 6)


def test_normalised_mutual_information_by_hand():
    """Two even clusters of four, of which one holds one image of the other class."""
    cluster_N, label_N = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 0])
    information = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)
    of_labels = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    wanted = information / ((math.log(2) + of_labels) / 2)
    assert clustering(cluster_N, label_N)["nmi"] == pytest.approx(wanted)


def test_held_out_figures_are_clusters_of_the_e_net():
    live = started()
    images_NCHW = torch.randn(40, 1, 28, 28)
    with torch.no_grad():
        batch = Batch(images_NCHW, None, torch.arange(40))
        values = live.recipe.step.held_out(live.samplers(), batch, live.key)
        share_NK = responsibilities(live.players["encoder"].network, images_NCHW)
    assert torch.equal(values["cluster"], share_NK.argmax(dim=1))
    doubles = {name: value_N.double() for name, value_N in values.items()}
    assert live.recipe.step.summarise(doubles, share_NK.argmax(dim=1))["accuracy"] == 1
    assert live.recipe.step.summarise(doubles, None) == {}
