"""The doctor as a user starts it: alone, under torchrun, and where ranks differ or are lost."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.findings import FAIL, OK, WARN
from tests.images import images
from tests.runs import ROOT, environment


def run(*arguments: str, ranks: int = 1, launcher: tuple[str, ...] = (), code: int = 0, **extra):
    """(findings by check, output) of a real command."""
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += [*launcher] + ([] if arguments[0].endswith(".py") else ["-m"])
    done = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT), **extra),
        timeout=200,
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    file = next((a for a in arguments if a.endswith(".json")), None)
    listed = json.loads(Path(file).read_text())["findings"] if file else []
    return {f["check"]: f for f in listed}, output


def test_a_recipe_that_can_be_trained_passes(tmp_path):
    flags = ["--runs", f"{tmp_path}/runs", "--json", f"{tmp_path}/found.json"]
    found, output = run("launch.doctor", "dcgan_digits", *flags)
    assert {f["status"] for f in found.values()} <= {OK, WARN}
    for check in ("python", "torch", "ffcv", "GPUs", "dataset", "host memory", "disk for runs"):
        assert check in found and check in output
    assert " images; " in found["dataset"]["text"]
    assert "0 fail" in output
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"]  # nothing was started


DEVIATING = """
import os, socket, sys, time
from launch import between, checks, doctor
from engine.world import leave

if os.environ["RANK"] == "1":
    known, now = checks.version, time.time
    checks.version = lambda name: "1.0" if name == "torch" else known(name)
    between.time.time = lambda: now() - 100
    os.environ["SADDLE_DATA"] = "/nowhere"
    socket.gethostname = lambda: "elsewhere"
    os.chdir("/")
between.PLAUSIBLE["cpu", True] = (1e9, "more than there is")
leave(doctor.main(sys.argv[1:]))
"""


def test_two_ranks_under_torchrun_agree(tmp_path):
    flags = ["dcgan_digits", "--data.cache", str(tmp_path), "--json", f"{tmp_path}/found.json"]
    found, output = run(*("launch.doctor", *flags), ranks=2, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert found["ranks"]["text"] == "all 2 came" and found["clocks"]["status"] == OK
    assert "GB/s" in found["all-reduce"]["text"] and "latency" in found["all-reduce"]["text"]
    assert found["launcher"]["status"] == OK
    assert "2 ranks here" in found["host memory"]["text"]
    assert output.count("python   ") == 1  # rank 0 alone shows


def test_two_ranks_that_differ_are_told_apart(tmp_path):
    script, file = tmp_path / "deviating.py", tmp_path / "found.json"
    script.write_text(DEVIATING)
    flags = ["dcgan_digits", "--data.name", "celeba", "--json", str(file)]
    images(tmp_path / "celeba" / "img_align_celeba", 5, (200, 200), 1)
    found, output = run(
        *(str(script), *flags),
        ranks=2,
        launcher=("--max-restarts=1",),
        code=1,
        SADDLE_DATA=str(tmp_path),
    )
    assert found["torch"]["status"] == FAIL and "rank 1 on elsewhere" in found["torch"]["text"]
    assert found["torch"]["text"].endswith(": 1.0")
    assert found["clocks"]["status"] == FAIL and "rank 1 on" in found["clocks"]["text"]
    assert "100.0 s behind" in found["clocks"]["text"]
    assert found["dataset"]["status"] == FAIL and "/nowhere" in found["dataset"]["text"]
    assert "5 images" in found["dataset"]["text"].splitlines()[0]
    assert found["all-reduce"]["status"] == WARN
    assert found["ranks"]["text"] == "all 2 came on 2 hosts"
    folder = found["shared runs folder"]
    assert folder["status"] == FAIL and folder["text"].endswith("/ is not rank 0's")
    assert not list(ROOT.rglob(".doctor-*"))
    assert found["launcher"]["status"] == WARN
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in found["launcher"]["remedy"]
    assert found["accelerate"]["status"] == OK
    assert output.count("all-reduce") == 1  # the restart adds nothing


LOST = """
import os, sys
from launch import between, checks, doctor
from launch.findings import Check
from engine.world import leave

between.MEETING_S = 5
doctor.MEETING_S = 8
if os.environ["RANK"] == "1":
    doctor.LOCAL = (*doctor.LOCAL, Check("death", lambda case: os._exit(3)))
leave(doctor.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("there", [(0,), (0, 1)])
def test_a_rank_that_never_comes_or_dies_hides_nothing(there, tmp_path):
    script, file = tmp_path / "lost.py", tmp_path / "found.json"
    script.write_text(LOST)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    flags = ["dcgan_digits", "--json", str(file)]
    started = [
        subprocess.Popen(
            [sys.executable, str(script), *flags],
            cwd=ROOT,
            env=environment(PYTHONPATH=str(ROOT), RANK=str(r), LOCAL_RANK=str(r), **place),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in there
    ]
    output, _ = started[0].communicate(timeout=120)
    for process in started[1:]:
        process.communicate(timeout=60)
    assert started[0].returncode == 1, output
    assert "Traceback" not in output
    listed = json.loads(file.read_text())["findings"]
    lost = [f for f in listed if f["check"] == "ranks" and f["status"] == FAIL]
    assert len(lost) == 1 and lost[0]["remedy"]
    assert {"torch", "dataset", "compiler", "launcher"} <= {f["check"] for f in listed}
