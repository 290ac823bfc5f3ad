"""What every adversarial recipe can be given: losses, turns, spectral normalisation, augmentation,
RMSprop, clipped weights, classes."""

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from engine import attention
from engine import recipe as recipes
from engine.augment import augment, color, cut_out, translate
from engine.losses import ADVERSARIES
from engine.networks import cgan, residual, sagan
from engine.networks.conditional import ByClass, ConditionalNorm, with_classes
from engine.networks.norms import statistics_kept
from engine.networks.spec import ImageSpec
from engine.networks.spectral import Normalised, folded, spectral_norm
from engine.optimizer import GuardedRMSprop
from engine.penalties import gradient_penalty, input_gradient
from kernels import philox

REAL, FAKE = (torch.tensor(x, dtype=torch.float64) for x in ([2.0, -0.5], [0.5, -3.0]))
KEY, PLACES = philox.make_key(0), torch.arange(64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


WANTED = {  # by hand: of the discriminator, of the generator
    "nonsaturating": (
        -(math.log(sigmoid(2)) + math.log(sigmoid(-0.5))) / 2
        - (math.log(1 - sigmoid(0.5)) + math.log(1 - sigmoid(-3))) / 2,
        -(math.log(sigmoid(0.5)) + math.log(sigmoid(-3))) / 2,
    ),
    "hinge": ((0 + 1.5) / 2 + (1.5 + 0) / 2, 1.25),
    "least-squares": ((1 + 2.25) / 4 + (0.25 + 9) / 4, (0.25 + 16) / 4),
    "wasserstein": (-1.25 - 0.75, 1.25),
}
WANTED["minimax"] = (
    WANTED["nonsaturating"][0],
    (math.log(1 - sigmoid(0.5)) + math.log(1 - sigmoid(-3))) / 2,
)


@pytest.mark.parametrize("name", ADVERSARIES)
def test_losses_are_those_of_a_hand(name):
    judge, fool = ADVERSARIES[name]
    assert float(judge(REAL, FAKE)) == pytest.approx(WANTED[name][0], rel=1e-6)
    assert float(fool(FAKE)) == pytest.approx(WANTED[name][1], rel=1e-6)


def test_the_generator_learns_every_so_often():
    step = replace(recipes.load("dcgan_digits").step, critic_updates=3)
    assert [i for i in range(9) if step.generator_learns(i)] == [2, 5, 8]
    assert (step.period(), step.settles(), step.kinds()) == (3, 0, (0, 2))


def test_the_critic_is_warmed_up_as_in_the_authors_code():
    """WassersteinGAN/main.py: Diters is 100 while gen_iterations < 25 or a multiple of 500."""
    step, wanted, iteration = recipes.load("wgan_mnist").step, set(), -1
    for update in range(1002):
        iteration += 100 if update < 25 or update % 500 == 0 else 5
        wanted.add(iteration)
    assert {i for i in range(iteration + 1) if step.generator_learns(i)} == wanted
    assert step.kinds() == (0, 99)


def test_rmsprop_is_torchs_and_skips_what_is_not_finite():
    ours, theirs = (nn.Parameter(torch.tensor([1.0, -2.0, 3.0])) for _ in range(2))
    guarded = GuardedRMSprop([ours], 0.1, 0.9, 1e-8)
    plain = torch.optim.RMSprop([theirs], lr=0.1, alpha=0.9, eps=1e-8)
    for gradient in ([0.5, -1.0, 2.0], [float("nan"), 1.0, 1.0], [1.0, 0.0, -3.0]):
        ours.grad, theirs.grad = torch.tensor(gradient), torch.tensor(gradient)
        guarded.step()
        if theirs.grad.isfinite().all():
            plain.step()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(guarded.state[ours]["square_avg"], plain.state[theirs]["square_avg"])


# spectral normalisation

LAYERS = [
    (nn.Conv2d(3, 5, 3), (2, 3, 6, 6)),
    (nn.ConvTranspose2d(4, 3, 4, 2, 1, bias=False), (2, 4, 5, 5)),
    (nn.Linear(7, 4), (2, 7)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda x: type(x).__name__)
def test_a_normalised_layer_has_norm_1_and_folds_into_a_plain_one(layer, shape):
    plain, x = copy.deepcopy(layer), torch.randn(shape)
    layer = spectral_norm(copy.deepcopy(layer))
    for _ in range(60):
        layer(x)
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    rows = layer.weight.movedim(axis, 0).flatten(1)
    wanted = copy.deepcopy(plain)
    wanted.weight.data /= torch.linalg.matrix_norm(rows, 2)
    torch.testing.assert_close(layer(x), wanted(x), rtol=1e-4, atol=1e-5)
    assert layer.state_dict().keys() == {*plain.state_dict(), "singular_O"}
    shown = folded(copy.deepcopy(layer))
    assert type(shown) is type(plain) and shown.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(shown(x), layer.eval()(x))


def test_a_compiled_backward_pass_has_the_vector_of_its_forward():
    """Few outputs, so that the compiler rather computes singular vectors again than keeps them; a
    fresh weight, so that the next estimate differs."""
    gradients, x = [], torch.linspace(-1, 1, 128, dtype=torch.float64).view(2, 1, 8, 8)
    fresh = spectral_norm(nn.Conv2d(1, 4, 5).double())
    nn.init.normal_(fresh.weight)
    for compiled in (False, True):
        torch._dynamo.reset()
        layer = copy.deepcopy(fresh)
        loss = torch.compile(layer, fullgraph=True) if compiled else layer
        loss(x).sin().sum().backward()
        gradients.append(layer.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_a_forward_that_moves_nothing_divides_by_what_the_last_one_did():
    layer, x = spectral_norm(nn.Linear(7, 4)), torch.randn(2, 7)
    nn.init.normal_(layer.weight)  # far from its singular vector
    first, vector = layer(x), layer.singular_O.clone()
    with statistics_kept(layer):
        assert torch.equal(layer(x), first)
    assert torch.equal(layer.singular_O, vector) and not torch.equal(layer(x), first)


def test_the_norm_is_differentiated_and_the_vector_is_not_moved_by_a_penalty():
    critic = spectral_norm(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 1)))
    before = critic[0].singular_O.clone()
    input_gradient(critic, torch.randn(2, 1, 4, 4))
    assert torch.equal(critic[0].singular_O, before)
    layer = spectral_norm(nn.Linear(3, 2).double())
    layer.track_running_stats = False
    u, v = layer._vectors(layer.weight.detach(), layer.before_O)
    output = layer(torch.eye(3, dtype=torch.float64)).sum()
    (gradient,) = torch.autograd.grad(output, layer.weight)
    sigma = u @ layer.weight.detach() @ v
    by_hand = torch.ones(2, 3) / sigma - (layer.weight.sum() / sigma**2) * torch.outer(u, v)
    torch.testing.assert_close(gradient, by_hand.detach(), check_dtype=False)


# augmentation


def test_augmentation_does_what_it_says():
    x = torch.arange(16.0).view(1, 1, 4, 4).repeat(2, 3, 1, 1) / 16
    half, zero = torch.full((2,), 0.5), torch.zeros(2)
    torch.testing.assert_close(color(x, half, half, half), x)
    torch.testing.assert_close(color(x, zero, half, half), x - 0.5)
    big = torch.ones(2, 1, 16, 16)
    moved = translate(big, zero, half)  # two up
    assert torch.equal(moved[:, :, :14], big[:, :, :14]) and not moved[:, :, 14:].any()
    hole = cut_out(big, half, zero)
    assert hole.sum() == big.sum() - 2 * 8 * 4 and not hole[:, :, 4:12, :4].any()


def test_augmentation_draws_by_place_and_lets_gradients_through():
    x = torch.rand(64, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    kinds = ("color", "translation", "cutout")
    made = augment(x, kinds, KEY, 9, PLACES)
    torch.testing.assert_close(made[32:], augment(x[32:], kinds, KEY, 9, PLACES[32:]))
    assert not torch.equal(made, augment(x, kinds, KEY, 10, PLACES))
    assert augment(x, (), KEY, 9, PLACES) is x
    few = x[:2].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: augment(y, kinds, KEY, 9, PLACES[:2]), few)


# classes


def test_the_last_latents_choose_the_class():
    sampler = ByClass(cgan.Generator(latent=5, classes=3, hidden=(8, 8))).build(ImageSpec(1, 4))
    z_NL = with_classes(torch.randn(6, 8), torch.tensor([0, 1, 2, 2, 1, 0]), 3)
    label_N = torch.tensor([0, 1, 2, 2, 1, 0])
    sampler.eval()
    assert torch.equal(sampler(z_NL), sampler.generator(z_NL[:, :5], label_N))


def test_norm_by_class_scales_each_image_by_its_own():
    norm, x = ConditionalNorm(2, 3), torch.randn(4, 2, 3, 3)
    label_N = torch.tensor([0, 2, 1, 2])
    plain = nn.BatchNorm2d(2, affine=False)(x)
    torch.testing.assert_close(norm(x, label_N), plain)
    nn.init.normal_(norm.scale_KC)
    nn.init.normal_(norm.shift_KC)
    for image, label in enumerate(label_N):
        scale, shift = (t[label].view(2, 1, 1) for t in (norm.scale_KC, norm.shift_KC))
        torch.testing.assert_close(norm(x, label_N)[image], plain[image] * scale + shift)


@pytest.mark.parametrize(
    ("classes", "remedy"),
    [(7, "give --generator.classes 7 --discriminator.classes 7"), (0, "take a labelled dataset")],
)
def test_classes_that_the_dataset_has_not_are_refused(classes, remedy):
    with pytest.raises(ValueError, match=remedy):
        recipes.check_classes(recipes.load("cgan_mnist"), classes)
    recipes.check_classes(recipes.load("cgan_mnist"), 10)
    recipes.check_classes(recipes.load("dcgan_mnist"), classes)


# attention


def test_attention_begins_as_nothing_and_its_weights_are_what_it_takes():
    layer, x = sagan.Attention(16), torch.randn(2, 16, 4, 4)
    assert torch.equal(layer(x), x)
    layer.gamma.data.fill_(0.5)
    query, key, value = layer.parts(x)
    assert (query.shape, key.shape, value.shape) == ((2, 16, 2), (2, 4, 2), (2, 4, 8))
    weights = layer.weights(x)
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 16))
    taken = (weights @ value).mT.unflatten(2, (4, 4))
    torch.testing.assert_close(layer(x), x + 0.5 * layer.out(taken))


