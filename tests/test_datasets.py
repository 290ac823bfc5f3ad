"""Datasets: every layout on tiny files, odd image modes, broken files, and what a user is told."""

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import datasets
from pipelines.datasets import BadImage, DatasetMissing, NoSplit, find
from pipelines.images import Unreadable, decode
from pipelines.settings import Data

REAL = os.environ.get("SADDLE_DATA")
needs_real_data = pytest.mark.skipif(not REAL, reason="SADDLE_DATA is not set: no real datasets")
RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    """Random uint8 pixels."""
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray | None = None) -> Path:
    """Write an image file, random 12x10 RGB unless told."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(10, 12, 3) if pixels is None else pixels).save(path)
    return path


def read(path: Path, channels: int) -> np.ndarray:
    """uint8 (H, W, C) of a file."""
    return decode(path.read_bytes(), str(path), channels)


def write_idx(path: Path, array: np.ndarray, packed: bool) -> None:
    """Write an idx file of unsigned bytes, gzipped or not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = head + array.tobytes()
    path.write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(tmp_path, name, packed):
    folder = tmp_path / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name] / "raw"
    end = ".gz" if packed else ""
    images, labels = noise(5, 28, 28), np.array([3, 1, 4, 1, 5], np.uint8)
    for stem in ("train", "t10k"):
        write_idx(folder / f"{stem}-images-idx3-ubyte{end}", images, packed)
        write_idx(folder / f"{stem}-labels-idx1-ubyte{end}", labels, packed)
    data = Data(name=name, root=tmp_path, resolution=28, channels=1)
    dataset = find(data)
    assert len(dataset) == 5 and dataset.note == "subset: 5 of 60,000 images"
    assert find(data, "test").note == "subset: 5 of 10,000 images"
    assert dataset.labels.dtype == np.int64 and dataset.labels.tolist() == [3, 1, 4, 1, 5]
    assert len(dataset.classes) == 10
    assert np.array_equal(dataset.decode(2), images[2][..., None])  # untouched at its own size
    colour = find(Data(name=name, path=folder, resolution=32, channels=3)).decode(2)
    assert colour.shape == (32, 32, 3) and np.array_equal(colour[..., 0], colour[..., 2])


