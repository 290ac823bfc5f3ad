"""Sampling: every option, the same image for a seed, whole checkpoints, messages."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine import latents, originals, pictures, sample
from engine.trained import Trained, open_run
from engine.whole import write_whole
from tests.trained import refused_by, trained

GAN = ("--generator.width", "4", "--discriminator.channels", "4", "8", "--generator.latent", "6")
DIGITS = ("--data.name", "digits", "--data.resolution", "8")


@pytest.fixture(scope="module")
def gan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GAN with a moving average and checkpoints at 32 and 64 images."""
    return trained(tmp_path_factory.mktemp("gan"), "dcgan_digits", *GAN)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = (
        "--autoencoder.hidden",
        "16",
        "--autoencoder.latent",
        "5",
        "--autoencoder.ema-kimg",
        "0",
    )
    return trained(tmp_path_factory.mktemp("vae"), "vae_mnist", *DIGITS, *sizes)


@pytest.fixture
def copy(gan: Path, tmp_path: Path) -> Path:
    """A copy of the GAN's run to spoil."""
    return shutil.copytree(gan, tmp_path / "run")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: object) -> int:
    return sample.main([str(a) for a in arguments])


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


refused = refused_by(run)


def test_the_command_as_a_user_types_it(gan: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "engine.sample", str(gan), "--num", "9", "--seed", "1"]
    command += ["--out", str(tmp_path / "new/grid.png")]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "64 images, moving average of the weights" in done.stdout
    picture = Image.open(tmp_path / "new/grid.png")
    assert picture.format == "PNG" and picture.width == picture.height >= 512


def test_an_image_depends_on_seed_and_number_alone(gan: Path) -> None:
    for folder, *flags in (
        ("few", "--num", 5),
        ("many", "--num", 23, "--batch", 8),
        ("whole", "--num", 23),
        ("other", "--num", 5, "--seed", 1),
    ):
        assert run(gan, "--each", folder, *flags) == 0
    few, many, whole, other = (pixels(Path(f)) for f in ("few", "many", "whole", "other"))
    assert few.shape == (5, 8, 8) and many.shape == (23, 8, 8)
    assert np.array_equal(few, whole[:5])
    # kernels may round differently at another batch size
    assert np.abs(many.astype(int) - whole).max() <= 1
    assert not np.array_equal(few, other)
    assert len(np.unique(whole, axis=0)) == 23


def test_samples_are_those_of_the_average_unless_told_otherwise(gan: Path) -> None:
    z_NL = open_run(gan).latents(0, torch.arange(3))
    average, raw = (open_run(gan, ema=ema) for ema in (True, False))
    assert average.averaged and not raw.averaged
    a, b = (t.networks["generator"].state_dict() for t in (average, raw))
    assert not torch.equal(a["1.weight"], b["1.weight"])
    made_NCHW = next(raw.decode(z_NL, 3))
    assert made_NCHW.shape == (3, 1, 8, 8) and made_NCHW.abs().max() <= 1


def test_pictures_of_training_can_be_made_again(gan: Path) -> None:
    """Rebuilt networks give the very grid that the run itself showed at its end."""
    from engine.snapshot import SAMPLES
    from kernels import philox

    trained = open_run(gan)
    z_NL = philox.normal(philox.make_key(0), SAMPLES, torch.arange(4), 6)
    picture = np.asarray(pictures.grid(next(trained.decode(z_NL, 4))))
    shown = np.asarray(Image.open(gan / "samples/000000064.png"))
    assert np.abs(picture.astype(int) - shown).max() <= 1


