"""SRGAN: sizes, one update against a plain reference, both phases, tiles, benchmark figures."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.models import vgg as theirs

from engine import evaluate, session, train, translate
from engine.compile import Compiler
from engine.describe import parameters
from engine.metrics.pairs import PSNR_CAP
from engine.metrics.super_resolution import BenchmarkEvaluator, luminance, nearness, original
from engine.networks import srgan
from engine.networks.spec import ImageSpec
from engine.networks.vgg import Vgg19, read_vgg
from engine.pictures import grid
from engine.recipe import load
from engine.session import build_networks
from engine.steps.super_resolution import bicubic
from engine.tiles import check_side, in_tiles
from engine.translation import Translation
from pipelines.batch import Batch
from pipelines.finish import smaller
from pipelines.images import BadImage
from tests import forked
from tests.players import CPU, FP32, RANKS, moved, weights
from tests.runs import QUICK, differences, final_state, pair_of, run_folder, toy
from tests.trained import refused_by, trained

EPS = 1e-3
COLOUR = ImageSpec(3, 96, scale=4)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


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


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("runs"), "srgan_x4", *toy("srgan_x4")[1])


def random_network():
    """A generator whose norms have seen something, and how it takes images."""
    sizes = srgan.Generator(width=4, blocks=2)
    torch.manual_seed(0)
    network = sizes.build(COLOUR)
    network(noise(4, 3, 24, 24))
    return network.eval().requires_grad_(False), Translation(scale=4, reach=sizes.reach(4))


@pytest.mark.parametrize("size", [(50, 61), (16, 70), (7, 5)])
@pytest.mark.parametrize("side", [4, 16, 23])
def test_squares_give_the_pixels_of_the_whole_image(size, side):
    network, kind = random_network()
    image = noise(1, 3, *size)
    torch.testing.assert_close(
        in_tiles(network, image, kind, side), network(image), rtol=0, atol=1e-5
    )


def test_squares_that_see_less_would_show():
    network, kind = random_network()
    image = noise(1, 3, 40, 40)
    blind = replace(kind, reach=0)
    assert (in_tiles(network, image, blind, 16) - network(image)).abs().max() > 0.01


def test_squares_bound_what_is_computed_at_a_time():
    kind, seen = Translation(scale=1, reach=3), []

    def copied(part):
        seen.append(part.shape[2:])
        return part

    image = noise(1, 1, 100, 50)
    assert torch.equal(in_tiles(copied, image, kind, 10), image)
    assert len(seen) == 50 and max(max(shape) for shape in seen) == 16
    in_tiles(copied, image, kind, 0)
    assert seen[-1] == (100, 50)


def test_images_of_any_kind_and_size_are_enlarged(run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (13, 21, 4), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    sources = {
        "colour": picture.convert("RGB"),
        "grey": picture.convert("L"),
        "alpha": picture,
        "palette": picture.convert("RGB").convert("P"),
        "one": picture.convert("RGB").crop((0, 0, 1, 1)),
        "wide": picture.convert("RGB").resize((90, 3)),
    }
    (tmp_path / "in").mkdir()
    for name, image in sources.items():
        image.save(tmp_path / "in" / f"{name}.png")
    command = [str(run), str(tmp_path / "in"), "--device", "cpu", "--out"]
    for folder, more in (("whole", ["--tile", "0"]), ("tiles", ["--tile", "16"])):
        assert translate.main([*command, str(tmp_path / folder), *more]) == 0
    for name, image in sources.items():
        whole, tiles = (Image.open(tmp_path / f / f"{name}.png") for f in ("whole", "tiles"))
        assert whole.size == tiles.size == tuple(4 * side for side in image.size)
        apart = np.asarray(whole).astype(int) - np.asarray(tiles)
        assert abs(apart).max() <= 1  # rounding to levels
    image = original(tmp_path / "whole" / "grey.png", 3, 4)
    assert image.shape == (1, 3, 52, 84)


def test_wrong_commands_of_translate(run, tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    refused = refused_by(lambda *more: translate.main(list(map(str, more))))
    command = (run, tmp_path / "a.png", "--out", tmp_path / "out")
    assert "no two domains" in refused(capsys, 2, *command, "--direction", "BtoA")
    assert "--tile -1 must not" in refused(capsys, 2, *command, "--tile", "-1")
    with pytest.raises(ValueError, match="--tile is for models"):
        check_side(64, load("cyclegan_horse2zebra").step.translation(None))


def test_luminance_is_that_of_bt_601():
    colours = torch.tensor([[0, 0, 0], [255, 255, 255], [255, 0, 0]], dtype=torch.uint8)
    y = luminance(colours.view(3, 3, 1, 1)).flatten().tolist()
    assert y == pytest.approx([16, 235, 81.481])
    assert luminance(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)).item() == pytest.approx(235)


def test_psnr_is_that_computed_by_hand():
    goal = torch.full((1, 3, 24, 24), 100, dtype=torch.uint8)
    made = goal.clone()
    made[:, :, 4:20, 4:20] = 110  # ten levels of grey are 10 * 219 / 255 of Y
    found = nearness(made, goal, border=4)
    assert found["psnr_y"] == pytest.approx(20 * math.log10(255 / (10 * 219 / 255)))
    assert 0.9 < found["ssim_y"] < 1
    border = goal.clone()
    border[:, :, :4] = border[:, :, :, -4:] = 0
    assert nearness(border, goal, border=4) == pytest.approx({"psnr_y": PSNR_CAP, "ssim_y": 1})


def test_bicubic_is_that_of_pil():
    pixels = np.random.default_rng(1).integers(64, 192, (12, 9, 3), dtype=np.uint8)
    wanted = Image.fromarray(pixels).resize((36, 48), Image.Resampling.BICUBIC)
    given = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    made = grid(bicubic(given, (48, 36)), pad=0, least=0)
    assert abs(np.asarray(made).astype(int) - np.asarray(wanted)).max() <= 1


def test_benchmark_figures_stand_beside_bicubic(run, tmp_path):
    generator = np.random.default_rng(2)
    for name, mode, size in (("a", "RGB", (45, 38)), ("b", "L", (33, 50))):
        rough = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        (tmp_path / "Set").mkdir(exist_ok=True)
        rough.resize(size, Image.Resampling.BICUBIC).convert(mode).save(
            tmp_path / "Set" / f"{name}.png"
        )
    out = tmp_path / "out.json"
    folder = str(tmp_path / "Set")
    assert evaluate.main([str(run), "--sr", folder, "--device", "cpu", "--json", str(out)]) == 0
    (found,) = json.loads(out.read_text()).values()
    assert list(found["figures"]) == [
        f"Set {name}" for name in ("psnr_y", "ssim_y", "psnr_y_bicubic", "ssim_y_bicubic")
    ]
    assert found["figures"]["Set psnr_y_bicubic"] > found["figures"]["Set psnr_y"]  # untrained
    assert found["protocol"]["scale"] == 4 and "Set 2 images" in found["protocol"]["sets"]
    goal = original(tmp_path / "Set" / "a.png", 3, 4)
    assert goal.shape == (1, 3, 36, 44)
    assert smaller(goal, 4).shape == (1, 3, 9, 11)


def test_held_out_figures_stand_beside_bicubic(run, tmp_path):
    out = tmp_path / "out.json"
    assert evaluate.main([str(run), "--device", "cpu", "--json", str(out)]) == 0
    (found,) = json.loads(out.read_text()).values()
    assert {"psnr", "ssim", "psnr_bicubic", "ssim_bicubic"} == set(found["figures"])


def test_bad_benchmarks_are_one_clear_error(run, tmp_path, capsys):
    refused = refused_by(lambda *more: evaluate.main(list(map(str, more))))
    for name in ("empty", "small", "other/small"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("small", "other/small"):
        Image.new("RGB", (60, 18)).save(tmp_path / name / "a.png")
    assert "no such folder" in refused(capsys, 2, run, "--sr", tmp_path / "nowhere")
    assert "holds no images" in refused(capsys, 2, run, "--sr", tmp_path / "empty")
    two = (tmp_path / "small", tmp_path / "other" / "small")
    assert "two folders small" in refused(capsys, 2, run, "--sr", *two)
    assert "60x16 pixels are too few" in refused(capsys, 1, run, "--sr", tmp_path / "small")
    with pytest.raises(BadImage, match="at least 19"):
        original(tmp_path / "small" / "a.png", 3, 4)
    for other in ("dcgan_digits", "cyclegan_horse2zebra"):
        with pytest.raises(ValueError, match=r"--sr is for runs that enlarge"):
            BenchmarkEvaluator(load(other), (tmp_path / "small",), RANKS)
    assert "and alone" in refused(capsys, 2, run, "--sr", tmp_path, "--augmentation")


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
