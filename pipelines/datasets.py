"""Which dataset does a recipe mean, where does it lie, and what if it is not there?

`find` only looks (and downloads if asked to): it starts nothing, so a missing set is known before
the process group and before any compile. Nothing is ever replaced by synthetic images.
"""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines import captions, layouts
from pipelines.archives import holds_archives, open_archive
from pipelines.birds import open_birds
from pipelines.domains import open_pairs, open_tiles, open_unpaired
from pipelines.images import BadImage, Fit, sixteen_bits
from pipelines.lsun import open_lsun
from pipelines.missing import DOWNLOADS, DatasetMissing, NoSplit, missing_text
from pipelines.settings import Data
from pipelines.sources import ArraySet, Dataset, EncodedSet, FileSet, Synthetic
from pipelines.subset import without

__all__ = ["BadImage", "Dataset", "DatasetMissing", "NoSplit", "download", "find"]

DIGITS = tuple(str(digit) for digit in range(10))
CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
THINGS = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
CELEBA_IMAGES = 202_599
PLACES = {
    "horse2zebra": (open_unpaired, ("horse2zebra",)),
    "style_transfer": (open_unpaired, ("style_transfer",)),
    "unpaired": (open_unpaired, ()),
    "facades": (open_pairs, ("facades",)),
    "pairs": (open_pairs, ()),
    "tiles": (open_tiles, ("DIV2K", "DIV2K/DIV2K_train_HR", "DIV2K_train_HR")),
}
NEEDS_PATH = ("folder", "unpaired", "pairs")
COMPUTED = ("synthetic", "synthetic_unpaired", "synthetic_pairs", "synthetic_captions")
HUES = (
    *("red", "pink", "purple", "violet", "blue"),
    *("teal", "green", "lime", "yellow", "orange"),
)
"""What the colours of the computed images are called, class by class."""
NAMES = ("digits", *DOWNLOADS, "lsun", "birds", "folder", *PLACES, *COMPUTED)


def find(data: Data, split: str = "train") -> Dataset:
    """The dataset of a recipe. Raises DatasetMissing, NoSplit, or ValueError naming a setting."""
    if data.name not in NAMES:
        raise ValueError(f"data.name={data.name!r} is unknown: choose one of {', '.join(NAMES)}")
    if data.name in NEEDS_PATH and data.path is None:
        raise ValueError(
            f"data.name={data.name} needs --data.path, the folder that holds the images"
        )
    _check_sizes(data)
    try:
        dataset = _look(data, split)
    except DatasetMissing:
        if not data.download:
            raise
        download(data)
        dataset = _look(data, split)
    if data.window is not None:
        _check_sixteen_bits(dataset)
    return without(dataset, data.without) if data.without and split == "train" else dataset


def _check_sixteen_bits(dataset: Dataset) -> None:
    """A window without 16-bit images would silently do nothing; the first image tells."""
    content = dataset.encoded(0) if isinstance(dataset, EncodedSet) else b""
    if not sixteen_bits(content):
        raise ValueError(
            f"--data.window is for 16-bit grey images, and those of {dataset.name} "
            f"({dataset.describe(0)}) are not: leave it out"
        )


def _check_sizes(data: Data) -> None:
    if data.resolution < 1 or (data.crop is not None and data.crop < 1):
        raise ValueError("data.resolution and data.crop must be positive")
    if data.load is not None and data.load < data.resolution:
        raise ValueError(
            f"--data.load {data.load} is smaller than --data.resolution {data.resolution}, which "
            "is cut from it: give at least that, or leave it out"
        )
    if data.window is not None and data.window[0] >= data.window[1]:
        raise ValueError(f"--data.window {data.window[0]} {data.window[1]} must rise")
    if data.scale is not None and (data.scale < 2 or data.resolution % data.scale):
        raise ValueError(
            f"--data.scale {data.scale} must be at least 2 and divide --data.resolution "
            f"{data.resolution}"
        )
    if data.scale and data.name in PLACES and data.name != "tiles":
        raise ValueError(f"--data.scale makes a pair, and {data.name} has one: leave it out")