def test_broken_idx_is_named(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte", noise(5, 28, 28), False)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", noise(5), True)
    data = Data(name="mnist", path=tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(labels.read_bytes()[:-9])
    with pytest.raises(BadImage, match=r"train-labels-idx1-ubyte\.gz"):
        find(data)
    images = tmp_path / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(BadImage, match=r"train-images-idx3-ubyte: 3,919 bytes .* needs 3,920"):
        find(data)


def write_cifar(folder: Path, protocol: int = 2) -> np.ndarray:
    """All six batch files of CIFAR-10 with three images each; returns the training images."""
    folder.mkdir(parents=True)
    images = noise(15, 3072)
    for i in range(5):
        batch = {"data": images[3 * i : 3 * i + 3], "labels": [i, i, 9]}
        (folder / f"data_batch_{i + 1}").write_bytes(pickle.dumps(batch, protocol))
    test = {"data": images[:3], "labels": [0, 1, 2]}
    (folder / "test_batch").write_bytes(pickle.dumps(test, protocol))
    return images


@pytest.mark.parametrize("place", ["cifar-10-batches-py", "cifar10/cifar-10-batches-py"])
def test_cifar_batches(tmp_path, place):
    images = write_cifar(tmp_path / place)
    data = Data(name="cifar10", root=tmp_path, resolution=32)
    dataset = find(data)
    assert len(dataset) == 15 and dataset.labels[:6].tolist() == [0, 0, 9, 1, 1, 9]
    assert dataset.classes[9] == "truck" and len(find(data, "test")) == 3
    assert np.array_equal(dataset.decode(4), images[4].reshape(3, 32, 32).transpose(1, 2, 0))


def test_cifar_unpickler_imports_nothing_but_arrays(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    write_cifar(tmp_path / "cifar")
    batch = pickle.dumps({"data": Attack(), "labels": []})
    (tmp_path / "cifar" / "data_batch_1").write_bytes(batch)
    with pytest.raises(BadImage, match=r"data_batch_1.*refused to load posix\.system"):
        find(Data(name="cifar10", path=tmp_path / "cifar"))
    assert not (tmp_path / "owned").exists()


def test_cifar_class_folders(tmp_path):
    for split in ("train", "test"):
        for name in ("airplane", "cat"):
            save(tmp_path / "cifar10" / split / name / "1.png", noise(32, 32, 3))
    data = Data(name="cifar10", root=tmp_path, resolution=32)
    dataset = find(data)
    assert dataset.labels.tolist() == [0, 1] and dataset.classes == ("airplane", "cat")
    assert dataset.note == "subset: 2 of 50,000 images"
    assert find(data, "test").describe(1).endswith("cifar10/test/cat/1.png")


PARTITION_TXT = "000001.jpg 0\n000002.jpg 1\n000003.jpg 2\n000004.jpg 0\n000009.jpg 0\n"
PARTITION_CSV = "image_id,partition\n" + PARTITION_TXT.replace(" ", ",")


@pytest.mark.parametrize("suffix", ["txt", "csv"])
@pytest.mark.parametrize("place", ["celeba", "", "celeba/img_align_celeba"])
def test_celeba_partitions(tmp_path, suffix, place):
    lists = tmp_path / ("celeba" if place else "")
    for number in range(1, 5):
        save(tmp_path / place / "img_align_celeba" / f"00000{number}.jpg")
    text = PARTITION_TXT if suffix == "txt" else PARTITION_CSV
    (lists / f"list_eval_partition.{suffix}").write_text(text)
    data = Data(name="celeba", root=tmp_path, resolution=8)
    train, test = find(data), find(data, "test")
    assert train.note == "subset: 4 of 202,599 images" and train.labels is None
    assert [Path(train.describe(i)).stem for i in range(len(train))] == ["000001", "000004"]
    assert [Path(test.describe(i)).stem for i in range(len(test))] == ["000003"]


ATTRIBUTES_TXT = (
    "3\nBald  Smiling Young\n000001.jpg -1  1 -1\n000002.jpg  1 -1 -1\n000003.jpg  1 1  1\n"
)
ATTRIBUTES_CSV = (
    "image_id,Bald,Smiling,Young\n000001.jpg,-1,1,-1\n000002.jpg,1,-1,-1\n000003.jpg,1,1,1\n"
)


@pytest.mark.parametrize(("suffix", "text"), [("txt", ATTRIBUTES_TXT), ("csv", ATTRIBUTES_CSV)])
def test_celeba_attributes(tmp_path, suffix, text):
    for number in (1, 3):
        save(tmp_path / "celeba" / "img_align_celeba" / f"00000{number}.jpg")
    (tmp_path / "celeba" / f"list_attr_celeba.{suffix}").write_text(text)
    data = Data(name="celeba", root=tmp_path, resolution=8)
    faces = find(data)
    assert faces.attribute_names == ("Bald", "Smiling", "Young")
    assert faces.attributes.tolist() == [[0, 1, 0], [1, 1, 1]]
    save(tmp_path / "celeba" / "img_align_celeba" / "000007.jpg")  # of which the list says nothing
    assert find(data).attributes is None


def test_celeba_without_lists(tmp_path):
    save(tmp_path / "faces" / "img_align_celeba" / "000001.jpg")
    for path in (tmp_path / "faces", tmp_path / "faces" / "img_align_celeba"):
        data = Data(name="celeba", path=path, resolution=8)
        assert len(find(data)) == 1
        with pytest.raises(NoSplit, match="no list_eval_partition"):
            find(data, "test")


def test_image_folders(tmp_path):
    flat, classes, splits = tmp_path / "flat", tmp_path / "classes", tmp_path / "splits"
    save(flat / "b.png"), save(flat / "a.JPG"), save(flat / "sub" / "c.webp")
    save(flat / ".hidden" / "d.png"), save(flat / "._a.jpg"), (flat / "notes.txt").touch()
    save(classes / "dog" / "deep" / "1.png"), save(classes / "train" / "2.png")
    save(splits / "train" / "x" / "1.png"), save(splits / "train" / "y" / "2.png")
    save(splits / "val" / "y" / "3.png"), save(splits / "val" / "x" / "4.png")

    def folder(path: Path) -> Data:
        return Data(name="folder", path=path)

    dataset = find(folder(flat))
    names = [os.path.relpath(dataset.describe(i), flat) for i in range(len(dataset))]
    assert names == ["a.JPG", "b.png", "sub/c.webp"] and dataset.labels is None
    dataset = find(folder(classes))
    assert dataset.classes == ("dog", "train") and dataset.labels.tolist() == [0, 1]
    assert find(folder(splits)).classes == ("x", "y") and len(find(folder(splits), "test")) == 2
    with pytest.raises(NoSplit, match="no test"):
        find(folder(classes), "test")


def test_links_that_lead_back_end(tmp_path):
    save(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert len(find(Data(name="folder", path=tmp_path))) == 1


def test_digits_and_synthetic():
    digits = find(Data(name="digits", resolution=16, channels=3))
    assert len(digits) == 1797 and digits.decode(0).shape == (16, 16, 3)
    small = find(Data(name="digits", resolution=8, channels=1))
    assert max(small.decode(i).max() for i in range(20)) == 255
    with pytest.raises(NoSplit, match="1,797"):
        find(Data(name="digits"), "test")
    for channels in (1, 3):
        data = Data(name="synthetic", resolution=20, channels=channels)
        train, test = find(data), find(data, "test")
        assert train.decode(7).shape == (20, 20, channels)
        assert np.array_equal(train.decode(7), find(data).decode(7))
        assert not np.array_equal(train.decode(7), test.decode(7))
        assert train.fingerprint() != test.fingerprint() and len(train.classes) == 10


def test_a_crop_that_cannot_be_is_found_at_once(tmp_path):
    save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"data\.crop=11"):
        find(Data(name="folder", path=tmp_path, crop=11))


def shades(tmp_path: Path) -> dict[str, tuple[Image.Image, tuple[int, int, int]]]:
    """One-coloured images of every mode, with the colour that they should come out as."""
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 250, 100, 50])
    clear = palette.copy()
    clear.info["transparency"] = 1
    key = Image.new("RGB", (4, 4), (9, 9, 9))
    key.info["transparency"] = (9, 9, 9)
    wide = np.full((4, 4), 25700, np.uint16)
    return {
        "L.png": (Image.new("L", (4, 4), 77), (77, 77, 77)),
        "1.png": (Image.new("1", (4, 4), 1), (255, 255, 255)),
        "LA.png": (Image.new("LA", (4, 4), (0, 0)), (255, 255, 255)),
        "RGB.png": (Image.new("RGB", (4, 4), (250, 100, 50)), (250, 100, 50)),
        "RGBA.png": (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), (255, 255, 255)),
        "half.png": (Image.new("RGBA", (4, 4), (0, 0, 0, 51)), (204, 204, 204)),
        "P.png": (palette, (250, 100, 50)),
        "clear.png": (clear, (255, 255, 255)),
        "key.png": (key, (255, 255, 255)),
        "16.png": (Image.fromarray(wide), (100, 100, 100)),
        "16.tif": (Image.fromarray(wide), (100, 100, 100)),
        "32.tif": (Image.fromarray(wide.astype(np.int32)), (100, 100, 100)),
        "CMYK.tif": (Image.new("CMYK", (4, 4), (0, 155, 205, 5)), (250, 98, 49)),
        "CMYK.jpg": (Image.new("CMYK", (16, 16), (0, 155, 205, 5)), (250, 98, 49)),
        "YCbCr.jpg": (Image.new("YCbCr", (16, 16), (90, 128, 128)), (90, 90, 90)),
    }


