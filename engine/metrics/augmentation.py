"""Do a class-conditional generator's samples teach a classifier what real images do?

Three classifiers learn with the same first weights and as many updates: from a few real images,
from samples, and from both. All are tried on held-out images. The accuracy after samples alone is
the classification accuracy score, that after both the naive augmentation score of Ravuri and
Vinyals 2019, "Classification accuracy score for conditional generative models"
(https://arxiv.org/abs/1905.10887), with a small classifier in place of their ResNet.

Shapes: N images, C channels, H height, W width, L latent.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.algorithm import Networks
from engine.metrics.classifier import VERSION, WIDTHS, Classifier, accuracy, fit
from engine.metrics.evaluator import Evaluation
from engine.metrics.images import decode, quantised
from engine.metrics.protocol import AugmentationProtocol
from engine.networks.conditional import with_classes
from engine.settings import Recipe
from kernels import philox
from pipelines.datasets import Dataset, NoSplit, find
from pipelines.order import Balanced

LATENTS = 9  # noise stream; training takes 1 and 5 to 8, pictures 2, samples 3, other metrics 4
MADE, BATCH = 250, 64  # images of one forward of the generator; of one update of a classifier

Labelled = tuple[Tensor, np.ndarray]
"""Images, uint8 (N, C, H, W) on the host, and their classes, int64 (N,)."""


@dataclass(frozen=True)
class Augmentation:
    """How much the classifiers of --augmentation learn from, and how long; --metrics.seed seeds the
    choice of real images, the latents and the training."""

    real: int = 1_000
    """Real training images, of every class as many: samples help where these are few."""
    generated: int = 10_000
    """Samples, of every class as many."""
    steps: int = 500
    """Updates of each classifier, with 64 images each."""


class AugmentationEvaluator:
    """Measures the generator of a recipe, on one process."""

    def __init__(
        self,
        recipe: Recipe,
        settings: Augmentation,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        """Decode the real images. Raises ValueError naming a flag, and what finding and decoding
        a dataset raise."""
        self.recipe, self.settings, self.device, self._say = recipe, settings, device, say
        self._train, self._test = _labelled_splits(recipe)
        self._classes = np.unique(self._train.labels)
        _check_counts(self._train, settings)
        order = Balanced(self._train.labels, recipe.metrics.seed)
        self._real = self._decoded(self._train, order.rows(np.arange(settings.real)))
        known = np.isin(self._test.labels, self._classes)  # but for those left out of training
        self._held_out = self._decoded(self._test, np.flatnonzero(known))

    def protocol(self, averaged: bool) -> AugmentationProtocol:
        """What its figures are measured with."""
        train, test, settings = self._train, self._test, self.settings
        widths = "-".join(str(width) for width in WIDTHS[train.fit.channels])
        return AugmentationProtocol(
            classifier=f"small ({widths} channels, version {VERSION})",
            steps=settings.steps,
            batch=BATCH,
            dataset=f"{train.name} {train.fingerprint()[:12]}",
            split=train.split,
            resolution=f"{train.fit.resolution}x{train.fit.resolution}x{train.fit.channels}",
            real=len(self._real[1]),
            generated=settings.generated,
            test=f"{len(self._held_out[1])} held-out images {test.fingerprint()[:12]}",
            ema=averaged,
            seed=self.recipe.metrics.seed,
        )

    def evaluate(self, networks: Networks, averaged: bool) -> Evaluation:
        """Measure these networks, in eval mode. averaged: whether they are moving averages, for
        the protocol."""
        began, real, samples = time.monotonic(), self._real, self._samples(networks)
        both = torch.cat([real[0], samples[0]]), np.concatenate([real[1], samples[1]])
        sets = {"real": real, "augmented": both, "samples": samples}
        figures = {f"accuracy_{name}": self._accuracy(name, *given) for name, given in sets.items()}
        return Evaluation(figures, self.protocol(averaged), time.monotonic() - began)

    def close(self) -> None:
        """Nothing is held that has to be let go of."""

    def _decoded(self, dataset: Dataset, rows: np.ndarray) -> Labelled:
        images_NCHW, rows = decode(dataset, self.recipe.data, rows)
        return images_NCHW, dataset.labels[rows]

    @torch.no_grad()
    def _samples(self, networks: Networks) -> Labelled:
        """Samples of each class in turn, as a file would hold them."""
        step, count = self.recipe.step, self.settings.generated
        key = philox.make_key(self.recipe.metrics.seed, device=self.device)
        label_N = torch.from_numpy(self._classes)[torch.arange(count) % len(self._classes)]
        made = []
        for position_N in torch.arange(count, device=self.device).split(MADE):
            z_NL = philox.normal(key, LATENTS, position_N, step.latent_dim())
            chosen_N = label_N.to(self.device)[position_N]
            z_NL = with_classes(z_NL, chosen_N, step.classes())
            made.append(quantised(step.decode(networks, z_NL)).cpu())
        return torch.cat(made), label_N.numpy()

    def _accuracy(self, name: str, images_NCHW: Tensor, label_N: np.ndarray) -> float:
        """Of a classifier that learns from these, on the held-out images."""
        began, shape = time.monotonic(), self._train.fit
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.recipe.metrics.seed)
            network = Classifier(shape.channels, shape.resolution, self.recipe.step.classes())
            network.to(self.device, memory_format=torch.channels_last)
            mirror = self.recipe.data.flip  # what the generator has learnt, real images are given
            fit(network, images_NCHW, label_N, self.settings.steps, BATCH, mirror)
        right = accuracy(network, *self._held_out)
        taken = f"{len(label_N):,} images ({name}), {time.monotonic() - began:.0f} s"
        self._say(f"a classifier that learnt from {taken}, is right on {right:.2%}")
        return right


def _labelled_splits(recipe: Recipe) -> tuple[Dataset, Dataset]:
    """Training and test split. Raises ValueError where the generator is given no classes of the
    dataset, or the dataset has no labels or test images."""
    step = recipe.step
    # clusters that a model has found by itself are classes of its sampler, but not the dataset's
    if not (step.told() and step.classes()):
        raise ValueError(
            "--augmentation needs a generator that is given the dataset's classes, as that of "
            "cgan_mnist is: leave it out for other runs"
        )
    data = replace(recipe.data, flip=False)
    try:
        train, test = find(data), find(data, "test")
    except NoSplit as reason:
        raise ValueError(f"--augmentation needs held-out images: {reason}") from None
    if train.labels is None or test.labels is None:
        raise ValueError(
            f"--augmentation needs classes in both splits, which {train.name} has not: leave it out"
        )
    if train.classes != test.classes or len(train.classes) != step.classes():
        raise ValueError(
            f"--augmentation: {train.name} has {len(train.classes)} classes to train on and "
            f"{len(test.classes)} held out, the generator knows {step.classes()}; give the dataset "
            f"that it was trained on (--data.path), with the same classes in both splits"
        )
    return train, test


def _check_counts(train: Dataset, settings: Augmentation) -> None:
    """Raise ValueError where classes cannot all be there equally often."""
    _, count_K = np.unique(train.labels, return_counts=True)
    classes, most = len(count_K), len(count_K) * int(count_K.min())
    for flag, value in (("real", settings.real), ("generated", settings.generated)):
        if value < classes:
            raise ValueError(
                f"--augmentation.{flag} {value}: give at least one for each of {classes} classes"
            )
    if settings.real > most:
        raise ValueError(
            f"--augmentation.real {settings.real}: the smallest class of {train.name} has "
            f"{int(count_K.min()):,} images, and all are taken equally often: give at most {most}"
        )