def test_attention_can_be_penalised():
    critic = sagan.Discriminator(width=4).build(ImageSpec(1, 16))
    for module in critic.modules():
        if isinstance(module, sagan.Attention):
            module.gamma.data.fill_(1.0)
    critic = spectral_norm(critic)
    x, alpha_N = torch.randn(3, 1, 16, 16), torch.tensor([0.1, 0.5, 0.9])
    gradient_penalty(critic, x, -x, alpha_N).backward()
    assert all(p.grad.isfinite().all() for p in critic.parameters() if p.grad is not None)
    assert sum(isinstance(m, Normalised) for m in critic.modules()) == len(
        [m for m in critic.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)]
    )


# sizes


def count(network, channels, resolution) -> int:
    return sum(p.numel() for p in network.build(ImageSpec(channels, resolution)).parameters())


def conv(before: int, after: int, kernel: int, bias: bool = True) -> int:
    return before * after * kernel**2 + bias * after


def linear(before: int, after: int) -> int:
    return before * after + after


def test_sizes_of_the_conditional_pair():
    """PyTorch-GAN, implementations/cgan/cgan.py, 32x32, embeddings of 10 classes."""
    units = [110, 128, 256, 512, 1024]
    body = sum(linear(a, b) for a, b in pairwise(units))
    norms = 2 * (256 + 512 + 1024)
    assert count(cgan.Generator(), 1, 32) == 100 + body + norms + linear(1024, 1024)
    judge = linear(1034, 512) + 2 * linear(512, 512) + linear(512, 1)
    assert count(cgan.Discriminator(), 1, 32) == 100 + judge


