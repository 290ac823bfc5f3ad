"""Pictures: exact pixels, sizes, whole files, and where generated ones come from."""

import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine import pictures
from engine.origin import Origin

ORIGIN = Origin("a <recipe> & more, é", "5" * 64, 7, 12800)
SOURCE = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"


def test_bytes_survive_the_way_through_the_networks_range(tmp_path: Path) -> None:
    bytes_1HW = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    (path,) = pictures.save_each((bytes_1HW.float() / 127.5 - 1)[None], tmp_path)
    assert np.array_equal(np.asarray(Image.open(path)), bytes_1HW[0].numpy())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grid_enlarges_by_a_whole_nearest_factor(channels: int, dtype: torch.dtype) -> None:
    images_NCHW = torch.rand(6, channels, 8, 8).mul(2).sub(1).to(dtype)
    picture = pictures.grid(images_NCHW.to(memory_format=torch.channels_last), columns=3, pad=2)
    # 3 x 8 pixels to at least 512 - 8 of padding is a factor of 21
    assert picture.size == (3 * (8 * 21 + 2) + 2, 2 * (8 * 21 + 2) + 2)
    assert picture.mode == "RGB"
    second = np.asarray(picture)[2 : 2 + 168, 2 + 170 : 2 + 170 + 168]
    expected = ((images_NCHW[1].float() + 1) * 127.5).round().byte().expand(3, 8, 8)
    expected = expected.permute(1, 2, 0).numpy().repeat(21, axis=0).repeat(21, axis=1)
    assert np.array_equal(second, expected)


def test_grid_is_a_square_by_default_and_large_images_keep_their_size() -> None:
    assert pictures.grid(torch.zeros(10, 3, 200, 200), pad=2).size == (4 * 202 + 2, 3 * 202 + 2)
    assert pictures.grid(torch.zeros(1, 3, 600, 600), pad=2).size == (604, 604)
    assert pictures.strip(torch.zeros(5, 1, 128, 128), pad=2).size == (5 * 130 + 2, 132)


def test_values_outside_are_clamped_and_not_numbers_are_magenta() -> None:
    row_W = torch.tensor([-7.0, 7.0, float("nan"), float("inf")])
    picture = np.asarray(pictures.grid(row_W.view(1, 1, 1, 4), pad=0, least=4))
    assert picture[0].tolist() == [[0, 0, 0], [255] * 3, [255, 0, 255], [255] * 3]


def test_single_files_keep_their_size_and_count_on(tmp_path: Path) -> None:
    pictures.save_each(torch.zeros(2, 1, 5, 7), tmp_path)
    pictures.save_each(torch.zeros(2, 3, 5, 7), tmp_path, first=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00000.png", "00001.png", "00002.png", "00003.png"]
    assert [Image.open(tmp_path / name).mode for name in names] == ["L", "L", "RGB", "RGB"]
    assert Image.open(tmp_path / names[0]).size == (7, 5)


def test_single_files_refuse_what_is_not_a_number(tmp_path: Path) -> None:
    images_NCHW = torch.zeros(4, 3, 2, 2)
    images_NCHW[2, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="1 of 4 images"):
        pictures.save_each(images_NCHW, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 8, 8), (0, 3, 8, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected images of shape"):
        pictures.grid(torch.zeros(shape))


def test_animation_keeps_frames_and_time(tmp_path: Path) -> None:
    frames_NCHW = torch.linspace(-1, 1, 4).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    pictures.gif(frames_NCHW, tmp_path / "a.gif", ms=120)
    grids = [pictures.grid(frame[None].expand(4, -1, -1, -1)) for frame in frames_NCHW]
    pictures.gif(grids, tmp_path / "b.gif", ms=120)
    for name, size in (("a.gif", (256, 256)), ("b.gif", grids[0].size)):
        with Image.open(tmp_path / name) as animation:
            assert (animation.n_frames, animation.size) == (4, size)
            assert (animation.info["duration"], animation.info["loop"]) == (120, 0)
    with pytest.raises(ValueError, match="no frames"):
        pictures.gif([], tmp_path / "c.gif")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "grid.png"
    pictures.save(Image.new("RGB", (2, 2)), path)
    before = path.read_bytes()

    def full_disk(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        pictures.save(Image.new("RGB", (9, 9)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def source_type(packet: bytes | str) -> str:
    """What an XMP packet says of its picture's source."""
    return ElementTree.fromstring(packet).find(f".//{SOURCE}").text


def test_a_png_says_where_it_comes_from(tmp_path: Path) -> None:
    pictures.save(Image.new("RGB", (2, 2)), tmp_path / "a.png", ORIGIN)
    text = Image.open(tmp_path / "a.png").text
    packet = text.pop("XML:com.adobe.xmp")
    assert source_type(packet) == TYPES + "trainedAlgorithmicMedia"
    assert "&lt;recipe&gt; &amp; more, é" in packet
    assert text == {
        "Software": "Saddle",
        "Generated": "true",
        "DigitalSourceType": TYPES + "trainedAlgorithmicMedia",
        "Saddle recipe": "a <recipe> & more, é",
        "Saddle checkpoint": "5" * 64,
        "Saddle seed": "7",
        "Saddle images seen": "12800",
    }


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.webp"])
def test_other_formats_say_so_in_xmp(name: str, tmp_path: Path) -> None:
    pictures.save(Image.new("RGB", (8, 8)), tmp_path / name, ORIGIN)
    packet = Image.open(tmp_path / name).info["xmp"]
    assert source_type(packet) == TYPES + "trainedAlgorithmicMedia"
    assert b"Saddle seed: 7" in packet


def test_an_animation_says_so_in_its_comment(tmp_path: Path) -> None:
    pictures.gif(torch.zeros(2, 1, 4, 4), tmp_path / "a.gif", origin=ORIGIN)
    comment = Image.open(tmp_path / "a.gif").info["comment"].decode()
    assert "Generated: true" in comment and "Saddle checkpoint: 555" in comment


def test_single_files_say_their_number(tmp_path: Path) -> None:
    paths = pictures.save_each(torch.zeros(2, 3, 4, 4), tmp_path, 5, ORIGIN)
    assert [Image.open(path).text["Saddle image"] for path in paths] == ["5", "6"]


def test_pictures_with_real_images_among_them_say_so(tmp_path: Path) -> None:
    origin = Origin("vae_mnist", "5" * 64, 0, 64, composite=True)
    pictures.save(Image.new("RGB", (2, 2)), tmp_path / "a.png", origin)
    text = Image.open(tmp_path / "a.png").text
    assert text["DigitalSourceType"] == TYPES + "compositeWithTrainedAlgorithmicMedia"
    assert source_type(text["XML:com.adobe.xmp"]) == text["DigitalSourceType"]


def test_without_an_origin_nothing_is_marked(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.webp"):
        pictures.save(Image.new("RGB", (2, 2)), tmp_path / name)
        information = str(Image.open(tmp_path / name).info).lower()
        assert "generated" not in information and "saddle" not in information
