"""Two images at a time: unpaired domains, side-by-side pairs, tiles with a smaller twin; and their
random squares, mirror flips and captions, which go together."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kernels import philox
from pipelines.datasets import BadImage, DatasetMissing, NoSplit, find
from pipelines.finish import CORNER, FLIP, OTHER, smaller
from pipelines.order import Order
from pipelines.settings import Data
from tests.batches import KEY, some

REAL = os.environ.get("SADDLE_DATA")
needs_real_data = pytest.mark.skipif(not REAL, reason="SADDLE_DATA is not set: no real datasets")
RNG = np.random.default_rng(0)


def save(path: Path, width: int, height: int) -> np.ndarray:
    """A PNG of noise; its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def as_batch(pixels_NHWC: np.ndarray) -> torch.Tensor:
    """As the finishing step hands it out."""
    return (torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2).float() - 127.5) * (1 / 127.5)


@pytest.fixture
def unpaired(tmp_path):
    """trainA of 5 images, trainB of 7, all 12x12."""
    a = [save(tmp_path / "set" / "trainA" / f"{i}.png", 12, 12) for i in range(5)]
    b = [save(tmp_path / "set" / "trainB" / f"{i}.png", 12, 12) for i in range(7)]
    data = Data(name="unpaired", path=tmp_path / "set", cache=tmp_path / "cache", resolution=12)
    return replace(data, batch=4, workers=0), np.stack(a), np.stack(b)


@pytest.mark.parametrize("kind", ["resident", "torchvision"])
def test_each_domain_has_its_own_order_and_flips(unpaired, kind):
    data, a, b = unpaired
    data = replace(data, flip=True, pipeline=kind)
    assert find(data).images == 7 and find(data).note == "A: 5 images, B: 7, unpaired"
    for i, batch in enumerate(some(data, 6)):
        position = np.arange(4 * i, 4 * i + 4)
        for domain, (images, got) in enumerate(((a, batch.images_NCHW), (b, batch.pair_NCHW))):
            wanted = images[Order(len(images), 3, domain).rows(position)].copy()
            at = torch.from_numpy(position)
            flip = philox.uniform(KEY, FLIP + OTHER * domain, at, 1)[:, 0].numpy() < 0.5
            wanted[flip] = wanted[flip][:, :, ::-1]
            assert torch.equal(got, as_batch(wanted))
    assert Order(9, 3, 1).epoch(0).tolist() != Order(9, 3, 0).epoch(0).tolist()


def test_what_an_unpaired_set_lacks_is_said(unpaired, tmp_path):
    data = unpaired[0]
    with pytest.raises(NoSplit, match="no test images"):
        find(data, "test")
    for path in (data.path / "trainB").iterdir():
        path.unlink()
    with pytest.raises(DatasetMissing, match=r"trainB holds no images .*both domains"):
        find(data)
    with pytest.raises(DatasetMissing, match=r"trainA/ and trainB/"):
        find(replace(data, path=tmp_path / "none"))
    with pytest.raises(ValueError, match=r"unpaired needs --data\.path"):
        find(Data(name="unpaired"))


@pytest.mark.parametrize("kind", ["resident", "torchvision"])
def test_both_halves_of_a_pair_get_the_same_square_and_flip(tmp_path, kind):
    images = np.stack([save(tmp_path / "set" / "train" / f"{i}.png", 32, 16) for i in range(6)])
    data = Data(name="pairs", path=tmp_path / "set", cache=tmp_path / "cache", resolution=12)
    data = replace(data, load=16, flip=True, batch=6, workers=0, pipeline=kind)
    for i, batch in enumerate(some(data, 3)):
        rows = Order(6, 3).rows(np.arange(6 * i, 6 * i + 6))
        at = torch.arange(6 * i, 6 * i + 6)
        flip = philox.uniform(KEY, FLIP, at, 1)[:, 0] < 0.5
        corner = (philox.uniform(KEY, CORNER, at, 2) * 5).long()
        for j, row in enumerate(rows):
            top, left = corner[j].tolist()
            for shift, got in ((0, batch.images_NCHW[j]), (16, batch.pair_NCHW[j])):
                cut = images[row, top : top + 12, left + shift : left + shift + 12]
                wanted = as_batch((cut[:, ::-1] if flip[j] else cut)[None].copy())[0]
                assert torch.equal(got, wanted)


def test_an_image_that_is_no_pair_is_named(tmp_path):
    save(tmp_path / "0.png", 20, 16)
    with pytest.raises(BadImage, match=r"0\.png: 20x16 pixels are no pair"):
        find(Data(name="pairs", path=tmp_path, crop=10))
    dataset = find(Data(name="pairs", path=tmp_path))
    with pytest.raises(BadImage, match=r"0\.png: 20x16 pixels are no pair"):
        dataset.decode(0)


