"""SRGAN: sizes, one update against a plain reference, both phases, what VGG is taken."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import vgg as theirs

from engine import session, train
from engine.compile import Compiler
from engine.describe import parameters
from engine.networks import srgan
from engine.networks.spec import ImageSpec
from engine.networks.vgg import Vgg19, read_vgg
from engine.recipe import load
from engine.session import build_networks
from pipelines.batch import Batch
from tests import forked
from tests.images import noise
from tests.players import CPU, FP32, RANKS, moved, weights
from tests.runs import QUICK, differences, final_state, pair_of, run_folder, toy

EPS = 1e-3
COLOUR = ImageSpec(3, 96, scale=4)


@pytest.fixture(scope="module")
def layers() -> nn.Sequential:
    """torchvision's VGG19 up to conv5_4 and its ReLU, with weights of its own kind of scale."""
    torch.manual_seed(3)
    features = theirs.make_layers(theirs.cfgs["E"])[:36]
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return features


@pytest.fixture(scope="module")
def vgg_file(layers, tmp_path_factory) -> Path:
    """A file as torchvision's: other layers than ours are in it too."""
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    state = {f"features.{name}": value for name, value in layers.state_dict().items()}
    torch.save(state | {"classifier.0.bias": torch.zeros(4096)}, path)
    return path


def test_sizes_are_those_of_figure_4():
    """By hand: 9x9 and 3x3 convolutions of 64 channels, those before a BatchNorm without bias."""
    block = 2 * (64 * 64 * 9 + 128) + 1
    doubling = 64 * 256 * 9 + 256 + 1
    ends = 3 * 64 * 81 + 64 + 1 + 64 * 3 * 81 + 3
    generator = srgan.Generator().build(COLOUR)
    assert parameters(generator) == 16 * block + 64 * 64 * 9 + 128 + 2 * doubling + ends
    widths = [64, 64, 128, 128, 256, 256, 512, 512]
    convolutions = sum(a * b * 9 + 2 * b for a, b in pairwise(widths))
    dense = 512 * 6 * 6 * 1024 + 1024 + 1024 + 1
    critic = srgan.Discriminator().build(COLOUR)
    assert parameters(critic) == 3 * 64 * 9 + 64 + convolutions + dense
    # as Keras counts VGG19 without its dense layers
    assert parameters(Vgg19()) == 20_024_384


@pytest.mark.parametrize("side", [17, 32, 96, 100, 192])
def test_the_discriminator_takes_any_crop(side):
    critic = srgan.Discriminator(width=8, hidden=16).build(replace(COLOUR, resolution=side))
    assert critic(noise(2, 3, side, side)).shape == (2,)
    most = parameters(srgan.Discriminator(width=8, hidden=16).build(COLOUR))
    assert parameters(critic) <= most


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_reach_is_how_far_a_place_looks(scale):
    sizes = srgan.Generator(width=2, blocks=2)
    generator = sizes.build(replace(COLOUR, channels=1, scale=scale)).eval()
    for p in generator.parameters():  # nothing cancels
        nn.init.uniform_(p, 0.01, 0.02)
    side, seen = 64, []
    for place in range(32 * scale, 33 * scale):  # all that one given pixel becomes
        x = torch.ones(1, 1, side, side, requires_grad=True)
        generator(x)[0, 0, place].sum().backward()
        rows = x.grad[0, 0].any(1).nonzero().flatten()
        seen += [32 - int(rows[0]), int(rows[-1]) - 32]
    assert max(seen) == sizes.reach(scale)


def test_vgg_is_torchvisions(layers, vgg_file):
    images = noise(2, 3, 40, 36)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    with torch.no_grad():
        wanted = layers((images / 2 + 0.5 - mean) / std)
    torch.testing.assert_close(read_vgg(vgg_file, CPU)(images), wanted)
    assert wanted.shape == (2, 512, 2, 2) and wanted.any()


def small(**settings):
    """At toy size; a large epsilon, and a batch of two."""
    recipe = toy("srgan_x4")[0]
    players = {
        name: replace(player, optimizer=replace(player.optimizer, eps=EPS))
        for name, player in recipe.step.players().items()
    }
    step = replace(recipe.step, **players, **settings)
    return replace(recipe, data=replace(recipe.data, batch=2), step=step)


def started(recipe):
    live = session.start(recipe, RANKS, FP32, Compiler(False, "test"), 10**6)
    side = recipe.data.resolution
    images = noise(2, 3, side, side)
    return live, Batch(images, None, live.clock.position_N(), pair_of(recipe, images))


