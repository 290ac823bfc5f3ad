"""Classes left out of training: no pipeline, cache or picture shows them, and the test split does.

Each image is of one grey that is its number, odd numbers of the class that is left out.
"""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from engine.metrics import classifier
from engine.originals import originals
from engine.recipe import load, parse, total_images
from pipelines.beton import beton_path
from pipelines.datasets import find
from pipelines.pack import open_pack, pack_path
from pipelines.prepare import main as prepare
from pipelines.settings import Data
from tests.archives import png, write_zip
from tests.batches import clock_of, opened, some

KINDS = ("resident", "torchvision", "dali", "ffcv")
EVEN = list(range(0, 22, 2))


@pytest.fixture
def greys(tmp_path) -> Data:
    """22 images in two classes, without the second, at batch 4."""
    for split in ("train", "test"):
        for number in range(22):
            path = tmp_path / "set" / split / f"class{number % 2}" / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(10 * number))
    return Data(
        name="folder",
        path=tmp_path / "set",
        cache=tmp_path / "cache",
        resolution=8,
        batch=4,
        workers=0,
        without=(1,),
    )


def shown(data: Data, count: int) -> list[int]:
    """Numbers of the images in the first batches, whose labels are checked."""
    batches = some(data, count)
    labels = np.concatenate([batch.labels_N.numpy() for batch in batches])
    images = np.concatenate([batch.images_NCHW.numpy() for batch in batches])
    numbers = np.rint((images[:, 0, 4, 4] + 1) * 127.5 / 10).astype(int)
    assert (labels == numbers % 2).all()
    return numbers.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_no_pipeline_shows_them_and_an_epoch_is_of_the_others(greys, kind):
    data = replace(greys, pipeline=kind)
    numbers = shown(data, 11)  # four epochs of eleven
    assert all(sorted(numbers[i : i + 11]) == EVEN for i in range(0, 44, 11))
    assert numbers == shown(replace(greys, pipeline="resident"), 11)


def test_the_pipeline_of_noise_has_none_of_their_labels(greys):
    (batch,) = some(replace(greys, pipeline="synthetic", batch=16), 1)
    assert (batch.labels_N == 0).all()


def test_caches_of_the_whole_and_of_the_rest_are_kept_apart(greys):
    rest = replace(greys, pipeline="resident")
    whole = replace(rest, without=())
    other = replace(rest, without=(0,))
    for _ in range(2):  # made, then found
        assert set(shown(whole, 11)) == set(range(22))
        assert set(shown(rest, 11)) == set(EVEN)
        assert set(shown(other, 11)) == set(range(22)) - set(EVEN)
    paths = {pack_path(find(data), data) for data in (whole, rest, other)}
    assert len(paths) == len({beton_path(find(data), data) for data in (whole, rest, other)}) == 3


@pytest.mark.parametrize("kind", ["resident", "torchvision", "dali"])
def test_no_image_of_theirs_takes_the_place_of_a_corrupt_one(greys, kind):
    content = (greys.path / "train" / "class0" / "04.png").read_bytes()
    (greys.path / "train" / "class0" / "04.png").write_bytes(content[:40])
    data = replace(greys, pipeline=kind, on_error="skip")
    numbers = shown(data, 11)
    assert set(numbers) == set(EVEN) - {4}
    assert numbers.count(6) == 8  # the next that is good, four epochs


def test_files_in_an_archive_can_be_left_out(greys, tmp_path):
    members = {f"train/class{n % 2}/{n:02}.png": png(10 * n) for n in range(22)}
    path = write_zip(tmp_path / "set.zip", members)
    for kind in ("resident", "torchvision"):
        assert sorted(shown(replace(greys, path=path, pipeline=kind), 11)[:11]) == EVEN


