"""Sampling from exports: the same images as from the run, by every form; damage; refusals."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from engine import exported, sample
from engine.export import __main__ as export
from engine.exported import open_export
from engine.trained import Model, open_run
from tests.trained import refused_by, trained

FILES = tuple(exported.FILES.values())


@pytest.fixture(scope="module")
def gan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = ("--generator.width", "4", "--discriminator.channels", "4", "8")
    run_dir = trained(tmp_path_factory.mktemp("gan"), "dcgan_digits", *sizes)
    assert export.main([str(run_dir)]) == 0
    return run_dir


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = ("--autoencoder.hidden", "16", "--data.name", "digits", "--data.resolution", "8")
    run_dir = trained(tmp_path_factory.mktemp("vae"), "vae_mnist", *sizes)
    assert export.main([str(run_dir)]) == 0
    return run_dir


@pytest.fixture(params=["gan", "vae"])
def run_dir(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def copy(gan: Path, tmp_path: Path) -> Path:
    """A copy of the export, far from its run."""
    return shutil.copytree(gan / "export", tmp_path / "copy")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: object) -> int:
    return sample.main([str(a) for a in arguments])


refused = refused_by(run)


def images(model: Model) -> torch.Tensor:
    return torch.cat(list(model.samples(5, 11, 4)))


def test_every_form_gives_the_images_of_the_run(run_dir: Path) -> None:
    one = open_run(run_dir, device="cpu")
    for name in ("", *FILES):
        other = open_export(run_dir / "export" / name, "cpu")
        for fact in ("name", "images", "averaged", "checkpoint", "channels", "resolution"):
            assert getattr(other, fact) == getattr(one, fact), fact
        assert other.origin(3) == one.origin(3)
        assert torch.equal(other.latents(5, torch.arange(4)), one.latents(5, torch.arange(4)))
        difference = float((images(other) - images(one)).abs().max())
        exact = name in ("", "model.safetensors")
        assert difference == 0 if exact else difference <= 1e-4


def test_the_command_takes_any_of_them_alone(
    gan: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in FILES:
        alone = shutil.copy(gan / "export" / name, tmp_path / f"mine{Path(name).suffix}")
        assert run(alone, "--num", 3, "--out", "grid.png", "--each", name) == 0
        said = capsys.readouterr()
        assert "dcgan_digits at 64 images, moving average" in said.out
        assert said.err.count("\n") == 1 and "copy the whole folder" in said.err
        for picture in ("grid.png", next(Path(name).iterdir())):
            assert Image.open(picture).text["Saddle checkpoint"] == exported.UNVERIFIED
        assert run(gan / "export" / name, "--num", 3, "--out", "whole.png") == 0
        assert not capsys.readouterr().err
        checkpoint = open_run(gan).checkpoint
        assert Image.open("whole.png").text["Saddle checkpoint"] == checkpoint
        assert len(list(Path(name).iterdir())) == 3
    assert run(gan / "export", "--interpolate", "--num", 2, "--out", "walk.png") == 0
    assert Path("walk.gif").exists()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", ["", "hello", "half"])
def test_damaged_files_are_named(
    name: str, content: str, copy: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: len(whole) // 2] if content == "half" else content.encode())
    error = refused(capsys, 1, copy / name, "--num", 1)
    assert name in error and "wrong SHA-256" in error
    (copy / "config.json").unlink()  # now nothing but the file itself can tell
    error = refused(capsys, 1, copy / name, "--num", 1)
    assert name in error and "damaged" in error


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_enough(name: str, copy: Path, capsys: pytest.CaptureFixture) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    assert f"{name} is damaged (wrong SHA-256)" in refused(capsys, 1, copy / name)
    assert not Path("grid.png").exists()


def test_a_damaged_folder_is_named(copy: Path, capsys: pytest.CaptureFixture) -> None:
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert "wrong SHA-256" in refused(capsys, 1, copy)
    (copy / "model.safetensors").unlink()
    assert "missing" in refused(capsys, 1, copy)
    (copy / "config.json").write_text("{}")
    assert "neither a run directory nor an export" in refused(capsys, 2, copy)


def test_what_is_no_export_is_refused(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert "there is no nothing.onnx" in refused(capsys, 2, "nothing.onnx")
    assert "not a run directory" in refused(capsys, 2, "nothing")
    (tmp_path / "text.txt").write_text("mine")
    assert ".safetensors, .onnx, .pt2" in refused(capsys, 2, "text.txt")
    safetensors.torch.save_file({"a": torch.zeros(1)}, "other.safetensors")
    assert "no configuration of an export" in refused(capsys, 2, "other.safetensors")
    config = json.loads((copy / "config.json").read_text())
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    for network in ("os.path", "..train.Command", "dcgan.Missing", "dcgan.stages"):
        config["network"]["class"] = network
        metadata = {exported.KEY: json.dumps(config)}
        safetensors.torch.save_file(weights, "odd.safetensors", metadata)
        assert network in refused(capsys, 2, "odd.safetensors")
    config["network"]["class"], config["network"]["sizes"]["width"] = "dcgan.Generator", 5
    metadata = {exported.KEY: json.dumps(config)}
    safetensors.torch.save_file(weights, "odd.safetensors", metadata)
    assert "does not fit" in refused(capsys, 1, "odd.safetensors")


@pytest.mark.parametrize(
    "flags", [("--reconstruct",), ("--traverse",), ("--checkpoint", "32"), ("--no-ema",)]
)
def test_what_needs_the_run_says_so(
    flags: tuple[str, ...], copy: Path, capsys: pytest.CaptureFixture
) -> None:
    for place in (copy, copy / "model.onnx"):
        error = refused(capsys, 2, place, *flags)
        assert f"{flags[0]} needs the run directory" in error and "an export holds" in error


def test_networks_of_another_version_are_warned_of(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(exported.source, "digest", lambda files: "another")
    assert run(copy, "--num", 1) == 0
    assert "were of another version" in capsys.readouterr().err


def test_onnx_without_its_package_and_on_a_gpu(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "on the CPU" in refused(capsys, 2, copy / "model.onnx", "--device", "cuda")
    monkeypatch.undo()

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(exported.importlib, "import_module", missing)
    error = refused(capsys, 2, copy / "model.onnx")
    assert "onnxruntime: pip install 'saddle[export]'" in error
