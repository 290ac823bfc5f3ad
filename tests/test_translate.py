"""engine.translate: images of any size and kind, through the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine import evaluate, report, sample, translate
from engine.metrics.translation import TranslationEvaluator
from engine.session import build_networks
from engine.world import Ranks
from pipelines.datasets import find
from pipelines.domains import Domains
from pipelines.sources import Synthetic
from tests.runs import toy
from tests.trained import refused_by, trained

refused = refused_by(lambda *arguments: translate.main([str(a) for a in arguments]))
SIZES = {"grey.png": ("L", (37, 50)), "alpha.png": ("RGBA", (40, 33)), "tall.jpg": ("RGB", (8, 61))}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Of the recipe at toy size."""
    flags = toy("cyclegan_horse2zebra")[1]
    return trained(tmp_path_factory.mktemp("runs"), "cyclegan_horse2zebra", *flags)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder of images of several sizes and kinds."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    for name, (mode, size) in SIZES.items():
        noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 4), np.uint8)
        Image.fromarray(noise).convert(mode).save(folder / name)
    return folder


def translated(run: Path, out: Path, *inputs: Path, direction: str = "AtoB") -> dict[str, Image]:
    """The pictures written."""
    paths = [str(p) for p in inputs]
    code = translate.main([str(run), *paths, "--direction", direction, "--out", str(out)])
    assert code == 0
    return {p.name: Image.open(p) for p in sorted(out.iterdir())}


def test_images_of_any_size_and_kind_keep_their_size(run, inputs, tmp_path, capsys):
    made = translated(run, tmp_path / "out", inputs)
    assert {name: picture.size for name, picture in made.items()} == {
        f"{Path(name).stem}.png": size for name, (_, size) in SIZES.items()
    }
    assert "3 images" in capsys.readouterr().out
    assert all("trainedAlgorithmicMedia" in str(picture.info) for picture in made.values())


def test_directions_differ_and_an_image_does_not_depend_on_others(run, inputs, tmp_path):
    both = translated(run, tmp_path / "all", inputs)["grey.png"]
    alone = translated(run, tmp_path / "one", inputs / "grey.png")["grey.png"]
    back = translated(run, tmp_path / "back", inputs / "grey.png", direction="BtoA")["grey.png"]
    assert both.tobytes() == alone.tobytes() != back.tobytes()


def test_wrong_commands(run, inputs, tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    assert "no such file" in refused(capsys, 2, run, tmp_path / "absent.png", *out)
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused(capsys, 2, run, tmp_path / "empty", *out)
    (tmp_path / "torn.png").write_bytes(b"no image")
    assert "torn.png" in refused(capsys, 1, run, tmp_path / "torn.png", *out)
    assert "would replace" in refused(capsys, 2, run, inputs, "--out", inputs)
    Image.new("RGB", (8, 8)).save(inputs / "grey.jpg")
    assert "grey.jpg" in refused(capsys, 2, run, inputs, *out)
    assert "not a run" in refused(capsys, 2, tmp_path / "absent", inputs / "tall.jpg", *out)
    assert not (tmp_path / "out").exists()


def test_an_image_that_cannot_be_read_is_left_out(run, inputs, tmp_path, capsys):
    good = {path.stem for path in inputs.iterdir()}
    (inputs / "a_torn.png").write_bytes(b"no image")
    error = refused(capsys, 1, run, inputs, "--out", tmp_path / "out")
    assert "left out: " in error and "a_torn.png" in error
    assert {path.stem for path in (tmp_path / "out").iterdir()} == good


def test_verbs_for_models_with_latents_say_what_there_is_instead(run, capsys):
    assert sample.main([str(run)]) == 2
    assert "engine.translate" in capsys.readouterr().err


def test_the_run_shows_held_out_images_translated_and_back(run):
    with Image.open(max((run / "samples").glob("*.png"))) as picture:
        wide, high = picture.size
    assert wide > high  # six columns, four rows
    report.write(run)
    stats = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert any(line.get("values", {}).get("test/cycle_A", 0) > 0 for line in stats)


@pytest.fixture
def few(tmp_path: Path, monkeypatch) -> None:
    """Of each domain 300 images, and a cache of their own."""
    monkeypatch.setattr(Synthetic, "__len__", lambda self: min(self.count, 300))
    monkeypatch.setenv("SADDLE_CACHE", str(tmp_path))


def test_figures_tell_a_translator_from_what_leaves_images_as_they_are(few, monkeypatch):
    """Negatives are what domain B shows: an inverter has all that the identity lacks."""
    recipe = toy("cyclegan_horse2zebra")[0]
    kind = type(recipe.step)
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    found = []
    for translator in (lambda *args: -args[2], lambda *args: args[2]):
        monkeypatch.setattr(kind, "translate", lambda *a, direction=None, t=translator: t(*a))
        evaluator = TranslationEvaluator(recipe, ranks, print)
        found.append(evaluator.evaluate(build_networks(recipe), False).figures)
        evaluator.close()
    inverting, idle = found
    assert inverting["taken_AtoB"] > 0.95 and inverting["taken_BtoA"] > 0.95
    assert inverting["taken_AtoB_identity"] < 0.05 and idle["taken_AtoB"] < 0.05
    assert inverting["kid"] < 0.1 * inverting["kid_identity"]
    assert idle["kid"] == pytest.approx(idle["kid_identity"])
    assert inverting["cycle_A"] == 0


def test_two_domains_are_the_classes_of_one_dataset():
    recipe = toy("cyclegan_horse2zebra")[0]
    pair = find(recipe.data)
    both = Domains.of(pair)
    assert len(both) == len(pair) + len(pair.second) and both.labels.sum() == len(pair.second)
    assert np.array_equal(both.decode(5), pair.decode(5))
    assert np.array_equal(both.decode(len(pair) + 2), pair.second.decode(2))


def test_evaluate_measures_a_run(few, run, capsys):
    assert evaluate.main([str(run), "--metrics.split", "test", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "kid_AtoB_identity" in printed and "taken_BtoA" in printed