def download(data: Data) -> None:
    """Fetch a dataset into the root folder with torchvision; DatasetMissing if that fails."""
    if data.name not in DOWNLOADS:
        raise DatasetMissing(missing_text(data, f"torchvision cannot fetch {data.name!r}"))
    if data.path is not None:
        raise ValueError("--data.download fetches into data.root: leave --data.path out")
    import torchvision.datasets

    root = data.root_folder()
    options = {"split": "all"} if data.name == "celeba" else {}
    try:
        root.mkdir(parents=True, exist_ok=True)
        getattr(torchvision.datasets, DOWNLOADS[data.name])(str(root), download=True, **options)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        failed = f"--data.download of {data.name!r} into {root} failed: {line}"
        raise DatasetMissing(missing_text(data, failed)) from error


def _look(data: Data, split: str) -> Dataset:
    load = data.load if split == "train" else None  # held-out images are seen whole
    fit = Fit(data.resolution, data.channels, data.crop, load, window=data.window)
    match data.name:
        case "mnist":
            return _idx(data, split, fit, DIGITS, ("MNIST/raw", "mnist", "MNIST", "mnist/raw"))
        case "fashion_mnist":
            places = ("FashionMNIST/raw", "fashion_mnist", "FashionMNIST", "fashion-mnist")
            return _idx(data, split, fit, CLOTHES, places)
        case "cifar10":
            return _cifar10(data, split, fit)
        case "celeba":
            return _celeba(data, split, fit)
        case "folder":
            return (open_archive if holds_archives(data.path) else _folder)(data, split, fit)
        case "lsun":
            return open_lsun(data, split, fit)
        case "birds":
            return open_birds(data, split, fit)
        case name if name in PLACES:
            opener, places = PLACES[name]
            return opener(data, split, fit, places)
        case "digits":
            return _digits(split, fit)
        case _:
            return _computed(data.name, split, fit)


def _computed(name: str, split: str, fit: Fit) -> Synthetic:
    start, count = (0, 4000) if split == "train" else (4000, 1000)
    rows = {"start": start, "count": count}
    if name == "synthetic_unpaired":
        second = Synthetic(name, split, fit, start=start + 5000, count=count, negative=True)
        return Synthetic(name, split, fit, **rows, second=second)
    dataset = Synthetic(name, split, replace(fit, halves=name == "synthetic_pairs"), **rows)
    if name == "synthetic_captions":
        told = [[["a", hue, "blob"], ["this", "blob", "is", hue]] for hue in HUES]
        words = captions.vocabulary(sentence for pair in told for sentence in pair)
        dataset.captions = captions.encode(told, words).of(dataset.labels)
    return dataset


def _idx(data: Data, split: str, fit: Fit, classes: tuple, places: tuple[str, ...]) -> Dataset:
    stem, full = ("train", 60_000) if split == "train" else ("t10k", 10_000)
    folders = _folders(data, places, within=("", "raw"))
    for folder in folders:
        images = layouts.idx_file(folder, f"{stem}-images", 3)
        labels = layouts.idx_file(folder, f"{stem}-labels", 1)
        if images and labels:
            pixels, label = layouts.read_idx(images), layouts.read_idx(labels)
            if len(pixels) != len(label):
                raise BadImage.of(labels, f"{len(label)} labels for {len(pixels)} images")
            note = _subset(len(pixels), full)
            label = label.astype(np.int64)
            return ArraySet(data.name, split, fit, label, classes, note, pixels[..., None])
    names = f"{stem}-images-idx3-ubyte[.gz] and {stem}-labels-idx1-ubyte[.gz]"
    raise DatasetMissing(missing_text(data, looked=(names, folders)))


def _cifar10(data: Data, split: str, fit: Fit) -> Dataset:
    places = ("cifar-10-batches-py", "cifar10/cifar-10-batches-py", "cifar10")
    folders = _folders(data, places, within=("", "cifar-10-batches-py"))
    numbers = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    full = 50_000 if split == "train" else 10_000
    for folder in folders:
        batches = [folder / name for name in numbers if (folder / name).is_file()]
        if batches:
            images, labels = layouts.read_cifar(batches)
            note = _subset(len(images), full)
            return ArraySet(
                "cifar10", split, fit, labels, THINGS, note, images.transpose(0, 2, 3, 1)
            )
        if (folder / split).is_dir() and len(names := layouts.list_images(folder / split)):
            labels, classes = layouts.class_labels(names)
            note = _subset(len(names), full)
            return FileSet("cifar10", split, fit, labels, classes, note, folder / split, names)
    wanted = f"{', '.join(numbers)}, or {split}/<class>/*.png"
    raise DatasetMissing(missing_text(data, looked=(wanted, folders)))


