"""Processes that die, hang or come in another number: does the same command go on, and say so?

Real processes through the real launcher; `tests/dying.py` lets the fault strike at its moment.
"""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from engine import checkpoint, run
from tests.dying import Fault, command
from tests.forked import train
from tests.runs import (
    QUICK,
    ROOT,
    differences,
    environment,
    final_state,
    run_folder,
    start,
    toy,
    wait_for,
)

NAME, BATCH, STEPS = "dcgan_digits", 8, 10
SHARED = "shared.safetensors"
NOBODY = 65534
LAUNCHER = {
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # the shared store fails every second restart
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2",  # a stopped process does not hear SIGTERM
}


def flags(runs: Path, steps: int = STEPS) -> list[str]:
    """A toy run with a checkpoint every second step, all kept."""
    often = ["--checkpoint-every", str(2 * BATCH / 1000), "--keep", "1000"]
    often += ["--compile", "off", "--runs", str(runs), "--run-name", "it", "--steps", str(steps)]
    return [*toy(NAME, BATCH)[1], *QUICK, *often]


def at(runs: Path, kind: str, rank: int, images: int, doing: str, wait_s: float = 0.0) -> Fault:
    """A fault that waits for the last checkpoint before it."""
    saved = (images - 1) // (2 * BATCH) * 2 * BATCH
    after = runs / NAME / "it" / "checkpoints" / f"{saved:09}" / checkpoint.INDEX
    return Fault(kind, rank, images, doing, str(runs / f"struck-{images}"), str(after), wait_s)


