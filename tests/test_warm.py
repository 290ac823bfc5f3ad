"""`launch.doctor --warm`: what it compiles is what training needs, also on another machine."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from engine import artifact
from engine.display import Display
from engine.precompile import take_artifact
from launch.doctor import main
from tests.forked import train
from tests.runs import QUICK, environment, run_folder, toy

COUNTED = r"compiled in \d+ s: (\d+) graphs new, (\d+) from the cache"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vae_mnist", pytest.param("damsm_birds", marks=pytest.mark.repeated)]
)
def test_training_finds_all_of_it_in_the_artifact(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "here"))
    flags = [*toy(name)[1], "--precision", "fp32", "--compile-artifact", str(tmp_path / "code")]
    doctor = [sys.executable, "-m", "launch.doctor", "--warm", name, *flags]
    said = subprocess.run(
        doctor, capture_output=True, text=True, check=True, env=environment()
    ).stdout
    new, _ = map(int, re.search(COUNTED, said).groups())
    assert new > 0 and "wrote" in said and (tmp_path / "code").stat().st_size > 10_000
    more = [*QUICK, "--compile", "required", "--steps", "2", "--runs", str(tmp_path / "runs")]
    there = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "there")}
    output = train(name, *flags, *more, **there)
    assert re.search(COUNTED, output).groups() == ("0", str(new)), output
    libraries = {
        where: {path.name for path in (tmp_path / where).glob("*/*.so")}
        for where in ("here", "there")
    }
    with zipfile.ZipFile(tmp_path / "code") as file:
        taken = {Path(entry).name for entry in file.namelist()}
    assert libraries["there"] <= libraries["here"] <= taken  # nothing but what was taken
    stats = (run_folder(tmp_path / "runs", name) / "stats.jsonl").read_text()
    assert re.search(r'"first step", "text": "[\d.]+ s after the start"', stats)


def written(path, machine, threads=1):
    """An artifact as `save_artifact` writes it."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("machine", machine)
        file.writestr("threads", str(threads))
        file.writestr("built/ab/cab.main.so", b"a library")
        file.writestr("built/../outside.so", b"not there")
        file.writestr("graphs", b"")


@pytest.mark.parametrize("machine", ["this", "another"])
def test_libraries_are_taken_on_machines_of_the_same_instructions_alone(
    machine, tmp_path, monkeypatch
):
    code = tmp_path / "code"
    written(code, artifact._machine() if machine == "this" else "avx1024")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "there"))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda content: ())
    artifact.load_artifact(code, torch.device("cpu"))
    assert (tmp_path / "there" / "ab" / "cab.main.so").exists() == (machine == "this")
    assert not list(tmp_path.glob("**/outside.so"))


def test_an_artifact_that_is_none_is_told_and_training_goes_on(tmp_path):
    said = []
    display = Display(1, "", quiet=True)
    display.warn = said.append
    (tmp_path / "code").write_bytes(b"no artifact")
    written(tmp_path / "wide", artifact._machine(), threads=64)
    for name in ("code", "none", "wide"):
        take_artifact(tmp_path / name, torch.device("cpu"), display)
    assert f"--compile-artifact {tmp_path / 'code'} is damaged, or no such artifact" in said[0]
    assert "No such file" in said[1] and "loops for 64 threads" in said[2]
    assert all("compiling instead" in line for line in said)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--warm"], "--warm needs a recipe"),
        (["--warm", "dcgan_digits", "--compile", "off"], "leaves nothing to compile"),
        (["dcgan_digits", "--warm", "--data.batch", "0"], "must be at least 1"),
    ],
)
def test_a_wrong_command_is_refused(arguments, reason, monkeypatch, capsys):
    monkeypatch.setattr("engine.world.leave", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2 and reason in capsys.readouterr().err
