"""Networks: shapes, published sizes, initial statistics, and errors that say what to do."""

from dataclasses import FrozenInstanceError, is_dataclass, replace

import pytest
import torch
from torch import nn

from engine.describe import parameters
from engine.networks import dcgan, mlp, vae
from engine.networks.point import FromPoint, ToPoint
from engine.networks.spec import ImageSpec, Network
from engine.recipe import load
from engine.session import build_networks

SIZES = [(r, c) for r in (16, 28, 32, 64) for c in (1, 3)]
DOUBLINGS = {16: 2, 28: 2, 32: 3, 64: 4}
ALL = [
    dcgan.Generator(),
    dcgan.Discriminator(),
    mlp.Generator(),
    mlp.Discriminator(),
    vae.Dense(),
    vae.Convolutional(),
]


def built(network: Network, resolution: int, channels: int) -> nn.Module:
    torch.manual_seed(0)
    return network.build(ImageSpec(channels, resolution))


def images(resolution: int, channels: int, count: int = 3) -> torch.Tensor:
    return torch.randn(count, channels, resolution, resolution)


# shapes


@pytest.mark.parametrize(("resolution", "channels"), SIZES)
@pytest.mark.parametrize(
    "network", [dcgan.Generator(latent=7, width=4), mlp.Generator(latent=7, hidden=(8, 6))]
)
def test_generators_make_images_in_range_from_latents(network, resolution, channels):
    x_NCHW = built(network, resolution, channels)(torch.randn(3, 7)).detach()
    assert x_NCHW.shape == (3, channels, resolution, resolution)
    assert float(x_NCHW.abs().max()) <= 1
    assert float(x_NCHW.flatten(1).std(dim=0).mean()) > 0


@pytest.mark.parametrize(("resolution", "channels"), SIZES)
@pytest.mark.parametrize(
    "network", [dcgan.Discriminator(width=4), mlp.Discriminator(channels=(4, 6))]
)
def test_discriminators_give_one_logit_per_image(network, resolution, channels):
    module = built(network, resolution, channels)
    assert module(images(resolution, channels)).shape == (3,)
    assert module.eval()(images(resolution, channels, 1)).shape == (1,)


@pytest.mark.parametrize(("resolution", "channels"), SIZES)
def test_autoencoders_give_mean_log_variance_and_images(resolution, channels):
    widths = (4,) * DOUBLINGS[resolution]
    for network in (vae.Dense(hidden=8, latent=5), vae.Convolutional(latent=5, widths=widths)):
        module = built(network, resolution, channels)
        mean_NL, log_variance_NL = module.encode(images(resolution, channels))
        assert mean_NL.shape == log_variance_NL.shape == (3, 5)
        assert module.decode(mean_NL).shape == (3, channels, resolution, resolution)


def test_autoencoders_give_float32_under_autocast():
    for network in (vae.Dense(8, 5), vae.Convolutional(5, (4, 4))):
        module = built(network, 16, 1)
        with torch.autocast("cpu", torch.bfloat16):
            mean_NL, log_variance_NL = module.encode(images(16, 1))
            assert mean_NL.dtype == log_variance_NL.dtype == torch.float32
            assert module.decode(mean_NL).dtype == torch.float32


@pytest.mark.parametrize(
    ("resolution", "smallest", "wanted"),
    [(64, 4, (4, 4)), (28, 4, (7, 2)), (32, 4, (4, 3)), (8, 4, (4, 1)), (96, 4, (6, 4))],
)
def test_stages_halve_a_resolution_down_to_a_base(resolution, smallest, wanted):
    assert dcgan.stages(resolution, smallest) == wanted


@pytest.mark.parametrize("resolution", [1, 4, 7, 30, 33, 100])
@pytest.mark.parametrize("network", [dcgan.Generator(), dcgan.Discriminator()])
def test_a_resolution_that_does_not_fit_is_named_with_ones_that_do(network, resolution):
    with pytest.raises(ValueError, match=rf"data\.resolution={resolution} .*try 16, 28, 32 or 64"):
        built(network, resolution, 1)
    for remedy in (16, 28, 32, 64):
        dcgan.stages(remedy)


@pytest.mark.parametrize("resolution", [7, 20, 28, 30])
def test_a_resolution_that_four_stages_cannot_halve_is_told_to_change_the_widths(resolution):
    with pytest.raises(ValueError, match=rf"data\.resolution={resolution}") as error:
        built(vae.Convolutional(widths=(4, 4, 4, 4)), resolution, 1)
    assert "widths" in str(error.value)
    assert f"try 16, {resolution}" not in str(error.value)


# sizes


def test_the_dcgan_pair_has_the_parameters_of_the_pytorch_tutorial():
    """https://docs.pytorch.org/tutorials/beginner/dcgan_faces_tutorial.html: its two networks."""
    generator = built(dcgan.Generator(latent=100, width=64), 64, 3)
    discriminator = built(dcgan.Discriminator(width=64), 64, 3)
    assert parameters(generator) == 3_576_704
    assert parameters(discriminator) == 2_765_568