def _celeba(data: Data, split: str, fit: Fit) -> Dataset:
    places = ("celeba/img_align_celeba", "img_align_celeba", "CelebA/img_align_celeba")
    folders = _folders(data, places, within=("img_align_celeba", ""))
    # Kaggle's archive has the folder twice, one in the other
    for folder in [f / "img_align_celeba" for f in folders] + folders:
        names = layouts.list_images(folder)
        if len(names):
            break
    else:
        raise DatasetMissing(missing_text(data, looked=("*.jpg", folders)))
    note = _subset(len(names), CELEBA_IMAGES)
    lists = [folder.parent, folder, folder.parent.parent]
    partition = next((p for f in lists if (p := layouts.read_partition(f)) is not None), None)
    if partition is not None:
        wanted = 0 if split == "train" else 2
        stems = [Path(os.fsdecode(bytes(name))).stem for name in names]
        names = names[[partition.get(stem) == wanted for stem in stems]]
    if (partition is None and split != "train") or not len(names):
        why = "no list_eval_partition" if partition is None else "none of that partition here"
        raise NoSplit(f"celeba in {folder} has no {split} images ({why})")
    dataset = FileSet("celeba", split, fit, None, (), note, folder, names)
    if (listed := next((a for f in lists if (a := layouts.read_attributes(f))), None)) is not None:
        titles, of_stem = listed
        stems = [Path(os.fsdecode(bytes(name))).stem for name in names]
        if all(stem in of_stem for stem in stems):
            dataset.attributes = np.array([of_stem[stem] for stem in stems], np.uint8)
            dataset.attribute_names = titles
    return dataset


def _folder(data: Data, split: str, fit: Fit) -> Dataset:
    folder = layouts.split_folder(data.path, split)
    if folder is None:
        raise NoSplit(
            f"the image folder {data.path} has no {split} images (no {split}/ beside train/)"
        )
    names = layouts.list_images(folder)
    if not len(names):
        wanted = "images (" + " ".join(layouts.SUFFIXES) + ")"
        raise DatasetMissing(missing_text(data, looked=(wanted, [folder])))
    labels, classes = layouts.class_labels(names)
    note = ""
    if labels is not None and (empty := layouts.empty_classes(folder, classes)):
        if data.on_error == "stop":
            raise DatasetMissing(
                f"class folder {folder / empty[0]} holds no images: remove it, or leave it out by "
                "--data.on-error skip"
            )
        note = f"{len(empty)} class folders without images left out: {', '.join(empty[:5])}"
    return FileSet("folder", split, fit, labels, classes, note, folder, names)


def _digits(split: str, fit: Fit) -> Dataset:
    if split != "train":
        raise NoSplit("digits has no test images: all 1,797 are used for training")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    return ArraySet("digits", split, fit, labels, DIGITS, "", pixels[..., None])


def _folders(data: Data, places: tuple[str, ...], within: tuple[str, ...]) -> list[Path]:
    """Where to look: the usual places under the root, or in `data.path` if that is given."""
    if data.path is not None:
        return [data.path / name for name in within]
    return [data.root_folder() / place for place in places]


def _subset(found: int, full: int) -> str:
    return f"subset: {found:,} of {full:,} images" if found < full else ""


def decode_some(dataset: Dataset, rows: Iterable[int], count: int, skip: bool) -> np.ndarray:
    """The first `count` images, or fewer if there are no more, of these rows: uint8 (N, C, H, W).

    A corrupt image is left out if `skip`; otherwise, or if all are corrupt, raises BadImage.
    """
    images: list[np.ndarray] = []
    problem: BadImage | None = None
    for row in rows:
        if len(images) == count:
            break
        try:
            images.append(dataset.decode(row))
        except BadImage as error:
            if not skip:
                raise
            problem = error
    if problem and not images:
        raise problem
    return dataset.fit.shown(np.stack(images))