def test_every_mode_becomes_the_channels_asked_for(tmp_path):
    for name, (image, colour) in shades(tmp_path).items():
        image.save(tmp_path / name, **image.info)
        rgb = read(tmp_path / name, 3)
        assert rgb.shape[2] == 3 and np.abs(rgb[2, 2].astype(int) - colour).max() <= 2, name
        grey = read(tmp_path / name, 1)
        expected = np.dot(colour, (0.299, 0.587, 0.114))
        assert grey.shape[2] == 1 and abs(int(grey[2, 2, 0]) - expected) <= 2, name


def test_floating_point_images_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(BadImage, match=r"f\.tif.*no agreed range"):
        read(tmp_path / "f.tif", 3)


def test_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(6, 9, 3)).save(tmp_path / "e.jpg", exif=exif)
    assert read(tmp_path / "e.jpg", 3).shape == (6, 9, 3)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp", "gif"])
def test_truncated_images_raise(tmp_path, suffix):
    path = save(tmp_path / f"cut.{suffix}", noise(64, 64, 3))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadImage, match=f"cannot decode .*cut.{suffix}: "):
        read(path, 3)


def test_files_that_are_no_images_raise(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("hello " * 100)
    with pytest.raises(BadImage, match=r"empty\.jpg: the file is empty"):
        read(tmp_path / "empty.jpg", 3)
    with pytest.raises(BadImage, match=r"text\.jpg: not an image"):
        read(tmp_path / "text.jpg", 3)
    gone = find(Data(name="folder", path=tmp_path))
    (tmp_path / "text.jpg").unlink()
    with pytest.raises(Unreadable, match=r"text\.jpg: No such file .*did the data folder change"):
        gone.decode(1)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "celeba", "folder"])
