"""Exports of models that make images of images: every form as the run, at any size where it may be,
and by `engine.translate`; what works instead where a verb or a flag does not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine import sample, translate
from engine.export import __main__ as export
from engine.export import source
from engine.export.subject import subject_of
from engine.exported import FILES, open_export
from engine.trained import Trained, open_run
from engine.translation import Direction
from pipelines.sources import Synthetic
from tests.runs import toy
from tests.test_export import snippets
from tests.trained import refused_by, trained

SIZES = {
    "cyclegan_horse2zebra": ("--generators.width", "4", "--generators.blocks", "1"),
    "pix2pix_facades": ("--generator.width", "4"),
    "srgan_x4": ("--generator.width", "4", "--generator.blocks", "1"),
}
NAMES = tuple(SIZES)
FORM = FILES["safetensors"]


def exported(run_dir: Path, *flags: object) -> int:
    return export.main([str(a) for a in (run_dir, *flags)])


refused_export = refused_by(exported)
refused = refused_by(lambda *arguments: translate.main([str(a) for a in arguments]))
refused_sample = refused_by(lambda *arguments: sample.main([str(a) for a in arguments]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each exported, CycleGAN the other way than unasked."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for name, sizes in SIZES.items():
        with pytest.MonkeyPatch.context() as patch:  # few images are soon packed
            patch.setattr(Synthetic, "__len__", lambda self: min(self.count, 64))
            made[name] = trained(folder, name, *toy(name)[1], *sizes, "--steps", "1")
        way = ("--direction", "BtoA") if name.startswith("cyclegan") else ()
        assert exported(made[name], *way) == 0
    return made


@pytest.fixture(params=NAMES)
def run_dir(request: pytest.FixtureRequest, runs: dict[str, Path]) -> Path:
    return runs[request.param]


@pytest.fixture
def cycle(runs: dict[str, Path]) -> Path:
    return runs["cyclegan_horse2zebra"]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Images of two sizes, one a network's smallest or below."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    for name, size in {"large": (37, 50), "tiny": (3, 2)}.items():
        noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
    return folder


def direction(run_dir: Path) -> Direction:
    config = json.loads((run_dir / "export/config.json").read_text())
    return config["translation"]["direction"] or "AtoB"


def by_run(run_dir: Path, given_NCHW: torch.Tensor) -> torch.Tensor:
    """What the run makes of images."""
    with torch.no_grad():
        return open_run(run_dir, device="cpu").translate(given_NCHW, direction(run_dir))


def test_every_form_gives_the_images_of_the_run(run_dir: Path) -> None:
    fixed = run_dir.parent.name == "pix2pix_facades"
    shapes = [(1, 3, 32, 32), (4, 3, 32, 32)] if fixed else [(1, 3, 12, 44), (4, 3, 36, 8)]
    for name in ("", *FILES.values()):
        model = open_export(run_dir / "export" / name, "cpu")
        for shape in shapes:
            given_NCHW = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
            made_NCHW = model.translate(given_NCHW, direction(run_dir))
            expected_NCHW = by_run(run_dir, given_NCHW)
            assert made_NCHW.shape == expected_NCHW.shape
            difference = (made_NCHW - expected_NCHW).abs().max()
            exact = name in ("", FORM)
            assert difference == 0 if exact else difference <= 1e-4


def test_what_an_export_says_of_itself(runs: dict[str, Path]) -> None:
    for name, way, sides, made, scale in (
        ("cyclegan_horse2zebra", "BtoA", ["H", "W"], ["H", "W"], 1),
        ("pix2pix_facades", "BtoA", [32, 32], [32, 32], 1),
        ("srgan_x4", None, ["H", "W"], ["4*H", "4*W"], 4),
    ):
        there = runs[name] / "export"
        config = json.loads((there / "config.json").read_text())
        assert not (there / "samples.png").exists() and config["largest_difference"].keys() == {
            "safetensors",
            "onnx",
            "program",
        }
        assert [end["shape"] for end in (*config["inputs"], *config["outputs"])] == [
            ["N", 3, *sides],
            ["N", 3, *made],
        ]
        assert config["translation"]["direction"] == way
        assert config["translation"]["scale"] == config["images"]["scale"] == scale
        text = (there / "README.md").read_text()
        assert "pipeline_tag: image-to-image\n" in text and "samples.png" not in text
        assert ("32 x 32 pixels alone" in text) == (name == "pix2pix_facades")
        assert "latent" not in text


def test_the_cards_own_lines_run_without_the_engine(runs: dict[str, Path], tmp_path: Path) -> None:
    """Each snippet as it stands, on given images: what the run makes of them."""
    lines = ["import os, sys", "sys.path.insert(0, '')", "sys.dont_write_bytecode = True"]
    lines += [f"sys.modules[{name!r}] = None" for name in source.OURS]  # importing it would fail
    lines += ["import numpy, torch"]
    lines += ["torch.rand = lambda *shape: torch.from_numpy(x.reshape(shape) + 1) / 2"]
    lines += ["numpy.random.uniform = lambda low, high, shape: x.reshape(shape)"]
    lines += [f"for name in {NAMES}:", "    modules = set(sys.modules)"]
    inner = [f"x = numpy.load(os.path.join({str(tmp_path)!r}, name + '.npy'))"]
    inner += [f"os.chdir(sys.argv[1 + {NAMES!r}.index(name)])"]
    inner += ["sys.path[0] = os.getcwd()"]
    inner += ["parts = open('README.md').read().split('```python\\n')[1:]"]
    inner += ["for number, part in enumerate(parts):", "    exec(part.split('```')[0])"]
    inner += [f"    numpy.save(os.path.join({str(tmp_path)!r}, name + str(number)), images)"]
    inner += ["for module in set(sys.modules) - modules:"]
    inner += ["    if module.startswith('network'): del sys.modules[module]"]
    program = "\n".join([*lines, *(f"    {line}" for line in inner)])
    given = {}
    for name in NAMES:
        side = 8 if name == "srgan_x4" else 32
        noise = torch.Generator().manual_seed(1)
        given[name] = torch.rand(1, 3, side, side, generator=noise) * 2 - 1
        np.save(tmp_path / f"{name}.npy", given[name].numpy())
    words = [sys.executable, "-I", "-c", program, *(str(runs[name] / "export") for name in NAMES)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    for name, run_dir in runs.items():
        expected_NCHW = by_run(run_dir, given[name]).numpy()
        for number in range(3):
            made_NCHW = np.load(tmp_path / f"{name}{number}.npy")
            assert made_NCHW.dtype == np.float32
            assert np.abs(made_NCHW - expected_NCHW).max() <= 1e-4
        parts = snippets((run_dir / "export/README.md").read_text())
        assert all(len([line for line in part.splitlines() if line]) <= 5 for part in parts)
        assert not list((run_dir / "export").rglob("__pycache__"))


def pictures(place: Path, out: Path, *words: object) -> dict[str, np.ndarray]:
    """What `engine.translate` writes."""
    assert translate.main([str(w) for w in (place, *words, "--out", out)]) == 0
    found = {path.name: Image.open(path) for path in sorted(out.iterdir())}
    assert all("trainedAlgorithmicMedia" in str(picture.info) for picture in found.values())
    return {name: np.asarray(picture) for name, picture in found.items()}


@pytest.mark.parametrize("name", ["cyclegan_horse2zebra", "srgan_x4"])
def test_translate_takes_an_export_in_place_of_the_run(name, runs, inputs, tmp_path, capsys):
    run_dir = runs[name]
    way = ("--direction", "BtoA") if direction(run_dir) == "BtoA" else ()
    tiles = ("--tile", 12) if name == "srgan_x4" else ()
    wanted = pictures(run_dir, tmp_path / "run", inputs, *way, *tiles)
    capsys.readouterr()
    for form in ("", *FILES.values()):
        made = pictures(run_dir / "export" / form, tmp_path / f"by{form}", inputs, *tiles)
        said = capsys.readouterr()
        assert f"{name} at 8 images" in said.out and ("BtoA" in said.out) == bool(way)
        assert made.keys() == wanted.keys() == {"large.png", "tiny.png"}
        assert not said.err
        for key, picture in made.items():
            apart = np.abs(picture.astype(int) - wanted[key]).max()
            assert picture.shape == wanted[key].shape and apart <= (form not in ("", FORM))


def test_of_one_size_alone(runs, inputs, tmp_path, capsys):
    """Those are taken that are padded to that size, as by the run."""
    run_dir, out = runs["pix2pix_facades"], tmp_path / "out"
    error = refused(capsys, 2, run_dir / "export", inputs, "--out", out)
    assert "large.png has 37x50 pixels" in error and "32x32 alone" in error
    assert not out.exists()
    Image.open(inputs / "large.png").crop((0, 0, 30, 20)).save(tmp_path / "cut.png")
    for form in ("", *FILES.values()):
        places = (run_dir / "export" / form, run_dir)
        made, wanted = (pictures(p, out / form / p.name, tmp_path / "cut.png") for p in places)
        assert made["cut.png"].shape == (20, 30, 3)
        assert np.abs(made["cut.png"].astype(int) - wanted["cut.png"]).max() <= 1


def test_wrong_commands_for_an_export(cycle, runs, inputs, tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    for place in (cycle / "export", cycle / "export/model.pt2"):
        for flag in (("--checkpoint", 8), ("--no-ema",), ("--mask", inputs), ("--style", inputs)):
            error = refused(capsys, 2, place, inputs, *flag, *out)
            assert f"{flag[0]} needs the run directory, not {place}" in error
        error = refused(capsys, 2, place, inputs, "--direction", "AtoB", *out)
        assert f"the export {place} goes BtoA alone" in error
        assert "--tile is for models" in refused(capsys, 2, place, inputs, "--tile", 8, *out)
        assert "engine.translate" in refused_sample(capsys, 2, place)
    enlarger = runs["srgan_x4"] / "export"
    error = refused(capsys, 2, enlarger, inputs, "--direction", "AtoB", *out)
    assert "has no two domains: leave --direction AtoB out" in error
    damaged = shutil.copytree(enlarger, tmp_path / "damaged")
    with open(damaged / "model.safetensors", "ab") as file:
        file.write(b"x")
    assert "wrong SHA-256" in refused(capsys, 1, damaged, inputs, *out)
    assert not (tmp_path / "out").exists()


def test_directions_are_checked_and_differ(cycle, runs, tmp_path, capsys):
    for way in ("AtoB", "BtoA"):
        place = tmp_path / way
        assert exported(cycle, "--direction", way, "--out", place, "--formats", "safetensors") == 0
        assert f"weights as trained, {way}" in capsys.readouterr().out
    assert (tmp_path / "BtoA" / FORM).read_bytes() == (cycle / "export" / FORM).read_bytes()
    assert (tmp_path / "AtoB" / FORM).read_bytes() != (tmp_path / "BtoA" / FORM).read_bytes()
    flags = ("--direction", "AtoB", "--formats", "safetensors", "--out", tmp_path / "no")
    assert "goes BtoA alone" in refused_export(capsys, 2, runs["pix2pix_facades"], *flags)
    assert "has no two domains" in refused_export(capsys, 2, runs["srgan_x4"], *flags)
    assert not (tmp_path / "no").exists()


def test_a_model_of_latents_says_what_to_use(tmp_path, inputs, capsys):
    sizes = ("--generator.width", "4", "--discriminator.channels", "4", "8", "--steps", "1")
    run_dir = trained(tmp_path, "dcgan_digits", *sizes)
    alone = ("--formats", "safetensors")
    error = refused_export(capsys, 2, run_dir, "--direction", "AtoB", *alone)
    assert "has no two domains" in error
    assert exported(run_dir, *alone) == 0
    for place in (run_dir / "export", run_dir / "export" / FORM):
        assert "engine.sample" in refused(capsys, 2, place, inputs, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "works"),
    [
        ("inpaint_celeba", "--mask MASK"),
        ("style_transfer", "--style IMAGE"),
        ("vqvae_birds", "--reconstruct"),
        ("attngan_birds", "--caption"),
        ("dalle_birds", "--caption"),
        ("damsm_birds", "can be"),
    ],
)
def test_a_model_that_cannot_be_exported_says_what_works(name: str, works: str) -> None:
    trained = Trained(name, 0, False, torch.device("cpu"), "", toy(name)[0], {}, {})
    with pytest.raises(ValueError, match=f"{name} cannot be exported") as refusal:
        subject_of(trained)
    assert works in str(refusal.value) and "\n" not in str(refusal.value)
