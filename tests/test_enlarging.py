"""Images are enlarged: in squares as in one piece, of any kind, with figures beside bicubic."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine import evaluate, translate
from engine.metrics.pairs import PSNR_CAP
from engine.metrics.super_resolution import BenchmarkEvaluator, luminance, nearness, original
from engine.networks import srgan
from engine.networks.spec import ImageSpec
from engine.pictures import grid
from engine.recipe import load
from engine.steps.super_resolution import bicubic
from engine.tiles import check_side, in_tiles
from engine.translation import Translation
from pipelines.finish import smaller
from pipelines.images import BadImage
from tests.images import noise
from tests.players import RANKS
from tests.runs import toy
from tests.trained import refused_by, trained

COLOUR = ImageSpec(3, 96, scale=4)


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