def test_gan_mnist_has_the_parameters_counted_by_hand():
    networks = build_networks(load("gan_mnist"))
    layers = [(100, 256), (256, 512), (512, 1024)]
    hidden = sum(a * b + 2 * b for a, b in layers)  # no bias, BatchNorm
    assert parameters(networks["generator"]) == hidden + 1024 * 784 + 784
    convolutions = sum(a * b * 25 + b for a, b in [(1, 32), (32, 64), (64, 128)])
    assert parameters(networks["discriminator"]) == convolutions + 128 * 4 * 4 + 1


def test_vae_mnist_has_the_parameters_counted_by_hand():
    network = build_networks(load("vae_mnist"))["autoencoder"]
    encoder = 784 * 400 + 400 + 400 * 40 + 40
    decoder = 20 * 400 + 400 + 400 * 784 + 784
    assert parameters(network) == encoder + decoder == 652_824


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("ours", "library"), [(FromPoint, nn.ConvTranspose2d), (ToPoint, nn.Conv2d)]
)
def test_a_convolution_at_a_point_is_the_librarys(ours, library, channels_last):
    torch.manual_seed(0)
    layer, wanted = ours(6, 5, 4).double(), library(6, 5, 4, bias=False).double()
    wanted.load_state_dict(layer.state_dict())
    side = 1 if ours is FromPoint else 4
    x_NCHW = torch.randn(3, 6, side, side, dtype=torch.float64, requires_grad=True)
    if channels_last:
        layer, x_NCHW = (t.to(memory_format=torch.channels_last) for t in (layer, x_NCHW))
    out, right = layer(x_NCHW), wanted(x_NCHW)
    upstream = torch.randn_like(right)
    torch.testing.assert_close(out, right, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(out, [x_NCHW, layer.weight], upstream),
        torch.autograd.grad(right, [x_NCHW, wanted.weight], upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# initial values


def test_initial_weights_are_normal_with_standard_deviation_0_02():
    modules = [
        built(dcgan.Generator(), 32, 3),
        built(dcgan.Discriminator(), 32, 3),
        built(mlp.Discriminator(), 28, 1),
    ]
    seen = 0
    for module in (m for network in modules for m in network.modules()):
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            weight, seen = module.weight.detach(), seen + 1
            assert abs(float(weight.std()) - 0.02) < 5 * 0.02 / (2 * weight.numel()) ** 0.5
            assert abs(float(weight.mean())) < 5 * 0.02 / weight.numel() ** 0.5
        elif isinstance(module, nn.BatchNorm2d):
            scale = module.weight.detach()
            assert abs(float(scale.mean()) - 1) < 5 * 0.02 / len(scale) ** 0.5
            assert abs(float(scale.std()) - 0.02) < 0.01
            assert not module.bias.any()
    assert seen == 12


def test_batchnorm_is_everywhere_but_at_the_generators_output_and_the_discriminators_ends():
    """Radford et al. 2016, section 3; the last convolution gives the logit."""
    generator = built(dcgan.Generator(width=4), 64, 3)
    discriminator = built(dcgan.Discriminator(width=4), 64, 3).layers
    assert [type(m).__name__ for m in generator if isinstance(m, nn.BatchNorm2d | nn.Tanh)] == (
        ["BatchNorm2d"] * 4 + ["Tanh"]
    )
    assert not isinstance(discriminator[1], nn.BatchNorm2d)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in discriminator) == 3
    for module in (*generator, *discriminator):
        assert getattr(module, "bias", None) is None or isinstance(module, nn.BatchNorm2d)


@pytest.mark.parametrize("network", [dcgan.Discriminator(4), mlp.Discriminator((4, 6))])
def test_an_untrained_discriminator_is_undecided(network):
    logits_N = built(network, 32, 3)(images(32, 3, 16))
    assert float(logits_N.detach().abs().max()) < 2


@pytest.mark.parametrize("network", ALL, ids=lambda n: f"{type(n).__module__}.{type(n).__name__}")
def test_sizes_are_frozen_dataclasses(network):
    assert is_dataclass(network) and hash(network) == hash(replace(network))
    name = next(iter(type(network).__dataclass_fields__))
    with pytest.raises(FrozenInstanceError):
        setattr(network, name, 3)


@pytest.mark.parametrize(
    "network",
    [
        *(dcgan.Generator(6, 4), dcgan.Discriminator(4)),
        *(mlp.Generator(6, (5, 5)), mlp.Discriminator((4, 4))),
        *(vae.Dense(8, 6), vae.Convolutional(6, (4, 4))),
    ],
    ids=lambda n: f"{type(n).__module__}.{type(n).__name__}",
)
def test_a_gradient_reaches_every_parameter(network):
    module = built(network, 16, 1)
    if hasattr(module, "encode"):
        mean_NL, log_variance_NL = module.encode(images(16, 1))
        out = module.decode(mean_NL + (0.5 * log_variance_NL).exp())
    else:
        out = module(torch.randn(3, 6) if hasattr(network, "latent") else images(16, 1))
    out.square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("name", ["dcgan_digits", "vae_mnist"])
def test_networks_are_a_function_of_the_seed(name):
    recipe = load(name)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    networks = build_networks(recipe)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    again, other = build_networks(recipe), build_networks(replace(recipe, seed=1))
    for player, network in networks.items():
        state, changed = network.state_dict(), other[player].state_dict()
        for key, tensor in again[player].state_dict().items():
            assert torch.equal(tensor, state[key])
        assert any(not torch.equal(state[key], changed[key]) for key in state)
