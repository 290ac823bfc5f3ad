"""Training under a real Slurm: do the job files in slurm/ train on two nodes, give way when they
are asked to, go on, and end as an unbroken run does? And `srun python`, and arrays of jobs?

Slow, and left out where Slurm is not installed; `make test-slurm` runs it.
"""

import json
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.cluster import Cluster, missing, running
from tests.runs import ROOT, differences, final_state, toy, train, wait_until, world_size

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"Slurm is not installed: no {missing()}"),
]
STEPS = 200
TOY = [*toy("dcgan_digits")[1], "--data.name", "digits", "--compile", "off", "--log-every", "0.08"]
TOY += ["--sample-every", "1000", "--checkpoint-every", "1000", "--steps", str(STEPS)]
CPUS = ("--gpus-per-node=0", "--cpus-per-task=1", "--time=10")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with running(tmp_path_factory.mktemp("slurm") / "slurm") as cluster:
        yield cluster


@pytest.fixture
def setting(tmp_path) -> dict[str, str]:
    """What a user's environment says: a small recipe, where things go, no disk on the nodes."""
    (tmp_path / "out").mkdir()
    return {
        "RECIPE": "dcgan_digits",
        "RUNS": str(tmp_path / "runs"),
        "SADDLE_CACHE": str(tmp_path / "shared"),
        "TMPDIR": "",
        "SBATCH_OUTPUT": str(tmp_path / "out" / "%j.out"),
    }


def run_of(setting: dict[str, str], name: str, recipe: str = "dcgan_digits") -> Path:
    return Path(setting["RUNS"], recipe, name)


def log_of(folder: Path) -> str:
    log = folder / "slurm.log"
    return log.read_text() if log.exists() else ""


def trains(folder: Path) -> bool:
    """Whether a run has been at its statistics."""
    stats = folder / "stats.jsonl"
    return stats.exists() and "values" in stats.read_text()


def finished(cluster: Cluster, job: str, folder: Path) -> str:
    """The log of a job once it has ended well."""
    state = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    assert state == "COMPLETED", log_of(folder)
    return log_of(folder)


def signalled_and_back(cluster: Cluster, job: str, folder: Path) -> None:
    """Ask a training job to give way; wait until Slurm has it queued again, and do not wait out the
    two minutes that Slurm then holds it."""
    wait_until(lambda: trains(folder), 240)
    cluster.run("scancel", "--signal=USR1", job)
    wait_until(lambda: "requeue" in log_of(folder))
    cluster.wait(job, "PENDING")
    time.sleep(2)  # Slurm compares seconds: at once, it would take the new start for the old one
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")


def test_two_nodes_signalled_and_requeued_equal_an_unbroken_run(cluster, setting, tmp_path):
    """The nodes have a disk of their own, to which the data is brought."""
    setting["TMPDIR"] = str(tmp_path / "disk")
    job = cluster.submit("--nodes=2", "--time=10", "slurm/dcgan.sh", *TOY, **setting)
    folder = run_of(setting, f"job{job}")
    signalled_and_back(cluster, job, folder)
    log = finished(cluster, job, folder)
    assert world_size(folder) == 2
    stopped = int(re.search(r"stopped at ([\d,]+) of", log)[1].replace(",", ""))
    assert 0 < stopped < STEPS * 8
    assert f"from {stopped:,} images" in log
    assert cluster.state(job)["Restarts"] == "1"
    assert "half of the time" not in log  # the warning of torchrun's restarts
    staged = [line for line in log.splitlines() if "copied" in line and ".npy" in line]
    assert len(staged) == 2 * 2  # by each node at each start
    assert not list(Path(setting["TMPDIR"]).glob("saddle-*"))
    assert str(folder) in (tmp_path / "out" / f"{job}.out").read_text()
    whole = ["--runs", str(tmp_path / "whole"), "--run-name", "it"]
    train("dcgan_digits", *TOY, *whole, ranks=2)
    unbroken = final_state(tmp_path / "whole" / "dcgan_digits" / "it")
    assert not differences(unbroken, final_state(folder))


def test_an_array_trains_a_run_for_each_seed(cluster, setting):
    recipe = "cyclegan_horse2zebra"  # the job file's own
    flags = [*toy(recipe)[1], "--compile", "off", "--steps", "3"]
    own = setting | {"RECIPE": ""}
    array = cluster.submit("--array=3-4", *CPUS, "slurm/cyclegan.sh", *flags, **own)
    for seed in (3, 4):
        folder = run_of(setting, f"job{array}_{seed}", recipe)
        finished(cluster, f"{array}_{seed}", folder)
        assert json.loads((folder / "recipe.json").read_text())["values"]["seed"] == seed
    states = [final_state(run_of(setting, f"job{array}_{seed}", recipe)) for seed in (3, 4)]
    assert differences(*states)


def test_tasks_of_srun_find_each_other_and_ignore_the_batch_scripts_variables(cluster, setting):
    flags = ["dcgan_digits", *TOY, "--runs", setting["RUNS"], "--run-name", "it", "--steps", "5"]
    steps = ["srun", "--nodes=2", "--ntasks=2", sys.executable, "-m", "engine.train"]
    cluster.run(*steps, *flags, **setting)
    assert world_size(run_of(setting, "it")) == 2
    assert final_state(run_of(setting, "it"))


def test_the_name_of_a_run_is_the_job_files_affair(cluster, setting, tmp_path):
    job = cluster.submit(*CPUS, "slurm/dcgan.sh", "--run-name", "mine", **setting)
    assert cluster.wait(job, "FAILED", "COMPLETED") == "FAILED"
    assert "RUN_NAME" in (tmp_path / "out" / f"{job}.out").read_text()


def test_a_cancelled_job_stays_cancelled(cluster, setting):
    job = cluster.submit(*CPUS, "slurm/dcgan.sh", *TOY, "--steps", "100000", **setting)
    folder = run_of(setting, f"job{job}")
    wait_until(lambda: trains(folder), 240)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.run("scancel", job)
    time.sleep(8)  # longer than it takes to end and to be queued again
    assert cluster.state(job)["JobState"] == "CANCELLED"


README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^(?:sbatch|srun) .*$", README, re.M)


@pytest.mark.parametrize("line", COMMANDS)
def test_slurm_takes_the_commands_that_readme_names(line, cluster, setting):
    program, *words = line.split()
    cluster.run(program, "--test-only", *words, **setting)


def test_every_job_file_gives_way_in_time():
    files = sorted(p for p in (ROOT / "slurm").glob("*.sh") if p.name != "train.sh")
    assert len(files) >= 2
    for file in files:
        text = file.read_text()
        assert f"--signal={signal.SIGUSR1.name.removeprefix('SIG')}@120" in text
        assert "--requeue" in text and "slurm/train.sh" in text
