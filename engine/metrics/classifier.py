"""A small classifier, trained once on a labelled dataset, as the extractor where no Inception is.

Features are the pooled maps before its last layer, as Inception's are. It is kept beside the packed
caches with its digest and its accuracy on held-out images; a figure names both, since another
training of it is another ruler.
"""

import contextlib
import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.checkpoint import write_synced
from engine.metrics.images import decode
from pipelines.datasets import Dataset, NoSplit, find
from pipelines.domains import Domains
from pipelines.settings import Data

VERSION = 1
WIDTHS = {1: (16, 32, 64), 3: (32, 64, 128)}
"""Channels of the stages, by the images' channels."""
BATCH, LR, SHIFT = 256, 3e-3, 2
PASSES_OVER = 180_000
"""Images seen in training: three epochs of MNIST."""
LARGEST = 60_000
"""Training images taken at most."""


class Classifier(nn.Module):
    """Three stages of 3x3 convolutions, one, one and two; means over quarters; logits of them."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__()
        self.resolution, self.channels = resolution, channels
        widths = WIDTHS[channels]
        layers: list[nn.Module] = []
        for before, after in zip((channels, *widths), widths, strict=False):
            layers += [*_block(before, after), nn.MaxPool2d(2)]
        layers += [*_block(after, after), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        self.body = nn.Sequential(*layers)
        self.size = 4 * after
        self.head = nn.Linear(self.size, classes)

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(features (N, D), logits (N, K)) of uint8 images at the classifier's own size."""
        x_NCHW = images_NCHW.to(memory_format=torch.channels_last).float() / 127.5 - 1
        features_ND = self.body(x_NCHW)
        return features_ND, self.head(features_ND)


def _block(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]


def settings(data: Data) -> Data:
    """The dataset as the classifier sees it: all of it, its own channels, at a size that suits."""
    grey = data.name in ("mnist", "fashion_mnist", "digits")
    channels = 1 if grey else 3 if data.name in ("cifar10", "celeba") else data.channels
    resolution = {"digits": 16, "celeba": 64, "horse2zebra": 64, "unpaired": 64}.get(data.name, 32)
    return replace(data, resolution=resolution, channels=channels, crop=None, without=())


def labelled(data: Data, split: str = "train") -> Dataset:
    """The dataset; of two domains, one whose classes they are."""
    dataset = find(data, split)
    return Domains.of(dataset) if dataset.second else dataset


def targets(dataset: Dataset) -> np.ndarray | None:
    """What there is to learn: classes (n,) int64, or attributes (n, a) uint8, or None."""
    if dataset.attributes is not None:
        return dataset.attributes
    return dataset.labels if len(dataset.classes) > 1 else None


def open_classifier(
    data: Data, device: torch.device, say: Callable[[str], None]
) -> tuple[Classifier, dict]:
    """The classifier of a dataset, trained by one process if it is not there yet, and what is
    known of it. Raises ValueError where the dataset has no labels, and DatasetMissing."""
    own = settings(data)
    dataset = labelled(own)
    if targets(dataset) is None:
        raise ValueError(
            f"the dataset {data.name} has no labels to train a classifier on; give "
            f"--metrics.weights FILE (Inception), or --metrics.extractor inception to fetch it"
        )
    fit = dataset.fit
    identity = [VERSION, dataset.stamp(), *fit.shape, *WIDTHS[fit.channels]]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    path = data.cache_folder() / f"classifier-{data.name}-{digest}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.with_suffix(".lock")):
        if not path.exists():
            _make(dataset, own, path, device, say)
    return load(path, device)