def suffer(runs: Path, *faults: Fault, hang_after: float = 600.0) -> str:
    """Run on two ranks to the end, through the faults and the launcher's restarts; the output."""
    settings = [*flags(runs), "--hang-after", str(hang_after)]
    done = subprocess.run(
        command(list(faults), NAME, *settings, launcher=("--max-restarts=2",)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(**LAUNCHER),
        timeout=400,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Every tensor at the end of the run that nothing befell, on two ranks."""
    runs = tmp_path_factory.mktemp("unbroken")
    train(NAME, *flags(runs), ranks=2)
    return final_state(run_folder(runs, NAME))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.repeated)])
def test_a_rank_killed_in_mid_step_is_restarted_with_the_others_to_the_same_end(
    rank, unbroken, tmp_path
):
    output = suffer(tmp_path, at(tmp_path, "kill", rank, 5 * BATCH, "generator"))
    assert f"from {4 * BATCH} images" in output
    assert not differences(unbroken, final_state(run_folder(tmp_path, NAME)))


@pytest.mark.slow
def test_two_kills_of_one_run_are_survived(unbroken, tmp_path):
    first = at(tmp_path, "kill", 1, 3 * BATCH, "discriminator")
    output = suffer(tmp_path, first, at(tmp_path, "kill", 0, 7 * BATCH, "step"))
    assert f"from {2 * BATCH} images" in output and f"from {6 * BATCH} images" in output
    assert not differences(unbroken, final_state(run_folder(tmp_path, NAME)))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.repeated)])
def test_rank_0_or_1_killed_while_saving_leaves_the_checkpoint_before_it(rank, unbroken, tmp_path):
    moment = "rename" if rank == 0 else "saving"  # rank 0 alone gives a checkpoint its name
    output = suffer(tmp_path, at(tmp_path, "kill", rank, 6 * BATCH, moment))
    assert f"from {4 * BATCH} images" in output
    folder = run_folder(tmp_path, NAME)
    assert not differences(unbroken, final_state(folder))
    assert not list((folder / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        pytest.param("stop", 1, marks=pytest.mark.repeated),
        pytest.param("stop", 0, marks=pytest.mark.repeated),
        ("hang", 1),
    ],
)
def test_a_hung_rank_is_named_and_all_are_restarted_to_the_same_end(kind, rank, unbroken, tmp_path):
    hang = at(tmp_path, kind, rank, 5 * BATCH, "generator", wait_s=2.0)
    output = suffer(tmp_path, hang, hang_after=10.0)
    (line,) = [text for text in output.splitlines() if "(--hang-after 10)" in text]
    assert line.startswith(f"error: rank {rank} on ") and ", pid " in line
    assert "hangs in the update of the generator, iteration 6" in line
    assert ("no sign of life" in line) == (kind == "stop")
    assert f"from {4 * BATCH} images" in output
    folder = run_folder(tmp_path, NAME)
    assert not differences(unbroken, final_state(folder))
    assert not (folder / "ranks").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_ranks_lost_or_won_and_says_so(before, after, unbroken, tmp_path):
    train(NAME, *flags(tmp_path, steps=4), ranks=before)
    output = train(NAME, *flags(tmp_path), ranks=after)
    said = f"from {4 * BATCH} images, trained on {before} rank(s) until there, now on {after}"
    assert said in output
    folder = run_folder(tmp_path, NAME)
    assert checkpoint.listing(folder / "checkpoints")[0].name == f"{STEPS * BATCH:09}"
    assert all(t.isfinite().all() for t in final_state(folder).values())
    again = train(NAME, *flags(tmp_path), ranks=after)
    assert "is finished" in again


# checkpoints that are listed but cannot be read; tests/test_checkpoint_damage.py has more of them


def _file_for_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"not a folder")


def _folder_for_index(path: Path) -> None:
    (path / checkpoint.INDEX).unlink()
    (path / checkpoint.INDEX).mkdir()


def _loop_for_part(path: Path) -> None:
    (path / SHARED).unlink()
    (path / SHARED).symlink_to(SHARED)


UNREADABLE = {
    "a file in place of a folder": (_file_for_folder, "Not a directory"),
    "a folder in place of a file": (_folder_for_index, "Is a directory"),
    "a file that cannot be opened": (_loop_for_part, "symbolic links"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_checkpoint_that_cannot_be_read_is_named_and_the_one_before_it_used(kind, three):
    harm, words = UNREADABLE[kind]
    harm(three[2])
    said: list[str] = []
    assert checkpoint.newest_whole(three[0].parent, said.append, set_aside=True) == three[1]
    assert len(said) == 1 and three[2].name in said[0] and words in said[0]


def test_a_checkpoint_that_one_may_not_read_is_named_and_the_one_before_it_used(three):
    """As nobody where tests run as root, whom no permission stops."""
    before, said = os.geteuid(), []
    with tempfile.TemporaryDirectory() as place:  # nobody could not enter root's tmp_path
        folder = Path(shutil.copytree(three[0].parent, Path(place) / "checkpoints"))
        newest, last, _ = checkpoint.listing(folder)
        (newest / SHARED).chmod(0)
        for path in (folder.parent, *folder.parent.rglob("*")) if before == 0 else ():
            os.chown(path, NOBODY, -1)
        if before == 0:
            os.seteuid(NOBODY)
        try:
            found = checkpoint.newest_whole(folder, said.append, set_aside=True)
        finally:
            os.seteuid(before)
    assert found == last
    assert len(said) == 1 and newest.name in said[0] and "Permission denied" in said[0]


def test_two_commands_for_one_run_leave_the_first_unharmed(tmp_path):
    """While the first trains, the second is refused; the first ends as if alone."""
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    train(NAME, *flags(whole))
    settings = flags(shared)
    pause = Fault("stop", 0, 5 * BATCH, "generator", str(tmp_path / "struck"))
    first = subprocess.Popen(
        command([pause], NAME, *settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    try:
        wait_for(tmp_path / "struck", first)
        while psutil.Process(first.pid).status() != psutil.STATUS_STOPPED:
            assert first.poll() is None
        output = train(NAME, *settings, code=1)
        assert f"{shared / NAME / 'it'} is being trained by another process" in output
        assert "Traceback" not in output
        first.send_signal(signal.SIGCONT)
        first.communicate(timeout=120)
    finally:
        first.kill()
        first.wait()
    assert first.returncode == 0
    folders = [run_folder(runs, NAME) for runs in (whole, shared)]
    assert not differences(*map(final_state, folders))
    lines = (folders[1] / "stats.jsonl").read_text().splitlines()
    assert "resume" not in {json.loads(line).get("event") for line in lines}


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_save_and_leave(tmp_path):
    folder = tmp_path / NAME / "it" / "checkpoints"
    agent = start(NAME, *flags(tmp_path, steps=100_000), ranks=2)
    wait_for(folder / f"{2 * BATCH:09}" / checkpoint.INDEX, agent)
    ranks = psutil.Process(agent.pid).children(recursive=True)
    agent.kill()
    agent.wait()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    agent.stdout.close()
    assert len(ranks) >= 2 and not alive
    newest = checkpoint.newest_whole(folder, print)
    assert int(newest.name) > 2 * BATCH


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_reason_not_to_train(number, tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    with run.locked(tmp_path / "a") as held:
        assert held
    monkeypatch.setattr(fcntl, "flock", refuse)
    with run.locked(tmp_path / "b") as held:
        assert not held


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "more"),
    [
        pytest.param(10, ["--preload"], marks=pytest.mark.repeated),
        (3, ["--ranks", "2", "--steps", "60"]),
    ],
)
def test_a_soak_of_kills_loses_no_checkpoint_and_ends_equal(kills, more, tmp_path):
    line = ["-m", "bench.soak", "--kills", str(kills), *more]
    done = subprocess.run(
        [sys.executable, *line, "--json", str(tmp_path / "soak.json")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=590,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    account = json.loads((tmp_path / "soak.json").read_text())
    assert account["kills"] == kills and account["ended"] >= 1
    assert (account["lost"], account["unequal"], account["troubles"]) == (0, 0, [])
