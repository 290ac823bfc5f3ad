"""What the playground does with a model: same pictures for a seed, and nothing that is too much."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.session import build_networks
from engine.studio import NO_TRUNCATION, Refused, Studio, prune, truncate
from engine.trained import Trained
from tests.runs import toy

HUGE = 10**9


def model(name: str) -> Trained:
    """A toy model that was never trained."""
    recipe = toy(name)[0]
    networks = build_networks(recipe)
    for network in networks.values():
        network.eval().requires_grad_(False)
    return Trained(
        name=name,
        images=8,
        averaged=False,
        device=torch.device("cpu"),
        checkpoint="0" * 64,
        recipe=recipe,
        networks=networks,
        index={},
    )


@pytest.fixture
def gan(tmp_path) -> Studio:
    return Studio(model("dcgan_digits"), tmp_path, 64, 1 << 20)


@pytest.fixture
def vae(tmp_path) -> Studio:
    return Studio(model("vae_mnist"), tmp_path, 64, 1 << 20)


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_a_seed_gives_the_same_picture_again_and_others_give_others(gan):
    paths = [gan.samples(seed, 9, NO_TRUNCATION).files[0] for seed in (3, 4)]
    first, other = map(picture, paths)
    assert not np.array_equal(first, other) and paths[0] != paths[1]
    paths[0].unlink()
    assert np.array_equal(picture(gan.samples(3.0, 9, 4).files[0]), first)
    assert Image.open(paths[0]).text["Saddle seed"] == "3"


def test_samples_are_those_of_the_sampling_command(gan, tmp_path):
    """Image k of a seed is the same here and there, up to the rounding of another batch size."""
    from engine import pictures

    made = picture(gan.samples(1, 20, NO_TRUNCATION).files[0])
    whole = pictures.grid(torch.cat(list(gan.model.samples(1, 20, 64))))
    assert np.abs(made - np.asarray(whole)).max() <= 1


def test_truncation_keeps_latents_within_the_bound_and_their_distribution():
    z_NL = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    assert truncate(z_NL, NO_TRUNCATION) is z_NL
    for bound in (0.1, 0.5, 2.0):
        cut_NL = truncate(z_NL, bound)
        assert cut_NL.dtype == z_NL.dtype and cut_NL.abs().max() <= bound
        redrawn = torch.randn(400_000, generator=torch.Generator().manual_seed(1))
        redrawn = redrawn[redrawn.abs() <= bound]
        assert abs(cut_NL.std() / redrawn.std() - 1) < 0.03 and abs(cut_NL.mean()) < 0.02
        order = z_NL.flatten().argsort()
        assert (cut_NL.flatten()[order].diff() >= 0).all()
    usual_NL = z_NL.clamp(-3, 3)  # the last values before the bound are moved most
    assert torch.allclose(truncate(usual_NL, 3.99), usual_NL, atol=0.03)


def test_truncated_samples_are_other_pictures_under_another_name(gan):
    whole, cut = gan.samples(0, 4, 4).files[0], gan.samples(0, 4, 0.5).files[0]
    assert whole != cut and not np.array_equal(picture(whole), picture(cut))


def test_a_walk_goes_from_one_seed_to_the_other_and_back(gan):
    motion, strip = gan.walk(0, 1, 6).files
    animation = Image.open(motion)
    assert animation.n_frames == 10 and animation.info["loop"] == 0
    assert strip.suffix == ".png" and Image.open(strip).width >= 900
    ends = [gan._decode(gan.latents(seed, 1)) for seed in (0, 1)]
    frames = []
    for index in (0, 5):
        animation.seek(index)
        frames.append(np.asarray(animation.convert("L")).astype(float))
    for frame, end in zip(frames, ends, strict=True):
        side = end.shape[-1]
        small = frame.reshape(side, frame.shape[0] // side, side, -1).mean((1, 3))
        assert np.abs(small / 127.5 - 1 - end[0].mean(0).numpy()).max() < 0.1
    assert gan.walk(5, 5, 2).files  # from a seed to itself nothing moves


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1"])
def test_images_of_any_kind_are_reconstructed(kind, mode, vae, tmp_path):
    if (kind, mode) in {("png", "CMYK"), ("bmp", "CMYK")} or (kind == "jpeg" and mode in "RGBAP"):
        mode = "RGB"
    file = tmp_path / f"mine.{kind}"
    Image.new("RGB", (50, 30), (200, 30, 90)).convert(mode).save(file)
    (path,) = vae.reconstruct(str(file)).files
    assert Image.open(path).width > Image.open(path).height
    assert "compositeWithTrained" in Image.open(path).text["DigitalSourceType"]


def test_two_reconstructions_do_not_share_a_name(vae, tmp_path):
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    names = {vae.reconstruct(str(tmp_path / "a.png")).files[0] for _ in range(3)}
    assert len(names) == 3


@pytest.mark.parametrize(
    "count", [0, -1, 65, HUGE, 1.5, float("nan"), float("inf"), "4", None, True, [4], {}]
)
def test_a_number_of_images_that_is_none_or_too_large_is_refused(count, gan):
    with pytest.raises(Refused, match="number of images"):
        gan.samples(0, count, 4)
    with pytest.raises(Refused, match="number of pictures"):
        gan.walk(0, 1, count)


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30, 0.5, "0", None, float("nan")])
def test_what_is_no_seed_is_refused(seed, gan, tmp_path):
    for attempt in (lambda: gan.samples(seed, 1, 4), lambda: gan.walk(0, seed, 3)):
        with pytest.raises(Refused, match="seed"):
            attempt()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bound", [0, -1, 5, "1", None, float("nan")])
def test_what_is_no_truncation_is_refused(bound, gan):
    with pytest.raises(Refused, match="truncation"):
        gan.samples(0, 1, bound)


def test_large_images_lower_the_limit(tmp_path):
    large = model("dcgan_digits")
    object.__setattr__(large.recipe.data, "resolution", 2048)
    assert Studio(large, tmp_path, 64, 1).limit == 8


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read"),
        (b"not an image", "cannot be read"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "cannot be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read"),
        (bomb(8000, 8000), "64 million pixels"),
        (bomb(20_000, 20_000), "too many pixels; at most 34 million"),  # PIL's own limit
        (bomb(60_000, 60_000), "too many pixels; at most 34 million"),
        (bytes((1 << 20) + 1), "larger than 1 MB"),
    ],
)
def test_files_that_are_no_images_or_too_large_are_refused(content, said, vae, tmp_path):
    (tmp_path / "mine.png").write_bytes(content)
    with pytest.raises(Refused, match=said):
        vae.reconstruct(str(tmp_path / "mine.png"))
    with pytest.raises(Refused, match="choose an image"):
        vae.reconstruct(None)


def test_a_photo_is_turned_as_its_camera_says(vae, tmp_path):
    photo = Image.new("L", (40, 40))
    photo.paste(255, (0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    photo.save(tmp_path / "mine.png", exif=exif)
    turned = vae._read(tmp_path / "mine.png")[0, 0]
    assert turned[:, -5:].min() > 0.9 and turned[:, :5].max() < -0.9


def test_images_that_are_not_numbers_are_named(gan, vae, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Trained, "forward", lambda self, z_NL: torch.full((len(z_NL), 1, 8, 8), torch.nan)
    )
    assert "4 hold values that are not a number" in gan.samples(0, 4, 4).text
    assert "not a number" in gan.walk(0, 1, 3).text


def test_a_model_is_asked_what_it_can_do(gan, vae):
    gan.try_out()
    vae.try_out()
    vae.try_reconstructing()
    with pytest.raises(ValueError, match="does not reconstruct"):
        gan.try_reconstructing()


def test_only_the_newest_files_stay(tmp_path):
    for age in range(6):
        path = tmp_path / f"sub{age % 2}" / f"{age}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
        os.utime(path, (1000 - age, 1000 - age))
    prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.rglob("*.png")) == ["0.png", "1.png"]