def test_a_missing_set_says_what_where_and_what_to_do(tmp_path, name):
    path = tmp_path / "nothing" if name == "folder" else None
    with pytest.raises(DatasetMissing) as caught:
        find(Data(name=name, root=tmp_path, path=path))
    text = str(caught.value)
    assert name in text and "looked for: " in text and f"in: {tmp_path}/" in text
    remedies = "--data.path" if path else "SADDLE_DATA"
    assert remedies in text and "--data.name synthetic" in text
    assert ("--data.download" in text) == (path is None)  # torchvision fetches no folder


def test_bad_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.name='mnits' is unknown: .*mnist"):
        find(Data(name="mnits"))
    with pytest.raises(ValueError, match=r"--data\.path"):
        find(Data(name="folder"))
    with pytest.raises(ValueError, match=r"data\.resolution"):
        find(Data(name="digits", resolution=0))


def test_download_is_tried_when_asked(tmp_path, monkeypatch):
    import torchvision.datasets

    def fetch(root: str, download: bool) -> None:
        assert download
        for stem in ("train", "t10k"):
            write_idx(Path(root) / f"MNIST/raw/{stem}-images-idx3-ubyte", noise(2, 28, 28), False)
            write_idx(Path(root) / f"MNIST/raw/{stem}-labels-idx1-ubyte", noise(2), False)

    monkeypatch.setattr(torchvision.datasets, "MNIST", fetch)
    with pytest.raises(DatasetMissing):
        find(Data(name="mnist", root=tmp_path))
    assert len(find(Data(name="mnist", root=tmp_path / "new", download=True))) == 2


def test_a_failed_download_is_one_line_and_the_remedies(tmp_path, monkeypatch):
    import torchvision.datasets

    def fail(*_args: object, **_options: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets, "CelebA", fail)
    with pytest.raises(DatasetMissing) as caught:
        find(Data(name="celeba", root=tmp_path, download=True))
    first = str(caught.value).splitlines()[0]
    assert "--data.download of 'celeba'" in first and first.endswith("OSError: no route to host")
    with pytest.raises(DatasetMissing, match="cannot fetch 'folder'"):
        find(Data(name="folder", path=tmp_path, download=True))
    with pytest.raises(ValueError, match=r"leave --data\.path out"):
        datasets.download(Data(name="mnist", path=tmp_path))


def test_fingerprint_follows_the_content(tmp_path):
    path = save(tmp_path / "1.png")
    data = Data(name="folder", path=tmp_path)
    before, stamp = find(data).fingerprint(), find(data).stamp()
    assert find(data).stamp() == stamp
    os.utime(path, ns=(0, 0))  # as a copy's
    assert find(data).fingerprint() == before
    touched = find(data).stamp()
    path.write_bytes(path.read_bytes() + b"more")
    changed = find(data).fingerprint()
    save(tmp_path / "2.png")
    assert len({before, changed, find(data).fingerprint()}) == 3
    assert len({stamp, touched, find(data).stamp()}) == 3


@needs_real_data
@pytest.mark.parametrize(
    ("name", "count", "resolution", "channels"),
    [("mnist", 60_000, 28, 1), ("celeba", 8000, 64, 3), ("cifar10", 4000, 32, 3)],
)
def test_real_sets(name, count, resolution, channels):
    try:
        dataset = find(Data(name=name, resolution=resolution, channels=channels))
    except DatasetMissing:
        pytest.skip(f"{name} is not in SADDLE_DATA={REAL}")
    assert len(dataset) >= count
    rows = np.linspace(0, len(dataset) - 1, 16).astype(int)
    images = np.stack([dataset.decode(int(row)) for row in rows])
    assert images.shape == (16, resolution, resolution, channels)
    assert images.std() > 30 and dataset.fingerprint()


@needs_real_data
def test_real_grey_files_become_colour():
    folder = Path(REAL) / "horse2zebra" / "trainB"
    if not folder.is_dir():
        pytest.skip(f"horse2zebra is not in SADDLE_DATA={REAL}")
    dataset = find(Data(name="folder", path=folder, resolution=64))
    modes = [Image.open(dataset.path(i)).mode for i in range(len(dataset))]
    grey = [dataset.decode(i) for i, mode in enumerate(modes) if mode == "L"]
    assert len(grey) == 7
    assert all(image.shape == (64, 64, 3) and (image == image[..., :1]).all() for image in grey)