def test_tiles_cover_each_image_and_are_not_resized(tmp_path):
    large = save(tmp_path / "set" / "0.png", 30, 16)
    save(tmp_path / "set" / "1.png", 11, 40)  # too narrow for a tile
    exact = save(tmp_path / "set" / "2.png", 12, 12)
    dataset = find(Data(name="tiles", path=tmp_path / "set", resolution=12))
    assert len(dataset) == 7 and dataset.note.endswith("from 2 images; 1 smaller images left out")
    seen = np.zeros((16, 30), bool)
    for row in range(6):
        left, top, right, bottom = dataset.box(row)
        assert np.array_equal(dataset.decode(row), large[top:bottom, left:right])
        seen[top:bottom, left:right] = True
    assert seen.all() and np.array_equal(dataset.decode(6), exact)
    assert np.array_equal(pickle.loads(pickle.dumps(dataset)).decode(6), exact)
    with pytest.raises(ValueError, match=r"smaller than 64 pixels: .*--data\.resolution"):
        find(Data(name="tiles", path=tmp_path / "set", resolution=64))


def test_a_smaller_twin_is_made_of_the_very_square(tmp_path):
    for i in range(4):
        save(tmp_path / "set" / f"{i}.png", 24, 24)
    data = Data(name="tiles", path=tmp_path / "set", cache=tmp_path / "cache", resolution=16)
    data = replace(data, load=20, flip=True, scale=4, batch=4, workers=0)
    batch = some(data, 1)[0]
    assert batch.pair_NCHW.shape == (4, 3, 4, 4)
    assert torch.equal(batch.pair_NCHW, smaller(batch.images_NCHW, 4))
    levels = (batch.pair_NCHW * 127.5 + 127.5).round()
    assert torch.equal((levels - 127.5) * (1 / 127.5), batch.pair_NCHW)  # 256 levels, as in a file


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"load": 10}, r"--data\.load 10 is smaller than --data\.resolution 12"),
        ({"scale": 5}, r"--data\.scale 5 must .* divide --data\.resolution 12"),
        ({"scale": 1}, r"--data\.scale 1 must be at least 2"),
        ({"scale": 2}, r"--data\.scale makes a pair, and unpaired has one"),
        ({"window": (5, 5)}, r"--data\.window 5 5 must rise"),
    ],
)
def test_settings_that_cannot_be_are_named(unpaired, changes, said):
    with pytest.raises(ValueError, match=said):
        find(replace(unpaired[0], **changes))


def test_sixteen_bit_scans_are_windowed(tmp_path):
    scan = np.array([[0, 1000], [2500, 4000]], np.uint16)
    for name in ("scan.png", "scan.tif"):
        folder = tmp_path / name[-3:]
        folder.mkdir()
        Image.fromarray(scan).save(folder / name)
        data = Data(name="folder", path=folder, resolution=2, channels=1)
        assert find(data).decode(0)[..., 0].tolist() == [[0, 4], [10, 16]]
        windowed = find(replace(data, window=(1000, 4000))).decode(0)[..., 0]
        assert windowed.tolist() == [[0, 0], [128, 255]]
    signed = find(replace(data, window=(-1000, 3000))).decode(0)[..., 0]
    assert signed.tolist() == [[64, 128], [223, 255]]
    Image.fromarray(scan.astype(np.uint8)).save(folder / "scan.tif")
    with pytest.raises(ValueError, match=r"--data\.window is for 16-bit .*scan\.tif.*leave it out"):
        find(replace(data, window=(1000, 4000)))


@needs_real_data
@pytest.mark.parametrize("kind", ["torchvision", "dali", "ffcv"])
@pytest.mark.parametrize("name", ["horse2zebra", "style_transfer", "facades", "birds"])
def test_real_sets_through_all_pipelines(name, kind, tmp_path):
    if not (Path(REAL) / name).is_dir():
        pytest.skip(f"{name} is not in SADDLE_DATA={REAL}")
    data = Data(name=name, resolution=64, load=72, cache=tmp_path, flip=True, batch=16, workers=2)
    one, two = (some(replace(data, pipeline=each), 2) for each in ("resident", kind))
    for left, right in zip(one, two, strict=True):
        for part in ("images_NCHW", "pair_NCHW", "tokens_NL", "lengths_N"):
            a, b = getattr(left, part), getattr(right, part)
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), part
    assert (one[0].pair_NCHW is None) == (name == "birds")
    assert (one[0].tokens_NL is None) == (name != "birds")
    assert one[0].images_NCHW.std() > 0.2
