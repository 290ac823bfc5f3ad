"""Samples that teach a classifier: what is trained on what, what is stored of it, what is refused.

The held-out images are scikit-learn's digits, which are small and hard to tell from twenty.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from engine.evaluate import main
from engine.export.__main__ import main as export
from engine.metrics import augmentation
from engine.metrics.augmentation import Augmentation, AugmentationEvaluator
from engine.recipe import load, names
from engine.report.__main__ import main as report
from engine.session import build_networks
from pipelines.datasets import find
from pipelines.settings import Data
from tests.images import images
from tests.reports import Page
from tests.runs import toy
from tests.test_datasets import write_idx
from tests.trained import refused_by, trained

CPU = torch.device("cpu")
NAMES = ["accuracy_real", "accuracy_augmented", "accuracy_samples"]
WIDTHS = ("--generator.hidden", "16", "16", "--discriminator.hidden", "16")
LITTLE = ("--augmentation", "--augmentation.real", "20", "--augmentation.generated", "30")
LITTLE += ("--augmentation.steps", "2")


class Copying(nn.Module):
    """In a conditional generator's place: real images of the class asked for, or of the next."""

    def __init__(self, data: Data, ahead: int = 0) -> None:
        super().__init__()
        dataset = find(data)
        pixels_NHWC = np.stack([dataset.decode(row) for row in range(len(dataset))])
        self.images_NCHW = torch.from_numpy(dataset.fit.shown(pixels_NHWC)).float() / 127.5 - 1
        self.rows = [torch.from_numpy(np.flatnonzero(dataset.labels == k)) for k in range(10)]
        self.ahead = ahead

    def forward(self, z_NL: Tensor, label_N: Tensor) -> Tensor:
        share_N = torch.special.ndtr(z_NL[:, 0]).clamp(0, 0.999)
        classes = ((label_N + self.ahead) % 10).tolist()
        chosen = [
            self.rows[k][int(u * len(self.rows[k]))]
            for k, u in zip(classes, share_N.tolist(), strict=True)
        ]
        return self.images_NCHW[torch.stack(chosen)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """1,397 digits to train on and 400 held out, in MNIST's files."""
    folder, bunch = tmp_path_factory.mktemp("digits"), load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    for stem, rows in (("train", slice(0, 1397)), ("t10k", slice(1397, None))):
        write_idx(folder / f"{stem}-images-idx3-ubyte", pixels[rows], False)
        write_idx(folder / f"{stem}-labels-idx1-ubyte", bunch.target[rows].astype(np.uint8), False)
    return Data(name="mnist", path=folder, resolution=8, channels=1)


@pytest.fixture(scope="module")
def run_folder(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional GAN, hardly trained."""
    place = ("--data.path", str(data.path), "--data.resolution", "8")
    return trained(tmp_path_factory.mktemp("cgan"), "cgan_mnist", *place, *WIDTHS)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


refused = refused_by(run)


def measured(
    data: Data, generator: nn.Module, real: int = 20, steps: int = 20, seed: int = 0
) -> dict[str, float]:
    recipe = load("cgan_mnist")
    recipe = replace(recipe, data=data, metrics=replace(recipe.metrics, seed=seed))
    settings = Augmentation(real, 1_000, steps)
    evaluator = AugmentationEvaluator(recipe, settings, CPU, print)
    return evaluator.evaluate({"generator": generator}, True).figures


def test_real_images_of_the_class_asked_for_teach_and_others_mislead(data):
    copies, permuted = (measured(data, Copying(data, ahead), steps=60) for ahead in (0, 1))
    assert list(copies) == NAMES
    assert 0.2 < copies["accuracy_real"] < 0.8
    assert copies["accuracy_augmented"] > copies["accuracy_real"] + 0.05
    assert copies["accuracy_samples"] > copies["accuracy_real"] + 0.05
    assert permuted["accuracy_real"] == copies["accuracy_real"]
    assert permuted["accuracy_augmented"] < copies["accuracy_real"]
    assert permuted["accuracy_samples"] < 0.05


def test_all_three_learn_alike_and_from_every_class_as_much(data, monkeypatch):
    seen = []

    def fit(network, images_NCHW, target, steps, batch, mirror):
        weights = [p.detach().clone() for p in network.parameters()]
        seen.append((weights, images_NCHW, np.bincount(target), steps, batch, mirror))
        network.eval()

    monkeypatch.setattr(augmentation, "fit", fit)
    measured(replace(data, flip=True), Copying(data), real=50)
    weights, images_NCHW, counts, steps, batches, mirrors = zip(*seen, strict=True)
    assert all(torch.equal(a, b) for w in weights[1:] for a, b in zip(weights[0], w, strict=True))
    assert [len(x_NCHW) for x_NCHW in images_NCHW] == [50, 1_050, 1_000]
    assert torch.equal(images_NCHW[1], torch.cat([images_NCHW[0], images_NCHW[2]]))
    assert len(images_NCHW[0].unique(dim=0)) == 50
    assert [set(c.tolist()) for c in counts] == [{5}, {105}, {100}]
    assert (set(steps), len(set(batches)), set(mirrors)) == ({20}, 1, {True})


def test_the_same_seed_gives_the_same_figures_and_disturbs_no_other_draw(data):
    torch.manual_seed(5)
    first = measured(data, Copying(data))
    drawn = torch.rand(())
    torch.manual_seed(5)
    assert drawn == torch.rand(())
    assert measured(data, Copying(data)) == first
    assert measured(data, Copying(data), seed=1) != first
    assert measured(replace(data, flip=True), Copying(data)) != first


@pytest.fixture(scope="module")
def results(run_folder: Path) -> dict:
    """What two of the same commands and one for the weights as trained have stored."""
    kept = []
    for flags in ((), (), ("--no-ema",)):
        assert run(run_folder, *LITTLE, *flags, "--json", run_folder / "all.json") == 0
        kept.append(json.loads((run_folder / "all.json").read_text())["a"])
    return dict(zip(("first", "again", "raw"), kept, strict=True))


def test_the_command_stores_figures_with_their_protocol(run_folder, results, data, capsys):
    first = results["first"]
    assert list(first["figures"]) == NAMES
    assert results["again"]["figures"] == first["figures"]
    protocol = first["protocol"]
    wanted = {"real": 20, "generated": 30, "steps": 2, "batch": 64, "split": "train", "seed": 0}
    assert wanted.items() <= protocol.items()
    assert protocol["ema"] and not results["raw"]["protocol"]["ema"]
    assert protocol["test"].startswith("400 held-out images ")
    assert json.loads((run_folder / "evaluation.json").read_text()) == [
        results["again"],
        results["raw"],
    ]
    assert run(run_folder, *LITTLE) == 0
    table = capsys.readouterr().out
    assert "accuracy_augmented" in table and "steps 2, batch 64" in table


def test_report_and_model_card_show_them(run_folder, results, tmp_path, capsys):
    assert report([str(run_folder), "--out", str(tmp_path / "report.html")]) == 0
    tables = Page(tmp_path / "report.html").data()["evaluated"]
    heads = [[name.capitalize().replace("_", " "), "higher is better"] for name in NAMES]
    assert [table["heads"] for table in tables] == [heads, heads]
    assert all("30 generated images, 20 real images (train split)" in t["words"] for t in tables)
    assert export([str(run_folder), "--formats", "safetensors"]) == 0
    card = (run_folder / "export/README.md").read_text()
    assert f"| accuracy_samples | {results['first']['figures']['accuracy_samples']:.5g} |" in card
    assert "- test: 400 held-out images" in card


@pytest.mark.parametrize("name", [name for name in names() if load(name).step.told()])
def test_every_recipe_whose_generator_is_given_classes_can_be_measured(name):
    recipe, _ = toy(name)
    recipe = replace(recipe, data=replace(recipe.data, resolution=16))
    networks = {k: network.eval() for k, network in build_networks(recipe, 10).items()}
    evaluator = AugmentationEvaluator(recipe, Augmentation(20, 20, 2), CPU, print)
    figures = evaluator.evaluate(networks, False).figures
    assert list(figures) == NAMES and all(0 <= value <= 1 for value in figures.values())


def test_runs_and_flags_that_it_is_not_for_are_one_clear_error(run_folder, tmp_path, capsys):
    small = ("--data.name", "digits", "--data.resolution", "8")
    widths = ("--generator.width", "4", "--discriminator.channels", "4", "8")
    unconditional = trained(tmp_path / "dcgan", "dcgan_digits", *small, *widths)
    untested = trained(tmp_path / "digits", "cgan_mnist", *small, *WIDTHS)
    cases = {
        (unconditional, "--augmentation"): "needs a generator that is given the dataset's classes",
        (untested, "--augmentation"): "needs held-out images: digits has no test images",
        (run_folder, *LITTLE, "--augmentation.real", 5_000): "equally often: give at most 1350",
        (run_folder, *LITTLE, "--augmentation.real", 9): "at least one for each of 10 classes",
        (run_folder, *LITTLE, "--augmentation.generated", 0): "--augmentation.generated 0",
        (run_folder, *LITTLE, "--augmentation.steps", 0): "--augmentation.steps must be at least 1",
        (run_folder, "--augmentation.steps", 9): "settings of --augmentation: give it too",
        ("--augmentation", "--real", "a", "--fake", "b"): "leave --real and --fake out",
    }
    for arguments, text in cases.items():
        assert text in refused(capsys, 2, *arguments)


def test_clusters_and_datasets_that_do_not_serve_are_refused(tmp_path):
    flat, odd = tmp_path / "flat", tmp_path / "odd"
    classes = ("train/a", "train/b", "test/a", "test/b", "test/c")
    for name in ("flat/train", "flat/test", *(f"odd/{folder}" for folder in classes)):
        images(tmp_path / name, 3, (8, 8), 0)
    cases = {
        "gan_em_mnist": (Data(), "given the dataset's classes"),
        "cgan_mnist": (Data(name="folder", path=flat), "needs classes in both splits"),
        "cdcgan_cifar10": (Data(name="folder", path=odd), "2 classes to train on and 3 held out"),
    }
    for name, (data, text) in cases.items():
        with pytest.raises(ValueError, match=text):
            AugmentationEvaluator(replace(load(name), data=data), Augmentation(), CPU, print)