def test_every_generated_picture_says_where_it_comes_from(
    gan: Path, vae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = {
        run: json.loads((run / "checkpoints/000000064/checkpoint.json").read_text())["index_sha256"]
        for run in (gan, vae)
    }
    assert run(gan, "--num", 2, "--seed", 3, "--out", "grid.png", "--each", "each") == 0
    assert run(gan, "--num", 2, "--seed", 3, "--interpolate", "--out", "walk.png") == 0
    assert run(vae, "--num", 2, "--seed", 3, "--traverse", "--out", "latents.png") == 0
    assert run(vae, "--num", 2, "--seed", 3, "--reconstruct", "--out", "pairs.png") == 0
    names = ("grid.png", "each/00001.png", "walk.png", "latents.png", "pairs.png")
    for name, run_dir in zip(names, (gan, gan, gan, vae, vae), strict=True):
        text = Image.open(name).text
        assert text["Saddle checkpoint"] == digests[run_dir]
        assert text["Saddle recipe"] == run_dir.parent.name
        assert (text["Saddle seed"], text["Saddle images seen"]) == ("3", "64")
        composite = "compositeWith" in text["DigitalSourceType"]
        assert composite == (name == "pairs.png")
    assert Image.open("each/00001.png").text["Saddle image"] == "1"
    assert b"Saddle seed: 3" in Image.open("walk.gif").info["comment"]


def test_training_marks_its_pictures_and_not_the_dataset_s(gan: Path, vae: Path) -> None:
    text = Image.open(gan / "samples/000000064.png").text
    assert text["Generated"] == "true" and text["Saddle recipe"] == "dcgan_digits"
    assert text["Saddle checkpoint"] == "run a while training, at 64 images"
    written = [*gan.rglob("*.png"), *vae.rglob("*.png")]
    unmarked = [p.name for p in written if "Generated" not in Image.open(p).text]
    assert unmarked == ["reals.png"] * 2


def test_another_checkpoint(gan: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(gan, "--checkpoint", 32, "--num", 1) == 0
    assert "at 32 images" in capsys.readouterr().out
    error = refused(capsys, 2, gan, "--checkpoint", 33)
    assert "--checkpoint 33" in error and "64, 32" in error


def test_the_best_checkpoint(copy: Path, capsys: pytest.CaptureFixture) -> None:
    error = refused(capsys, 2, copy, "--checkpoint", "best")
    assert "--checkpoint best" in error and "best.json" in error
    best = {"images": 32, "metric": "fid", "value": 3.5}
    (copy / "checkpoints/best.json").write_text(json.dumps(best))
    assert run(copy, "--checkpoint", "best", "--num", 1) == 0
    assert "at 32 images" in capsys.readouterr().out


def test_a_walk_is_a_strip_and_an_animation(gan: Path) -> None:
    assert run(gan, "--interpolate", "--num", 3, "--frames", 4, "--out", "w/walk.png") == 0
    strip, animation = Image.open("w/walk.png"), Image.open("w/walk.gif")
    assert strip.width > 10 * strip.height
    assert animation.n_frames == 12 and animation.info["loop"] == 0


def test_a_walk_goes_through_its_stops_and_stays_on_their_shell() -> None:
    z_NL = torch.randn(3, 400, generator=torch.Generator().manual_seed(0))
    path_NL = latents.walk(z_NL, 5)
    assert torch.allclose(path_NL[::5], z_NL, atol=1e-5)
    assert (path_NL.norm(dim=1) / 20 - 1).abs().max() < 0.15
    assert (path_NL - path_NL.roll(1, 0)).norm(dim=1).max() < 10


def test_reconstructions(vae: Path, gan: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(vae, "--reconstruct", "--num", 11, "--out", "r.png") == 0
    assert "11 training images (digits has no test images" in capsys.readouterr().out
    assert Image.open("r.png").width >= 512
    assert "--reconstruct is for autoencoders" in refused(capsys, 2, gan, "--reconstruct")


def test_originals_stand_over_reconstructions() -> None:
    above_NCHW, below_NCHW = (
        torch.arange(5.0).view(5, 1, 1, 1),
        torch.arange(10.0, 15).view(5, 1, 1, 1),
    )
    rows = originals.rows_over_rows(above_NCHW, below_NCHW, 3).flatten().tolist()
    assert rows == [0, 1, 2, 10, 11, 12, 3, 4, -1, 13, 14, -1]


def test_traversal(vae: Path, gan: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(vae, "--traverse", "--out", "t.png") == 0
    said = capsys.readouterr().out
    assert "5 of 5 latents from -3 to 3, most active first" in said
    nats = [float(part.rsplit("(", 1)[1]) for part in said.split(" nats)")[:-1]]
    assert len(nats) == 5 and nats == sorted(nats, reverse=True)
    assert run(gan, "--traverse", "--num", 2) == 0
    assert Image.open("traversal.png").width > 4 * Image.open("traversal.png").height


def test_many_images_to_single_files(gan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with --num: no more than one batch is held."""
    largest = []
    save = pictures.save_each

    def watch(images_NCHW: torch.Tensor, *others) -> None:
        largest.append(len(images_NCHW))
        save(images_NCHW, *others)

    monkeypatch.setattr(pictures, "save_each", watch)
    assert run(gan, "--num", 300, "--each", "deep/er", "--batch", 100) == 0
    assert largest == [100, 100, 100]
    assert sorted(p.name for p in Path("deep/er").iterdir())[-1] == "00299.png"


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    copy: Path, capsys: pytest.CaptureFixture
) -> None:
    newest = copy / "checkpoints/000000064"
    part = newest / "shared.safetensors"
    part.write_bytes(part.read_bytes()[:1000])
    assert run(copy, "--num", 1) == 0
    said = capsys.readouterr()
    assert str(newest) in said.err and "at 32 images" in said.out
    assert newest.exists()  # left for training to set aside
    assert "is damaged" in refused(capsys, 1, copy, "--checkpoint", 64)
    shutil.rmtree(copy / "checkpoints/000000032")
    run(copy)
    error = capsys.readouterr().err
    assert "is whole" in error and "there is none before it" in error and "using" not in error


def test_wrong_runs(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "not a run directory" in refused(capsys, 2, tmp_path / "nothing")
    values = json.loads((copy / "recipe.json").read_text())
    values["values"]["step"]["generator"]["network"]["width"] = 8
    (copy / "recipe.json").write_text(json.dumps(values))
    assert "does not fit" in refused(capsys, 1, copy)
    shutil.rmtree(copy / "checkpoints")
    gone = refused(capsys, 1, copy)
    assert "trained to 64 images" in gone and "checkpoints are gone" in gone
    assert "run the training command again" in gone
    stats = (copy / "stats.jsonl").read_text().splitlines()
    (copy / "stats.jsonl").write_text(stats[0] + "\n{torn")  # it has only begun
    assert "has no checkpoint yet" in refused(capsys, 1, copy)
    (copy / "stats.jsonl").unlink()
    assert "has no checkpoint yet" in refused(capsys, 1, copy)


def test_a_place_that_cannot_be_written_is_named_before_the_work(
    gan: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(sample, "open_run", lambda *_: pytest.fail("the run was opened"))
    for flag, place in (
        ("--out", "/proc/a.png"),
        ("--out", "/proc/deep/a.png"),
        ("--out", "file/a.png"),
        ("--each", "/proc/a"),
    ):
        error = refused(capsys, 1, gan, flag, place)
        assert place in error and "name another place" in error
        assert ".tmp" not in error and "Errno" not in error
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_that_cannot_be_written_is_named_by_its_own_name(tmp_path: Path) -> None:
    for path in (Path("/proc/a.png"), Path("/proc/deep/a.png"), tmp_path):  # the last: a folder
        with pytest.raises(OSError, match=re.escape(f"cannot write {path} (")) as refusal:
            write_whole(path, b"")
        assert ".tmp" not in str(refusal.value) and "name another place" in str(refusal.value)
    assert not list(tmp_path.parent.glob(".*.tmp"))


def test_wrong_settings(gan: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    for expected, *flags in (
        ("--num 0", "--num", 0),
        ("--num 1", "--interpolate", "--num", 1),
        ("--seed -1", "--seed", -1),
        ("--batch 0", "--batch", 0),
        ("not both", "--interpolate", "--traverse"),
        ("--each", "--each", "x", "--traverse"),
        ("--out grid.tiff", "--out", "grid.tiff"),
        ("--out full.png", "--out", "full.png/"),
        ("--each full is not empty", "--each", "full"),
        ("--each full/notes.txt is a file", "--each", "full/notes.txt"),
        ("lower --num", "--num", 1_000_000),
    ):
        (tmp_path / "full.png").mkdir(exist_ok=True)
        assert expected in refused(capsys, 2, gan, *flags)
    if not torch.cuda.is_available():
        assert "--device cpu" in refused(capsys, 2, gan, "--device", "cuda")
    with pytest.raises(SystemExit) as stop:
        run(gan, "--no-such-flag")
    assert stop.value.code == 2
    assert (tmp_path / "full/notes.txt").read_text() == "mine"


def test_where_the_dataset_lies_can_be_said_anew(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = shutil.copytree(vae, tmp_path / "moved")
    values = json.loads((run_dir / "recipe.json").read_text())
    values["values"]["data"]["name"] = "mnist"
    (run_dir / "recipe.json").write_text(json.dumps(values))
    monkeypatch.delenv("SADDLE_DATA", raising=False)
    error = refused(capsys, 1, run_dir, "--reconstruct", "--data.root", tmp_path / "nowhere")
    assert "'mnist' not found" in error and "--data.root" in error
    assert run(run_dir, "--num", 4) == 0  # samples need no dataset


def test_a_diverged_run_is_named(copy: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(Trained, "samples", lambda *_: iter([torch.full((2, 1, 8, 8), torch.nan)]))
    assert "not a number" in refused(capsys, 1, copy, "--each", "broken")