def load(path: Path, device: torch.device) -> tuple[Classifier, dict]:
    """A stored classifier, and what is known of it. Raises ValueError for another kind of file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["classifier"])
        with torch.random.fork_rng(devices=[]):  # fresh weights would draw on the global generator
            network = Classifier(about["channels"], about["resolution"], len(about["classes"]))
        network.load_state_dict(safetensors.torch.load_file(path))
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{path} is no classifier of Saddle's ({' '.join(str(error).split())[:200]}); for "
            f"another network name its class: --metrics.network MODULE:CLASS"
        ) from None
    about["digest"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return network, about


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock file: one process trains, the others wait for what it makes."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(
    dataset: Dataset, data: Data, path: Path, device: torch.device, say: Callable[[str], None]
) -> None:
    train_rows, test_set, test_rows = _split(dataset, data)
    say(f"training the metrics' classifier on {len(train_rows):,} images of {data.name}, once")
    began = time.monotonic()
    names = dataset.attribute_names if dataset.attributes is not None else dataset.classes
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        network = Classifier(dataset.fit.channels, dataset.fit.resolution, len(names))
        network.to(device, memory_format=torch.channels_last)
        images_NCHW, rows = decode(dataset, data, train_rows)
        fit(network, images_NCHW, targets(dataset)[rows], *_length(len(rows)))
    images_NCHW, rows = decode(test_set, data, test_rows)
    right = accuracy(network, images_NCHW, targets(test_set)[rows])
    about = {
        "dataset": data.name,
        "channels": dataset.fit.channels,
        "resolution": dataset.fit.resolution,
        "classes": list(names),
        "exclusive": dataset.attributes is None,
        "accuracy": round(right, 4),
        "trained_on": len(rows),
    }
    state = {k: v.cpu().contiguous() for k, v in network.state_dict().items()}
    scratch = path.with_suffix(".tmp")
    write_synced(scratch, safetensors.torch.save(state, {"classifier": json.dumps(about)}))
    scratch.rename(path)
    seconds = time.monotonic() - began
    say(f"the classifier is right on {right:.1%} of held-out images ({seconds:.0f} s): {path}")


def _split(dataset: Dataset, data: Data) -> tuple[np.ndarray, Dataset, np.ndarray]:
    """(rows to train on, held-out dataset, its rows): the test split, or each tenth image."""
    order = np.random.default_rng(0).permutation(len(dataset))
    try:
        test = labelled(data, "test")
        if targets(test) is not None:
            return order[:LARGEST], test, np.arange(min(len(test), 10_000))
    except NoSplit:
        pass
    tenth = max(1, len(order) // 10)
    return order[tenth : tenth + LARGEST], dataset, order[:tenth]


def _length(images: int) -> tuple[int, int]:
    """(updates, images in each) of the training on so many images."""
    batch = min(BATCH, max(16, images // 16))
    return max(PASSES_OVER // batch, 1) if images > 20_000 else 12 * -(-images // batch), batch


def fit(
    network: Classifier,
    images_NCHW: Tensor,
    target: np.ndarray,
    steps: int,
    batch: int,
    mirror: bool = False,
) -> None:
    """Adam with one rise and fall of the learning rate, on images shifted at random, and, if
    `mirror`, mirrored half of the time. Order and moves draw on the global generator."""
    n, device = len(images_NCHW), network.head.weight.device
    goal = torch.from_numpy(target).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    network.train()
    order_N = torch.cat([torch.randperm(n) for _ in range(-(-steps * batch // n))])
    for step in range(steps):
        rows_N = order_N[step * batch : (step + 1) * batch]
        x_NCHW = _shifted(images_NCHW[rows_N].to(device))
        if mirror and torch.rand(()) < 0.5:
            x_NCHW = x_NCHW.flip(-1)
        loss = _loss(network(x_NCHW)[1], goal[rows_N.to(device)])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval().requires_grad_(False)


def _shifted(images_NCHW: Tensor) -> Tensor:
    """The batch moved by up to SHIFT pixels, edges repeated."""
    padded = functional.pad(images_NCHW.float(), (SHIFT,) * 4, mode="replicate").to(torch.uint8)
    down, right = torch.randint(0, 2 * SHIFT + 1, (2,)).tolist()
    height, width = images_NCHW.shape[2:]
    return padded[:, :, down : down + height, right : right + width]


def _loss(logits_NK: Tensor, goal: Tensor) -> Tensor:
    if goal.dim() == 1:
        return functional.cross_entropy(logits_NK, goal)
    return functional.binary_cross_entropy_with_logits(logits_NK, goal.float())


def accuracy(network: Classifier, images_NCHW: Tensor, target: np.ndarray) -> float:
    """Share of images (of attributes) that are told right."""
    goal, right, device = torch.from_numpy(target), [], network.head.weight.device
    for x_NCHW, y in zip(images_NCHW.split(500), goal.split(500), strict=True):
        logits_NK = network(x_NCHW.to(device))[1].cpu()
        told = logits_NK.argmax(1) if y.dim() == 1 else (logits_NK > 0)
        right.append((told == y).float().flatten())
    return float(torch.cat(right).mean())