@pytest.mark.parametrize("given", [False, True])
def test_an_update_is_that_of_a_plain_reference(given, layers, vgg_file):
    """Losses and parameters of an adversarial iteration, with torch's own losses and Adam."""
    recipe = small(pretrain_steps=0, vgg=vgg_file if given else None, perceptual=0.5, pixels=0.25)
    live, batch = started(recipe)
    values = live.step(batch)

    networks = build_networks(recipe)
    G, D = networks["generator"].train(), networks["discriminator"].train()
    adam = {
        n: torch.optim.Adam(m.parameters(), 1e-4, (0.9, 0.999), EPS) for n, m in networks.items()
    }
    made, real = G(batch.pair_NCHW), batch.images_NCHW
    ones, zeros = torch.ones(2), torch.zeros(2)
    with torch.no_grad():
        shift = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        scale = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    see = (lambda x: layers((x / 2 + 0.5 - shift) / scale)) if given else D.features
    apart = (see(made) - see(real)).square().mean()
    fooling = F.binary_cross_entropy_with_logits(D(made), ones)
    loss = 0.5 * apart + 0.25 * (made - real).square().mean() + 1e-3 * fooling
    loss.backward()
    adam["generator"].step()
    D.zero_grad()
    judged = F.binary_cross_entropy_with_logits(D(real), ones)
    judged = judged + F.binary_cross_entropy_with_logits(D(made.detach()), zeros)
    judged.backward()
    adam["discriminator"].step()

    assert values["generator/loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert values["generator/features"].item() == pytest.approx(apart.item(), rel=1e-5)
    assert values["discriminator/loss"].item() == pytest.approx(judged.item(), rel=1e-5)
    assert "generator/made" not in values
    for name, module in networks.items():
        mine = dict(live.players[name].network.named_parameters())
        for path, wanted in module.named_parameters():
            torch.testing.assert_close(mine[path], wanted, rtol=1e-5, atol=1e-6, msg=path)


def test_at_first_the_generator_learns_alone_by_pixels():
    live, batch = started(small(pretrain_steps=1))
    G, D = (live.players[name].network for name in ("generator", "discriminator"))
    before = {name: weights(network) for name, network in (("G", G), ("D", D))}
    wanted = F.mse_loss(
        build_networks(live.recipe)["generator"](batch.pair_NCHW), batch.images_NCHW
    )
    values = live.step(batch)
    assert values["generator/loss"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert moved(G, before["G"]) and not moved(D, before["D"])
    live.clock.advance()
    assert "generator/adversarial" in live.step(batch)
    assert moved(D, before["D"])


def test_without_vgg_the_loss_is_said_to_be_another(vgg_file):
    step = load("srgan_x4").step
    assert "not the paper's loss" in step.notes()[0] and step.pixel_weight() == 1
    step = replace(step, vgg=vgg_file)
    assert "VGG19" in step.notes()[0] and step.pixel_weight() == 0
    assert replace(step, pixels=0.5).pixel_weight() == 0.5


def flags(*more: str) -> list[str]:
    """Of toy runs that come to the second phase after two steps."""
    given = [*toy("srgan_x4")[1], *QUICK, "--precision", "fp32", "--compile", "off"]
    given += ["--generator.eps", "1e-3", "--discriminator.eps", "1e-3", "--pretrain-steps", "2"]
    return [*given, *more]


def test_both_phases_go_on_exactly_and_on_two_ranks(tmp_path):
    parts = [str(tmp_path / name) for name in ("whole", "halves", "ranks")]
    said = forked.train("srgan_x4", *flags("--steps", "4", "--runs", parts[0]))
    assert "not the paper's loss" in said and "-m engine.translate" in said
    for steps in ("3", "4"):
        forked.train("srgan_x4", *flags("--steps", steps, "--runs", parts[1]))
    forked.train("srgan_x4", *flags("--steps", "4", "--runs", parts[2]), ranks=2)
    whole, halves, ranks = (final_state(run_folder(Path(p), "srgan_x4")) for p in parts)
    assert not differences(whole, halves)
    for path, value in whole.items():
        turned = 0.03 * float(value.abs().max()) if "/optimizer/" in path else 0.0
        torch.testing.assert_close(ranks[path], value, rtol=1e-3, atol=2e-5 + turned, msg=path)


def test_a_wrong_vgg_file_names_the_flag(tmp_path, vgg_file, layers):
    text, other, part = (tmp_path / name for name in ("text.pth", "other.pth", "part.safetensors"))
    text.write_text("no weights")
    torch.save({"weight": torch.zeros(3)}, other)
    state = {f"features.{name}": value for name, value in layers.state_dict().items()}
    safetensors.torch.save_file(state | {"features.2.weight": torch.zeros(64, 64, 1, 1)}, part)
    torch.save(nn.Linear(2, 2), module := tmp_path / "module.pth")
    for path, reason in {
        tmp_path / "none.pth": "there is no such file",
        text: "holds no state dict",
        module: "holds no state dict",
        other: r"not VGG19's \(features.0.weight is missing\)",
        part: r"features.2.weight is of shape \(64, 64, 1, 1\)",
    }.items():
        with pytest.raises(ValueError, match=rf"--vgg .*{path.name}.*{reason}"):
            read_vgg(path, CPU)
    safetensors.torch.save_file(state, part)
    assert read_vgg(part, CPU).features[0].weight.requires_grad is False


def test_settings_that_cannot_be_trained_with_are_refused(vgg_file, capsys):
    for more, words in {
        ("--data.scale", "64"): "--data.scale 64 must",  # of images of 32 pixels
        ("--vgg", "nowhere.pth"): "--vgg nowhere.pth: there is no such file",
        ("--data.resolution", "8", "--vgg", str(vgg_file)): "too small for --vgg",
    }.items():
        with pytest.raises(SystemExit) as left:
            train.main(["srgan_x4", *toy("srgan_x4")[1], *more])
        assert left.value.code == 2 and words in capsys.readouterr().err
    recipe = toy("srgan_x4")[0]
    with pytest.raises(ValueError, match=r"--data.scale 3 is no power of two"):
        recipe.step.check_data(replace(recipe.data, scale=3))
    with pytest.raises(ValueError, match=r"give --data.scale 4"):
        recipe.step.check_data(replace(recipe.data, scale=None))
    with pytest.raises(ValueError, match="--pretrain-steps -1 must not"):
        replace(recipe.step, pretrain_steps=-1).check()
    with pytest.raises(ValueError, match="at least 17"):
        recipe.step.discriminator.network.build(ImageSpec(3, 16))
