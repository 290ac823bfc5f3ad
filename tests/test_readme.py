"""README's commands run as they stand, cut short: each with toy sizes and computed images added."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from engine import recipe
from engine.evaluate import main as evaluate
from engine.export.__main__ import main as export
from engine.report.__main__ import main as report
from engine.sample import main as sample
from engine.train import main
from engine.translate import main as translate
from launch.scaling import main as predict
from pipelines.prepare import main as prepare_dataset
from tests.images import images
from tests.runs import QUICK, ROOT, environment, run_folder, toy, train, world_size

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()
]
TRAIN = [c for c in COMMANDS if "-m engine.train" in c]
SLURM = [c for c in COMMANDS if c.startswith(("sbatch ", "srun "))]  # in test_slurm.py
TRAIN = [c for c in TRAIN if c not in SLURM]
SERVE = [c for c in COMMANDS if "-m engine.serve" in c]
VERBS = {"sample": sample, "evaluate": evaluate, "report": report, "export": export}
VERBS |= {"translate": translate}
USE = [c for c in COMMANDS if (m := re.search(r"-m engine\.(\w+)", c)) and m[1] in VERBS]
MAKE = [c for c in COMMANDS if c.startswith("make ")]


PREPARE = [c for c in COMMANDS if "-m pipelines.prepare" in c]
WARM = [c for c in COMMANDS if "-m launch.doctor --warm" in c]
DOCTOR = [c for c in COMMANDS if "-m launch.doctor" in c and c not in WARM]
PREDICT = [c for c in COMMANDS if "-m launch.scaling" in c]
INSPECT = "python -m kernels.inspect --sm 90"
SPEEDRUN = "python -m bench.speedrun dcgan_mnist"  # in test_speedrun.py
FEW = ["--metrics.generated", "300", "--metrics.real", "300"]


def test_every_command_is_tried_here():
    elsewhere = {"pytest bench/ --benchmark-only", INSPECT, SPEEDRUN, *SLURM}
    others = set(COMMANDS) - {
        *TRAIN,
        *USE,
        *SERVE,
        *MAKE,
        *PREPARE,
        *DOCTOR,
        *WARM,
        *PREDICT,
        *elsewhere,
    }
    assert not others
    assert min(len(TRAIN), len(USE), len(SERVE), len(MAKE)) >= 1


LAUNCHED = ("torchrun", "accelerate")
SLOW = [pytest.param(c, marks=pytest.mark.slow) for c in TRAIN if c.startswith(LAUNCHED)]


def launch(launcher: str, arguments: list[str]) -> None:
    """Run through a launcher as it is written, but for the number of nodes and their address."""
    here = launcher.replace("--nnodes=2", "--nnodes=1").replace("HOST:29500", "127.0.0.1:0")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*here.split(), "-m", "engine.train", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(PATH=path),
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("line", [*(c for c in TRAIN if not c.startswith(LAUNCHED)), *SLOW])
def test_a_training_command_runs(line, tmp_path, weights, capsys):
    launcher, _, rest = line.partition("-m engine.train ")
    name, *given = shlex.split(rest)
    if name.startswith("--") or {"--help", "--dry-run"} & set(given):
        try:
            assert main([name, *given]) == 0
        except SystemExit as done:
            assert done.code == 0
        assert "dcgan_digits" in capsys.readouterr().out
        return
    flags = [f for f in given if f not in ("--epochs", "20")]
    if "--metrics.every-kimg" in flags:
        flags += ["--metrics.weights", weights, *FEW]
    if "photos.zip" in flags:
        images(tmp_path / "photos", 20, (20, 20), 1)
        photos = shutil.make_archive(str(tmp_path / "photos"), "zip", tmp_path / "photos")
        flags[flags.index("photos.zip")] = photos
        flags += ["--data.cache", str(tmp_path / "cache")]
    arguments = [name, *toy(name)[1], *flags, *QUICK, "--steps", "1", "--runs", str(tmp_path)]
    if not line.startswith(LAUNCHED):
        train(*arguments)
        return
    launch(launcher, arguments)
    ranks = re.search(r"nproc_per_node=(\d+)", launcher)
    assert world_size(run_folder(tmp_path, name)) == (int(ranks[1]) if ranks else 1)


def prepare(words: list[str], weights: str) -> list[str]:
    """Make the runs, exports and folders of images that a command names, in the current folder."""
    for word in words:
        if word.startswith("runs/"):
            _, name, run, *export_folder = word.split("/")
            flags = [*toy(name)[1], *QUICK, "--steps", "1", "--run", run]
            if "best" in words:
                flags += ["--metrics.every-kimg", "1", *FEW, "--metrics.weights", weights]
            assert main([name, *flags]) == 0
            if export_folder:
                assert export([str(Path(word).parent), "--formats", "safetensors"]) == 0
        elif word.endswith("/") and word != "samples/":
            images(Path(word), 300, (20, 20), len(word))
        elif word == "painting.jpg":
            Image.effect_noise((40, 30), 60).save(word)
    return [weights if word.endswith(".pth") else word for word in words]


@pytest.mark.parametrize("line", USE)
def test_a_command_for_runs_and_images_runs(line, tmp_path, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    verb, words = re.fullmatch(r"python -m engine\.(\w+) (.*)", line).groups()
    words = prepare(shlex.split(words), weights)
    if verb == "evaluate":
        if "--real" in words and "--metrics.weights" in words:
            images(tmp_path / "samples", 300, (20, 20), 1)
        words += [*FEW, "--metrics.weights", weights]
        if "--augmentation" in words:
            words += ["--augmentation.real", "20", "--augmentation.generated", "20"]
            words += ["--augmentation.steps", "2"]
    assert VERBS[verb](words) == 0


@pytest.mark.parametrize("line", PREPARE)
def test_a_dataset_is_prepared(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SADDLE_DATA", str(tmp_path))
    monkeypatch.setenv("SADDLE_CACHE", str(tmp_path / "cache"))
    for folder in ("celeba/img_align_celeba", "horse2zebra/trainA", "horse2zebra/trainB", "photos"):
        images(tmp_path / folder, 5, (20, 20), 1)
    assert prepare_dataset(shlex.split(line.removeprefix("python -m pipelines.prepare "))) == 0
    made = [p.suffix for p in tmp_path.rglob("*") if p.suffix in (".npy", ".beton", ".zip")]
    assert made and (".zip" in made) == ("zip" in line) and (".beton" in made) == ("ffcv" in line)


@pytest.mark.parametrize("line", PREDICT)
def test_a_prediction_is_made(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert predict(shlex.split(line.removeprefix("python -m launch.scaling "))) == 0
    assert (tmp_path / "scaling.png").exists()


ON_RANKS = [pytest.param(c, marks=pytest.mark.slow) for c in DOCTOR if "nproc" in c]


@pytest.mark.parametrize("line", [*(c for c in DOCTOR if "nproc" not in c), *ON_RANKS])
def test_the_doctor_examines_a_machine(line, tmp_path):
    launcher, _, rest = line.partition("-m launch.doctor ")
    name, *flags = shlex.split(rest.replace("doctor.json", str(tmp_path / "doctor.json")))
    ranks = launcher.replace("torchrun", "-m torch.distributed.run --standalone").split()
    command = [sys.executable, *(w for w in ranks if w != "python"), "-m", "launch.doctor", name]
    command += [*toy(name)[1], *flags, "--runs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 fail" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("line", WARM)
def test_the_cache_is_warmed_on_several_ranks(line, tmp_path):
    """On two of them: eight would each compile here."""
    _, _, rest = line.partition("-m launch.doctor ")
    warm, name, *flags = shlex.split(rest.replace("compiled.bin", str(tmp_path / "compiled.bin")))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "-m", "launch.doctor", warm, name, *toy(name)[1], *flags]
    command += ["--sync-bn", "off"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "compiled.bin").stat().st_size > 10_000 and "wrote" in done.stdout


@pytest.mark.parametrize("line", SERVE)
def test_the_page_is_one_that_the_verb_knows(line):
    verb = [sys.executable, *line.split()[1:3], "--help"]
    done = subprocess.run(verb, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr
    assert "trained model" in done.stdout


@pytest.mark.parametrize("line", MAKE)
def test_a_make_command_is_one_that_the_makefile_knows(line):
    if not shutil.which("make"):
        pytest.skip("there is no make on this machine")
    done = subprocess.run(
        [*shlex.split(line), "--dry-run"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    wanted = {"test": "pytest", "bench": "bench.compare"}
    name = next((name for name in wanted if name in line), None)
    assert wanted.get(name, "engine.train") in done.stdout


def test_the_table_lists_every_recipe():
    for name in recipe.names():
        assert f"| `{name}` |" in README


def test_the_tests_that_readme_names_exist():
    for path in re.findall(r"`((?:tests|engine|pipelines|bench|kernels)/[\w/]+\.\w+)`", README):
        assert (ROOT / path).exists(), path


@pytest.mark.slow
def test_the_kernels_are_inspected(capfd):
    """One of them: tests/test_inspect.py has them all."""
    command = [sys.executable, *shlex.split(INSPECT)[1:], "--only", "apply bf16"]
    done = subprocess.run(command, cwd=ROOT, timeout=600)
    assert done.returncode == 0
    assert "0 beyond a limit" in capfd.readouterr().out