def test_sizes_of_wgan_gp_for_cifar():
    """improved_wgan_training, gan_cifar_resnet.py: DIM_G = DIM_D = 128, without labels; the first
    convolution of a normalised block has no bias here, as in gan_64x64.py."""
    wide = conv(128, 128, 3)
    up = 4 * 128 + conv(128, 128, 3, bias=False) + wide + conv(128, 128, 1)
    generator = linear(128, 4 * 4 * 128) + 3 * up + 2 * 128 + conv(128, 3, 3)
    assert count(residual.Generator(width=128, growing=False), 3, 32) == generator
    first = conv(3, 128, 3) + wide + conv(3, 128, 1)
    critic = first + (2 * wide + conv(128, 128, 1)) + 2 * (2 * wide) + linear(128, 1)
    assert count(residual.FlatCritic(), 3, 32) == critic


def test_sizes_of_wgan_gp_for_64():
    """improved_wgan_training, gan_64x64.py: GoodGenerator, GoodDiscriminator, DIM 64."""
    widths = [512, 512, 256, 128, 64]
    generator = linear(128, 4 * 4 * 512) + 2 * 64 + conv(64, 3, 3)
    critic = conv(3, 64, 3) + linear(4 * 4 * 512, 1)
    for a, b in pairwise(widths):
        generator += 2 * a + conv(a, b, 3, bias=False) + 2 * b + conv(b, b, 3) + conv(a, b, 1)
        critic += 2 * b + conv(b, b, 3, bias=False) + 2 * b + conv(b, a, 3) + conv(b, a, 1)
    assert count(residual.Generator(), 3, 64) == generator
    assert count(residual.Critic(), 3, 64) == critic


