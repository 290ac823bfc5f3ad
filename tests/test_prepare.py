"""The command that prepares datasets: what it makes is taken by runs, and what it refuses."""

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipelines.datasets import find
from pipelines.pack import open_pack, pack_path
from pipelines.prepare import main
from pipelines.settings import Data
from tests.batches import clock_of, opened


@pytest.fixture
def command(data):
    """The data's own sizes, as flags."""
    return [str(data.path), "--resolution", "12", "--cache", str(data.cache), "--workers", "1"]


def test_what_is_packed_is_what_a_run_takes(data, command, capsys):
    assert main(command) == 0
    assert (
        f"packed: 22 images of folder in {pack_path(find(data), data)}" in capsys.readouterr().out
    )
    lines = []
    assert opened(replace(data, pipeline="resident"), clock_of(data), lines.append).skipped == 0
    assert lines == []


def test_a_beton_is_what_a_run_takes(data, command, capsys):
    assert main([*command, "--to", "ffcv"]) == 0
    lines = []
    pipeline = opened(replace(data, pipeline="ffcv"), clock_of(data), lines.append)
    pipeline.close()
    assert pipeline.name == "ffcv" and not any("writing" in line for line in lines)


def test_a_zip_is_read_back_the_same_bit_for_bit(data, command, tmp_path, capsys):
    out = tmp_path / "it.zip"
    assert main([*command, "--to", "zip", "--out", str(out)]) == 0
    zipped = find(Data(name="folder", path=out, resolution=12, cache=data.cache))
    plain = find(data)
    assert zipped.labels.tolist() == plain.labels.tolist() and len(zipped) == 22
    assert all(np.array_equal(zipped.decode(i), plain.decode(i)) for i in range(22))
    with zipfile.ZipFile(out) as file:
        assert file.namelist()[0] == "00000/img00000000.png"
        assert file.infolist()[0].compress_type == zipfile.ZIP_STORED
        assert len(json.loads(file.read("dataset.json"))["labels"]) == 22
    assert main([*command, "--to", "zip", "--out", str(out)]) == 0
    assert "is there already" in capsys.readouterr().out


def test_a_zip_of_someone_else_is_refused_before_the_work(data, command, tmp_path, capsys):
    out = tmp_path / "it.zip"
    out.write_text("a letter")
    assert main([*command, "--to", "zip", "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "is another file: move it away or change --out" in said.err and not said.out
    assert out.read_text() == "a letter" and not pack_path(find(data), data).exists()


def test_skipped_images_are_told_and_not_in_the_zip(data, command, tmp_path, capsys):
    (data.path / "class0" / "02.png").write_bytes(b"")
    assert main(command) == 1
    assert "02.png: the file is empty; --on-error skip leaves such" in capsys.readouterr().err
    out = tmp_path / "it.zip"
    command += ["--on-error", "skip"]
    assert main([*command, "--to", "zip", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "1 corrupt images skipped" in said and "zip: 21 images" in said
    with zipfile.ZipFile(out) as file:
        assert len(file.namelist()) == 22  # and the labels


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["nonsense"], "neither a dataset"),
        ([""], "neither a dataset"),
        (["digits", "--to", "zip"], "--to zip needs --out FILE.zip"),
        (["digits", "--out", "a.zip"], "--to zip needs --out FILE.zip"),
        (["digits", "--to", "zip", "--out", "a.tar"], "--out a.tar must end in .zip"),
        (["digits", "--workers", "0"], "--workers must be at least 1"),
        (["digits", "--load", "8"], "error: --load 8 is smaller than --resolution 64"),
    ],
)
def test_a_wrong_command_is_named(flags, said, capsys):
    assert main(flags) == 2
    assert said in capsys.readouterr().err


def test_two_at_a_time_are_no_zip(tmp_path, capsys):
    for letter in "AB":
        (tmp_path / f"train{letter}").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / f"train{letter}" / "0.png")
    flags = ["unpaired", "--path", str(tmp_path), "--to", "zip", "--out", str(tmp_path / "a.zip")]
    assert main(flags) == 2
    assert "a zip holds single images" in capsys.readouterr().err
    data = Data(name="unpaired", path=tmp_path, cache=tmp_path / "cache")
    assert main(["unpaired", "--path", str(tmp_path), "--cache", str(tmp_path / "cache")]) == 0
    for domain in (find(data), find(data).second):
        pack = open_pack(domain, data, pack_path(domain, data), pytest.fail, False)
        assert pack.images_NHWC.shape == (1, 64, 64, 3)
