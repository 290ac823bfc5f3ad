"""README's commands run as they stand, cut short: each with toy sizes and computed images added."""

import re
import shlex
import shutil
import subprocess

import pytest

from engine import recipe
from engine.train import main
from tests.runs import QUICK, ROOT, environment, toy, train

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()
]
TRAIN = [c for c in COMMANDS if "-m engine.train" in c]
SAMPLE = [c for c in COMMANDS if "-m engine.sample" in c]
MAKE = [c for c in COMMANDS if c.startswith("make ")]


def test_every_command_is_tried_here():
    others = set(COMMANDS) - {*TRAIN, *SAMPLE, *MAKE, "pytest bench/ --benchmark-only"}
    assert not others
    assert min(len(TRAIN), len(SAMPLE), len(MAKE)) >= 2


SLOW = [pytest.param(c, marks=pytest.mark.slow) for c in TRAIN if "nproc" in c]


@pytest.mark.parametrize("line", [*(c for c in TRAIN if "nproc" not in c), *SLOW])
def test_a_training_command_runs(line, tmp_path, capsys):
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
    ranks = re.search(r"nproc_per_node=(\d+)", launcher)
    toy_flags = toy(name)[1]
    train(
        *(name, *toy_flags, *flags, *QUICK, "--steps", "1", "--runs", str(tmp_path)),
        ranks=int(ranks[1]) if ranks else 1,
    )


@pytest.mark.parametrize("line", SAMPLE)
def test_a_sampling_command_runs(line, tmp_path):
    from engine.sample import main as sample

    words = shlex.split(line.partition("-m engine.sample ")[2])
    run = tmp_path / words[0]
    flags = [*toy(name := run.parent.name)[1], *QUICK, "--steps", "1"]
    assert main([name, *flags, "--runs", str(run.parent.parent), "--run", run.name]) == 0
    words = [str(tmp_path / w) if "/" in w or "." in w else w for w in words]
    assert sample(words) == 0


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
    assert ("pytest" if "test" in line else "engine.train") in done.stdout


def test_the_table_lists_every_recipe():
    for name in recipe.names():
        assert f"| `{name}` |" in README


def test_the_tests_that_readme_names_exist():
    for path in re.findall(r"`((?:tests|engine|pipelines|bench|kernels)/[\w/]+\.\w+)`", README):
        assert (ROOT / path).exists(), path