@pytest.mark.parametrize("name", ["mnist", "synthetic"])
def test_arrays_and_computed_images_can_be_left_out(name, tmp_path, monkeypatch):
    if name == "mnist":
        pixels = np.arange(30, dtype=np.uint8).reshape(30, 1, 1).repeat(8, 1).repeat(8, 2)
        labels = np.arange(30, dtype=np.uint8) % 10
        for stem in ("train", "t10k"):
            write_idx(tmp_path / f"{stem}-images-idx3-ubyte", pixels)
            write_idx(tmp_path / f"{stem}-labels-idx1-ubyte", labels)
    path = tmp_path if name == "mnist" else None
    data = Data(name=name, path=path, cache=tmp_path, resolution=8, channels=1, without=(3, 7))
    whole, rest = find(replace(data, without=())), find(data)
    kept = np.flatnonzero(~np.isin(whole.labels, (3, 7)))
    assert len(rest) == rest.images == len(kept) == len(whole) * 8 // 10
    assert rest.classes == whole.classes  # numbers and names stay
    for row in (0, 3, len(rest) - 1):
        assert rest.labels[row] == whole.labels[kept[row]]
        assert np.array_equal(rest.decode(row), whole.decode(int(kept[row])))
        assert rest.describe(row) == whole.describe(int(kept[row]))
    assert "without class 3, 7" in rest.note
    assert set(find(data, "test").labels.tolist()) == set(range(10))


def write_idx(path, values: np.ndarray) -> None:
    """A file as MNIST's."""
    header = bytes([0, 0, 8, values.ndim])
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(header + sizes + values.tobytes())


def test_classes_that_are_left_are_balanced(greys):
    for path in sorted((greys.path / "train" / "class0").iterdir())[3:]:
        path.unlink()
    for number in range(3):
        path = greys.path / "train" / "class2" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number,) * 3).save(path)
    batches = some(replace(greys, balanced=True, pipeline="resident"), 6)
    labels = np.concatenate([batch.labels_N.numpy() for batch in batches])
    assert np.bincount(labels).tolist() == [12, 0, 12]


def test_held_out_images_are_of_all_classes_and_features_of_the_rest(greys):
    images_NCHW, label = originals(greys, 0, 22)
    assert (len(images_NCHW), label) == (22, "held-out images")
    assert len(find(greys, "test")) == 22
    assert find(greys).fingerprint() != find(replace(greys, without=())).fingerprint()
    assert classifier.settings(greys).without == ()  # the ruler is one for all


def test_the_length_in_epochs_counts_what_is_left(greys):
    given = parse("vae_mnist", ["--epochs", "2", "--data.batch", "4"]).recipe
    assert total_images(given, find(greys).images) == 24  # of 22, in whole batches
    assert load("vae_mnist").data.without == ()


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ((5,), r"--data\.without 5: folder has no class 5; it has 0 \(class0\), 1 \(class1\)"),
        ((1, -1), r"--data\.without 1 -1: folder has no class -1"),
        ((0, 1), r"--data\.without 0 1 leaves no class of folder"),
    ],
)
def test_classes_that_are_not_there_are_refused(greys, without, message):
    with pytest.raises(ValueError, match=message):
        find(replace(greys, without=without))


def test_without_classes_it_is_refused(tmp_path):
    data = Data(name="tiles", path=tmp_path, resolution=8, without=(0,))
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"--data\.without 0 needs classes, which tiles has not"):
        opened(data, clock_of(data))


def test_a_packed_cache_of_the_rest_holds_no_other_image(greys):
    pack = open_pack(find(greys), greys, pack_path(find(greys), greys), lambda _: None, False)
    assert sorted((pack.images_NHWC[:, 0, 0, 0] // 10).tolist()) == EVEN


def test_prepare_makes_the_cache_that_a_run_takes(greys, capsys):
    place = [str(greys.path), "--cache", str(greys.cache), "--resolution", "8", "--workers", "1"]
    assert prepare([*place, "--without", "1"]) == 0
    path = pack_path(find(greys), greys)
    assert path.exists() and f"packed: 11 images of folder in {path}" in capsys.readouterr().out
    assert prepare([*place, "--without", "7"]) == 2
    assert "--without 7: folder has no class 7" in capsys.readouterr().err