def test_sizes_of_sagan_at_128():
    """self-attention-gan, generator.py and discriminator.py, without classes: 16, 16, 8, 4, 2, 1
    times 64 channels, attention at 32x32 with C/8, C/8, C/2 channels and its gain."""

    def attention(width: int) -> int:
        return 2 * conv(width, width // 8, 1, False) + 2 * conv(width, width // 2, 1, False) + 1

    widths = [1024, 1024, 512, 256, 128, 64]
    generator = linear(128, 4 * 4 * 1024) + attention(256) + 2 * 64 + conv(64, 3, 3)
    for a, b in pairwise(widths):
        generator += 2 * a + conv(a, b, 3) + 2 * b + conv(b, b, 3) + conv(a, b, 1)
    assert count(sagan.Generator(), 3, 128) == generator
    critic = conv(3, 64, 3) + conv(64, 64, 3) + conv(3, 64, 1) + attention(128)
    for b, a in zip(widths[1:], widths, strict=False):
        if a != b:
            critic += conv(b, a, 3) + conv(a, a, 3) + conv(b, a, 1)
    critic += 2 * conv(1024, 1024, 3) + linear(1024, 1)
    assert count(sagan.Discriminator(), 3, 128) == critic


def test_maps_show_what_a_place_takes():
    generator = sagan.Generator(latent=6, width=4).build(ImageSpec(3, 16)).eval()
    z_NL, made = torch.randn(2, 6), []
    picture = attention.drawn(generator, lambda: made.append(generator(z_NL)) or made[0])
    assert picture.shape == (2 * attention.COLUMNS, 3, 16, 16)
    assert picture.min() >= -1 and picture.max() <= 1
    assert torch.equal(picture[:: attention.COLUMNS], made[0])
    down, right = (int(16 * share) for share in attention.ASKING[0])
    assert picture[1, :, down, right].tolist() == [-1, 1, -1]
    with pytest.raises(ValueError, match="--attention is for self-attention GANs"):
        attention.layer_of(nn.Linear(1, 1))
