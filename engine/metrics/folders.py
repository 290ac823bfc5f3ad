"""Two folders of images, measured against each other: anybody's generator, no run needed."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.metrics.distances import figures
from engine.metrics.evaluator import BATCH, Evaluation, check_count
from engine.metrics.extractor import Extractor, open_extractor, takes_classifier
from engine.metrics.images import decode
from engine.metrics.pairs import PSNR_CAP, Pairs
from engine.metrics.protocol import FeatureProtocol
from engine.metrics.statistics import Accumulator, FeatureSet
from engine.settings import Metrics
from engine.world import Ranks
from pipelines import layouts
from pipelines.datasets import Dataset, find
from pipelines.images import Fit, size_of
from pipelines.settings import Data
from pipelines.sources import FileSet


@dataclass(frozen=True)
class Folders:
    """real, fake: the folders. resize: pixels to bring the shorter sides to, cropped square; None
    takes the images as they are. classifier_data: what the small classifier is trained on; None
    takes the real images, if they lie in folders by class."""

    real: Path
    fake: Path
    resize: int | None
    classifier_data: Data | None

    def evaluate(
        self, settings: Metrics, device: torch.device, say: Callable[[str], None]
    ) -> Evaluation:
        """Distances between the two sets. Raises ValueError naming a flag or a file."""
        began = time.monotonic()
        real, fake = self._open()
        self._check_labels(settings, real[1])
        labelled = self.classifier_data or Data(name="folder", path=self.real)
        extractor = open_extractor(settings, labelled, device, say)
        features = [_features(data, dataset, extractor, device) for data, dataset in (real, fake)]
        for flag, part in zip(("--real", "--fake"), features, strict=True):
            check_count(extractor, part.count, flag)
        protocol = self._protocol(extractor, real[1], features)
        return Evaluation(figures(*features), protocol, time.monotonic() - began)

    def evaluate_pairs(self, settings: Metrics, device: torch.device) -> Evaluation:
        """PSNR, SSIM and LPIPS over the images of the same name. Raises ValueError."""
        began = time.monotonic()
        (real_data, real), (fake_data, fake) = self._open()
        rows = _pairs(real, fake)
        pairs = Pairs(device, settings.lpips)
        for part in np.array_split(rows, max(1, len(rows) // BATCH)):
            made_NCHW, _ = decode(fake, fake_data, part[:, 1])
            goal_NCHW, _ = decode(real, real_data, part[:, 0])
            pairs.add(made_NCHW.to(device), goal_NCHW.to(device))
        values = {name: total / pairs.count for name, total in pairs.sums.items()}
        name = f"pairs of images (psnr at most {PSNR_CAP:g} dB)"
        nothing = Extractor(name, "none", 0, "none", lambda images: (images, None))
        protocol = self._protocol(nothing, real, [pairs, pairs])
        return Evaluation(values, protocol, time.monotonic() - began)

    def _check_labels(self, settings: Metrics, real: Dataset) -> None:
        """Raise ValueError where the classifier would have to learn from images without classes."""
        if self.classifier_data or not takes_classifier(settings) or len(real.classes) > 1:
            return
        raise ValueError(
            f"--real {self.real} has no folders by class to train a classifier on: give "
            f"--data.name DATASET (the classifier of that dataset), --metrics.weights FILE, or "
            f"--metrics.extractor inception to fetch Inception"
        )

    def _open(self) -> list[tuple[Data, Dataset]]:
        sets = {flag: _images(path, flag) for flag, path in self._named()}
        sizes = {flag: _size(files, flag, self.resize) for flag, files in sets.items()}
        if len(set(sizes.values())) > 1:
            (a, first), (b, second) = sizes.items()
            raise ValueError(
                f"{a} has images of {_text(first)}, {b} of {_text(second)}: --resize N brings both "
                f"to N x N pixels"
            )
        side = self.resize or sizes["--real"][0]
        channels = 1 if all(_grey(files) for files in sets.values()) else 3
        opened = []
        for _, path in self._named():
            data = Data(name="folder", path=path, resolution=side, channels=channels)
            opened.append((data, find(data)))
        return opened

    def _named(self) -> tuple[tuple[str, Path], tuple[str, Path]]:
        return ("--real", self.real), ("--fake", self.fake)

    def _protocol(self, extractor: Extractor, real: Dataset, sets: list) -> FeatureProtocol:
        cut = f" (resized, --resize {self.resize})" if self.resize else ""
        return FeatureProtocol(
            extractor=extractor.name,
            extractor_digest=extractor.digest,
            dataset=f"{self.real.name} {real.fingerprint()[:12]}",
            split="folder",
            resolution=f"{real.fit.words}{cut}",
            resize=extractor.resize,
            real=sets[0].count,
            generated=sets[1].count,
            ema=False,
            seed=0,
        )


def _images(folder: Path, flag: str) -> FileSet:
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder}: there is no such folder")
    here = layouts.split_folder(folder, "train") or folder
    names = layouts.list_images(here)
    if not len(names):
        wanted = " ".join(layouts.SUFFIXES)
        raise ValueError(f"{flag} {folder} holds no images ({wanted})")
    return FileSet("folder", "train", Fit(1, 3), folder=here, names=names)  # to look at headers


def _size(files: FileSet, flag: str, resize: int | None) -> tuple[int, int]:
    """(width, height) of every image, from the headers; any where they are resized. Raises
    ValueError where they differ or are not square."""
    if resize:
        return resize, resize
    sizes: dict[tuple[int, int], Path] = {}
    for row in range(len(files)):
        size = size_of(files.path(row))
        if size is not None:
            sizes.setdefault(size, files.path(row))
    if not sizes:
        raise ValueError(f"{flag} {files.folder}: none of its files can be read as an image")
    if len(sizes) > 1:
        (first, one), (second, other) = list(sizes.items())[:2]
        raise ValueError(
            f"{flag} has images of different sizes ({one.name} is {_text(first)}, {other.name} "
            f"{_text(second)}): --resize N brings all to N x N pixels"
        )
    (size,) = sizes
    if size[0] != size[1]:
        raise ValueError(f"{flag} has images of {_text(size)}, not square: --resize N crops them")
    return size


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _grey(files: FileSet) -> bool:
    """Whether the first image is grey; a set of mixed kinds is read as colour by the other one."""
    with Image.open(files.path(0)) as image:
        return image.mode in ("L", "1", "I;16")


def _pairs(real: FileSet, fake: FileSet) -> np.ndarray:
    """Rows (n, 2) of the images of the same name, whatever the suffix. Raises ValueError."""
    names = [
        {Path(os.fsdecode(bytes(n))).with_suffix(""): i for i, n in enumerate(files.names)}
        for files in (real, fake)
    ]
    if odd := sorted(names[0].keys() ^ names[1].keys()):
        flag, folder = ("--fake", fake) if odd[0] in names[0] else ("--real", real)
        raise ValueError(
            f"--paired needs an image of the same name in both folders; {len(odd):,} are alone, "
            f"the first is {odd[0]}, which is missing in {flag} {folder.folder}"
        )
    return np.array([(row, names[1][name]) for name, row in names[0].items()])


def _features(
    data: Data, dataset: Dataset, extractor: Extractor, device: torch.device
) -> FeatureSet:
    taken = Accumulator(extractor.size, device, extractor.name)
    rows = np.arange(len(dataset))
    with torch.no_grad():
        for part in np.array_split(rows, max(1, len(rows) // BATCH)):
            images_NCHW, _ = decode(dataset, data, part)
            taken.add(*extractor.forward(images_NCHW.to(device)))
    return taken.join(Ranks(0, 0, 1, device))
