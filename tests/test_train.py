"""The training command line: lists, help, messages and exit codes."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from engine import recipe
from engine.snapshot import Snapshots
from engine.train import main
from tests.runs import QUICK, run_folder, toy, train

REMEDIES = ("SADDLE_DATA", "--data.download", "--data.name synthetic")


@pytest.mark.parametrize("ranks", [1, 2])
def test_missing_data_is_one_message_from_rank_0_before_anything_starts(ranks, tmp_path):
    flags = ["--data.root", str(tmp_path / "nowhere"), "--runs", str(tmp_path)]
    output = train("dcgan_celeba", *flags, ranks=ranks, code=1)
    assert output.count("error: ") == 1
    assert all(remedy in output for remedy in REMEDIES)
    assert str(tmp_path / "nowhere") in output
    assert "engine/train.py" not in output  # no traceback of ours
    assert not (tmp_path / "dcgan_celeba").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dcgan_digit"], "did you mean dcgan_digits"),
        (["dcgan_digits", "--data.bach", "3"], "--data.bach"),
        (["dcgan_digits", "--data.batch", "many"], "--data.batch"),
        (["dcgan_digits", "--precision", "fp16", "--device", "cpu"], "--precision bf16"),
        (["dcgan_digits", "--accumulate", "7"], "--data.batch 63"),
        (["dcgan_digits", "--data.resolution", "17"], "data.resolution=17"),
        (["dcgan_digits", "--kimg", "1", "--steps", "3"], "--kimg and --steps"),
        (["dcgan_digits", "--kimg", "0"], "positive"),
        (["dcgan_digits", "--data.name", "digitz"], "digitz"),
        (["dcgan_digits", "--data.name", "folder"], "--data.path"),
        (["dcgan_digits", "--generator.width", "0"], "--generator.width 0"),
        (["dcgan_digits", "--generator.lr", "-1"], "--generator.lr -1"),
        ([], "dcgan_digits"),
    ],
)
def test_wrong_usage_is_one_message_and_exit_code_2(arguments, words, tmp_path, capsys):
    try:
        code = main([*arguments, *(["--runs", str(tmp_path)] if arguments else [])])
    except SystemExit as leaving:
        code = leaving.code
    assert code == 2
    assert words in "".join(capsys.readouterr())
    assert not any(tmp_path.iterdir())


def test_wrong_usage_leaves_no_traceback(tmp_path):
    flags = ["--data.resolution", "17", "--runs", str(tmp_path)]
    assert "Traceback" not in train("dcgan_digits", *flags, code=2)


def test_list_shows_every_recipe_with_its_description():
    output = train("--list")
    for name in recipe.names():
        assert re.search(rf"^{name} +{re.escape(recipe.summary(name))}$", output, re.M)


def test_required_compilation_without_a_compiler_fails_by_name(tmp_path):
    flags = [*toy("vae_mnist")[1], "--compile", "required", "--runs", str(tmp_path)]
    output = train("vae_mnist", *flags, code=1, PATH=str(tmp_path))
    assert "compile=required" in output
    assert "g++" in output


def test_recipe_json_says_what_ran_where(tmp_path):
    train("vae_mnist", *toy("vae_mnist")[1], *QUICK, "--steps", "2", "--runs", str(tmp_path))
    content = json.loads((run_folder(tmp_path, "vae_mnist") / "recipe.json").read_text())
    assert content["recipe"] == "vae_mnist"
    assert content["digest"] == recipe.digest("vae_mnist")
    assert content["values"]["data"]["name"] == "synthetic"
    assert content["provenance"]["versions"]["torch"]
    assert "--steps 2" in content["provenance"]["command"]
    for fact in ("device", "precision", "compile", "pipeline"):
        assert content["resolved"][fact]


@pytest.mark.parametrize("pipeline", ["resident", "torchvision"])
def test_a_corrupt_first_image_is_named_or_skipped_and_counted(pipeline, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (20, 20), np.uint8)
        Image.fromarray(noise).save(pictures / f"{i:02}.png")
    (pictures / "00.png").write_bytes((pictures / "00.png").read_bytes()[:100])
    flags = ["--data.name", "folder", "--data.path", str(pictures), "--data.batch", "6", "--steps"]
    flags += ["3", *QUICK, "--runs", str(tmp_path / "runs"), "--data.pipeline", pipeline]
    with pytest.raises(SystemExit, match="1"):
        main(["dcgan_digits", *flags])
    assert "00.png" in capsys.readouterr().err
    assert main(["dcgan_digits", *flags, "--data.on-error", "skip"]) == 0
    lines = (run_folder(tmp_path / "runs", "dcgan_digits") / "stats.jsonl").read_text()
    ticks = [json.loads(line) for line in lines.splitlines() if "values" in line]
    assert ticks[-1]["values"]["data/skipped"] == 1


def test_a_run_folder_that_cannot_be_made_is_one_message(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="1"):
        main(["dcgan_digits", "--steps", "1", "--runs", str(tmp_path / "file")])
    assert "--runs names another place" in capsys.readouterr().err


def test_a_run_name_cannot_lead_out_of_the_runs(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["dcgan_digits", "--steps", "1", "--runs", str(tmp_path / "a"), "--run", "../../x"])
    assert "plain name" in capsys.readouterr().err


def test_pictures_that_cannot_be_written_do_not_end_the_run(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Snapshots, "take", full)
    flags = [*QUICK, "--steps", "3", "--runs", str(tmp_path)]
    assert main(["dcgan_digits", *toy("dcgan_digits")[1], *flags]) == 0
    assert "training goes on" in capsys.readouterr().out


def test_a_fresh_run_says_by_which_name_it_goes_on(tmp_path, capsys):
    flags = [*toy("dcgan_digits")[1], *QUICK, "--runs", str(tmp_path), "--run", "it"]
    for _ in range(2):
        assert main(["dcgan_digits", *flags, "--steps", "2", "--fresh"]) == 0
    assert main(["dcgan_digits", *flags, "--steps", "2"]) == 0
    assert "--steps 4" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "dcgan_digits").iterdir()} == {"it", "it.2"}


def test_a_report_that_cannot_be_written_at_the_end_is_one_message(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Snapshots, "write_report", full)
    flags = [*QUICK, "--steps", "3", "--runs", str(tmp_path), "--run", "it"]
    assert main(["dcgan_digits", *toy("dcgan_digits")[1], *flags]) == 1
    assert "error: [Errno 28] No space left" in capsys.readouterr().err
    assert (tmp_path / "dcgan_digits" / "it" / "checkpoints" / "000000024").exists()
