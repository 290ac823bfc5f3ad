"""engine.translate --mask: known pixels to the last bit, 8-bit and 16-bit, and bad masks."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from engine import repair, translate
from engine.recipe import load
from engine.repair import Picture
from pipelines.images import BadImage
from tests.runs import toy
from tests.trained import refused_by, trained

refused = refused_by(lambda *arguments: translate.main([str(a) for a in arguments]))
WINDOW = (1000, 33000)
SIZE = 37, 30  # width, height: no multiples of four


def scans(folder: Path, count: int, size: tuple[int, int], suffix: str = "png") -> Path:
    """16-bit grey images: slopes of their own, values beyond the window too."""
    folder.mkdir()
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    for i in range(count):
        values = 700 + (x * (i % 7 + 1) * 150 + y * (i % 5 + 1) * 170) % 34001
        Image.fromarray(values.astype(np.uint16)).save(folder / f"{i:02}.{suffix}")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """In colour, of the recipe at toy size."""
    return trained(tmp_path_factory.mktemp("runs"), "inpaint_celeba", *toy("inpaint_celeba")[1])


@pytest.fixture(scope="module")
def grey_run(tmp_path_factory) -> Path:
    """Trained on 16-bit grey images."""
    folder = tmp_path_factory.mktemp("grey")
    images = scans(folder / "scans", 20, (32, 32))
    flags = toy("inpaint_celeba")[1]
    flags[flags.index("--data.name") + 1] = "folder"
    flags += ["--data.path", str(images), "--data.channels", "1"]
    flags += ["--data.window", *map(str, WINDOW)]
    return trained(folder, "inpaint_celeba", *flags)


@pytest.fixture
def hole() -> np.ndarray:
    hole_HW = np.zeros(SIZE[::-1], bool)
    hole_HW[12:, 20:33] = True
    return hole_HW


@pytest.fixture
def mask(tmp_path, hole) -> Path:
    path = tmp_path / "mask.png"
    Image.fromarray(hole.astype(np.uint8) * 255).save(path)
    return path


def noise(path: Path, mode: str, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(exist_ok=True)
    values = np.random.default_rng(0).integers(0, 256, (*size[::-1], 4), np.uint8)
    Image.fromarray(values).convert(mode).save(path)
    return path


def test_known_pixels_of_8_bits_stay_and_the_hole_does_not(run, mask, hole, tmp_path, capsys):
    given = noise(tmp_path / "in" / "a.png", "RGB")
    grey = noise(tmp_path / "in" / "b.bmp", "L")
    out = tmp_path / "out"
    command = [run, given.parent, "--mask", mask, "--out", out]
    assert translate.main([str(c) for c in command]) == 0
    assert "wrote 2 images" in capsys.readouterr().out
    for path in (given, grey):
        with Image.open(path) as image, Image.open(out / f"{path.stem}.png") as made:
            before, after = np.asarray(image.convert("RGB")), np.asarray(made)
            assert made.mode == "RGB" and made.size == SIZE
            assert "compositeWithTrainedAlgorithmicMedia" in str(made.info)
        assert np.array_equal(after[~hole], before[~hole])
        assert (after[hole] != before[hole]).any(1).mean() > 0.9


def test_what_is_in_the_hole_of_the_input_does_not_matter(run, mask, hole, tmp_path):
    made = []
    for shade in (0, 255):
        values = np.full((*SIZE[::-1], 3), 90, np.uint8)
        values[hole] = shade
        path = tmp_path / f"{shade}.png"
        Image.fromarray(values).save(path)
        command = [run, path, "--mask", mask, "--out", tmp_path / "out"]
        assert translate.main([str(c) for c in command]) == 0
        with Image.open(tmp_path / "out" / path.name) as image:
            made.append(np.asarray(image))
    assert np.array_equal(*made)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bits_stay_16_bits(grey_run, mask, hole, tmp_path, suffix):
    given = scans(tmp_path / "in", 3, SIZE, suffix)
    command = [grey_run, given, "--mask", mask, "--out", tmp_path / "out"]
    assert translate.main([str(c) for c in command]) == 0
    for path in given.iterdir():
        with Image.open(path) as image, Image.open(tmp_path / "out" / f"{path.stem}.png") as made:
            assert image.mode == made.mode == "I;16"
            before, after = np.asarray(image), np.asarray(made)
        assert np.array_equal(after[~hole], before[~hole])
        assert after[hole].min() >= WINDOW[0] and after[hole].max() <= WINDOW[1]
        assert (after[hole].astype(int) % 257 != 0).any()  # not 8 bits made wide


def test_8_bit_grey_through_a_model_of_one_channel_stays_grey(grey_run, mask, hole, tmp_path):
    given = noise(tmp_path / "in" / "a.png", "L")
    command = [grey_run, given, "--mask", mask, "--out", tmp_path / "out"]
    assert translate.main([str(c) for c in command]) == 0
    with Image.open(given) as image, Image.open(tmp_path / "out" / "a.png") as made:
        assert made.mode == "L"
        assert np.array_equal(np.asarray(made)[~hole], np.asarray(image)[~hole])


def test_values_are_those_that_the_network_was_trained_on(tmp_path):
    path = tmp_path / "a.png"
    values = np.array([[1000, 33000, 17000, 65535, 0, 9000]], np.uint16)
    Image.fromarray(values).save(path)
    seen = Picture.read(path, 1, WINDOW).images()
    torch.testing.assert_close(seen.flatten(), torch.tensor([-1.0, 1.0, 0.0, 1.0, -1.0, -0.5]))
    seen = Picture.read(path, 1, None)
    made = seen.filled(np.ones((1, 6), bool), seen.images()[0].permute(1, 2, 0).numpy())
    # float32 in [-1, 1] has a step of a hundredth of a value at most
    assert np.array_equal(np.asarray(made), values)


def test_wide_integers_are_taken_where_16_bits_hold_them(tmp_path):
    path = tmp_path / "a.tiff"
    Image.fromarray(np.array([[7, 65535]], np.int32)).save(path)
    assert Picture.read(path, 1, None).pixels_HWC.dtype == np.uint16
    Image.fromarray(np.array([[7, 65536]], np.int32)).save(path)
    with pytest.raises(BadImage, match="outside of 0 to 65535"):
        Picture.read(path, 1, None)


def test_a_folder_has_a_mask_for_each_name(run, mask, hole, tmp_path, capsys):
    for name in ("a", "b"):
        noise(tmp_path / "in" / f"{name}.png", "RGB")
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.fromarray(hole).save(masks / "a.png")
    command = [run, tmp_path / "in", "--mask", masks, "--out", tmp_path / "out"]
    error = refused(capsys, 2, *command)
    assert f"has none for {tmp_path / 'in' / 'b.png'}" in error
    noise(masks / "b.jpg", "L")
    assert translate.main([str(c) for c in command]) == 0
    noise(masks / "b.png", "L")
    assert "masks of one name" in refused(capsys, 2, *command)
    (masks / "b.jpg").unlink()
    error = refused(capsys, 2, run, tmp_path / "in", "--mask", masks, "--out", masks)
    assert "would replace" in error


def test_bad_masks(run, mask, tmp_path, capsys):
    given = noise(tmp_path / "in" / "a.png", "RGB")
    command = (run, given, "--out", tmp_path / "out", "--mask")
    assert "no such file" in refused(capsys, 2, *command, tmp_path / "absent.png")
    error = refused(capsys, 2, *command, noise(tmp_path / "small.png", "L", (36, 30)))
    assert "36x30" in error and "37x30" in error and "image's size" in error
    for shade, word in ((1, "black all over (its largest value is 1 of"), (255, "white all over")):
        Image.new("L", SIZE, shade).save(tmp_path / "flat.png")
        assert word in refused(capsys, 2, *command, tmp_path / "flat.png")
    shown = Image.new("RGBA", SIZE, (255, 255, 255, 0))  # a white box on a transparent layer
    shown.paste((255, 255, 255, 255), (2, 3, 6, 5))
    shown.save(tmp_path / "layer.png")
    assert repair.read_hole(tmp_path / "layer.png").sum() == 4 * 2
    (tmp_path / "torn.png").write_bytes(b"no image")
    assert "torn.png" in refused(capsys, 1, *command, tmp_path / "torn.png")
    (tmp_path / "empty").mkdir()
    assert "has none for" in refused(capsys, 2, *command, tmp_path / "empty")
    assert not (tmp_path / "out").exists()


def test_bad_commands(run, grey_run, mask, tmp_path, capsys):
    given, out = noise(tmp_path / "in" / "a.png", "RGB"), ("--out", tmp_path / "out")
    assert "give --mask MASK" in refused(capsys, 2, run, given, *out)
    masked = (*out, "--mask", mask)
    assert "leave --direction" in refused(capsys, 2, run, given, *masked, "--direction", "AtoB")
    assert "--tile" in refused(capsys, 2, run, given, *masked, "--tile", "64")
    scan = scans(tmp_path / "scans", 1, SIZE) / "00.png"
    assert "--data.channels 1" in refused(capsys, 1, run, scan, *masked)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "b.png").write_bytes(b"no image")
    assert "b.png" in refused(capsys, 1, run, tmp_path / "torn", *masked)
    assert "would replace" in refused(capsys, 2, run, given, "--mask", mask, "--out", given.parent)


@pytest.mark.parametrize("name", ["srgan_x4", "cyclegan_horse2zebra", "dcgan_digits"])
def test_a_mask_is_for_models_that_repair(name):
    other = SimpleNamespace(name=name, recipe=load(name))
    repair.check_mask(other, None)
    with pytest.raises(ValueError, match=f"--mask is for models that repair .* {name}"):
        repair.check_mask(other, Path("mask.png"))


def test_a_network_that_makes_no_numbers_is_named(run, mask, tmp_path, monkeypatch, capsys):
    given = noise(tmp_path / "in" / "a.png", "RGB")
    kind = type(toy("inpaint_celeba")[0].step)
    monkeypatch.setattr(kind, "repair", lambda self, networks, x, hole: x * float("nan"))
    error = refused(capsys, 1, run, given, "--mask", mask, "--out", tmp_path / "out")
    assert "not a number" in error and not (tmp_path / "out").exists()


def test_any_mode_is_a_mask(tmp_path, hole):
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        Image.fromarray(hole.astype(np.uint8) * 255).convert(mode).save(tmp_path / "m.png")
        assert np.array_equal(repair.read_hole(tmp_path / "m.png"), hole), mode
