"""Does a process know its place under every launcher, and train with the others that it started?"""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import early_signal, recipe, sharing, world
from engine.precision import choose_precision
from engine.signals import StopRequest
from launch import environment, stage
from pipelines.settings import Data
from tests.forked import train
from tests.runs import (
    QUICK,
    ROOT,
    differences,
    final_state,
    run_folder,
    start,
    toy,
    wait_until,
    world_size,
)
from tests.runs import environment as with_one_thread

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = ALLOCATION | {
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


@pytest.fixture
def launched(monkeypatch):
    """Sets the variables of a launcher, and no others."""
    monkeypatch.setattr(os, "environ", {k: os.environ[k] for k in ("PATH", "HOME")})
    return os.environ.update


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 0, 1)),
        (TORCHRUN, (5, 1, 8)),
        (ALLOCATION, (0, 0, 1)),
        (STEP, (3, 1, 4)),
        (STEP | {"WORLD_SIZE": "4", "MASTER_ADDR": "n1"}, (3, 1, 4)),  # as many batch scripts say
        (STEP | TORCHRUN, (5, 1, 8)),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (0, 0, 1)),
        (STEP | {"SLURM_PTY_PORT": "4711"}, (0, 0, 1)),
    ],
    ids=["alone", "torchrun", "batch", "srun", "told", "torchrun-in-srun", "one-task", "shell"],
)
def test_place(variables, place, launched):
    launched(variables)
    assert environment.place() == world.environment() == place


def test_tasks_of_srun_meet_at_the_first_nodes_address(launched, monkeypatch):
    answers = {"hostnames": "n1\nn2\n", "node": "NodeName=n1 Arch=x\n   NodeAddr=10.0.0.1 Port=1\n"}
    monkeypatch.setattr(environment, "_ask", lambda kind, _name: answers[kind])
    launched(STEP)
    environment.set_meeting_place()
    assert os.environ["MASTER_ADDR"] == "10.0.0.1"
    assert int(os.environ["MASTER_PORT"]) in environment.PORTS
    assert [os.environ[n] for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["3", "1", "4"]


def test_a_meeting_place_that_was_set_is_kept_and_slurm_not_asked(launched):
    launched(STEP | {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "4711"})
    environment.set_meeting_place()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.9", "4711")


def test_without_scontrol_the_remedy_is_named(launched):
    launched(STEP | {"PATH": "/nowhere"})
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        environment.set_meeting_place()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}, None),
        ({"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "False"}, None),
        (
            {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"},
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, None),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "--multi_gpu"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "true"}, "others are not"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron"),
    ],
)
def test_doubts(variables, words, launched):
    launched(variables)
    doubts = environment.doubts()
    assert words in doubts[0] if words else not doubts


def test_accelerates_precision_is_taken_unless_the_recipe_has_one(launched):
    launched({"ACCELERATE_MIXED_PRECISION": "bf16"})
    cpu = torch.device("cpu")
    chosen = choose_precision("auto", cpu)
    assert (chosen.name, chosen.reason) == ("bf16", "accelerate's mixed_precision")
    assert choose_precision("fp32", cpu).reason == "as asked"
    launched({"ACCELERATE_MIXED_PRECISION": "no"})
    assert "accelerate" not in choose_precision("auto", cpu).reason
    for other in ("fp16", "fp8"):
        launched({"ACCELERATE_MIXED_PRECISION": other})
        with pytest.raises(ValueError, match="--precision bf16"):
            choose_precision("auto", cpu)


@pytest.mark.parametrize(
    ("variables", "way"),
    [
        ({}, "ddp"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed-zero2"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "deepspeed-zero3",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "ddp"),
    ],
)
def test_accelerates_way_of_sharing_is_taken_unless_the_recipe_has_one(variables, way, launched):
    launched(variables)
    given = recipe.load("vae_mnist")
    assert sharing.settled(given).parallel == way
    assert sharing.settled(replace(given, parallel="deepspeed-zero1")).parallel == "deepspeed-zero1"


def test_accelerates_cpu_keeps_off_the_gpus(launched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    launched({"ACCELERATE_USE_CPU": "False"})
    assert world.choose_device("auto").type == "cuda"
    launched({"ACCELERATE_USE_CPU": "True"})
    assert world.choose_device("auto").type == "cpu"
    assert world.choose_device("cuda").type == "cuda"


def test_a_request_during_the_imports_is_remembered(monkeypatch):
    before = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(early_signal, "came", False)
    try:
        early_signal.listen()
        os.kill(os.getpid(), signal.SIGUSR1)
        stop = StopRequest()
        stop.restore()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert stop.signal == signal.SIGUSR1


def listens(pid: int) -> bool:
    """Whether a process has a handler for SIGUSR1."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(int(mask, 16) >> (signal.SIGUSR1 - 1) & 1)


def test_sigusr1_at_once_stops_the_run_leaves_the_marker_and_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("SADDLE_STOPPED", str(tmp_path / "stopped"))
    flags = [*toy("dcgan_digits")[1], *QUICK, "--steps", "30", "--run-name", "it"]
    broken = ["dcgan_digits", *flags, "--runs", str(tmp_path / "broken")]
    process = start(*broken)
    wait_until(lambda: listens(process.pid))
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped at 8 of 240" in output, output
    assert (tmp_path / "stopped").exists()
    (tmp_path / "stopped").unlink()
    assert "from 8 images" in train(*broken)
    assert not (tmp_path / "stopped").exists()
    train("dcgan_digits", *flags, "--runs", str(tmp_path / "whole"))
    folders = (run_folder(tmp_path / runs, "dcgan_digits") for runs in ("broken", "whole"))
    assert not differences(*(final_state(folder) for folder in folders))


def test_sigterm_leaves_no_marker(tmp_path, monkeypatch):
    """Who cancels a job does not want it back."""
    monkeypatch.setenv("SADDLE_STOPPED", str(tmp_path / "stopped"))
    stop = StopRequest()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        stop.leave_marker()
    finally:
        stop.restore()
    assert stop.signal == signal.SIGTERM and not (tmp_path / "stopped").exists()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_nodes_of_torchrun_train_what_one_with_two_ranks_does(tmp_path):
    flags = [*toy("dcgan_digits")[1], *QUICK, "--compile", "off", "--steps", "5"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    launch += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    here = ["-m", "engine.train", "dcgan_digits", *flags, "--runs", str(tmp_path / "two")]
    nodes = [
        subprocess.Popen(
            [*launch, *here],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=with_one_thread(),
        )
        for _ in range(2)
    ]
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert world_size(run_folder(tmp_path / "two", "dcgan_digits")) == 2
    train("dcgan_digits", *flags, "--runs", str(tmp_path / "one"), ranks=2)
    folders = (run_folder(tmp_path / runs, "dcgan_digits") for runs in ("one", "two"))
    assert not differences(*(final_state(folder) for folder in folders))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("MULTI_GPU", "ddp"),
        ("FSDP\nfsdp_config: {fsdp_version: 2}", "fsdp2"),
        pytest.param(
            "DEEPSPEED\ndeepspeed_config: {zero_stage: 1}",
            "deepspeed-zero1",
            marks=pytest.mark.repeated,
        ),
    ],
)
def test_accelerate_launches_two_ranks_in_its_precision_and_way(kind, way, tmp_path):
    config = tmp_path / "accelerate.yaml"
    config.write_text(
        f"compute_environment: LOCAL_MACHINE\ndistributed_type: {kind}\nmixed_precision: bf16\n"
        f"num_machines: 1\nnum_processes: 2\nmachine_rank: 0\nmain_process_port: {free_port()}\n"
    )
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    flags = [*toy("dcgan_digits")[1], *QUICK, "--compile", "off", "--steps", "3"]
    flags += ["--runs", str(tmp_path / "runs")]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "engine.train", "dcgan_digits", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=with_one_thread(),
        timeout=500,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert world_size(run_folder(tmp_path / "runs", "dcgan_digits")) == 2
    assert "precision: bf16 (accelerate's mixed_precision)" in output
    assert f"{way}, 4 images each" in output
    assert final_state(run_folder(tmp_path / "runs", "dcgan_digits"))


def test_staging_packs_once_in_the_shared_cache_and_copies(tmp_path, monkeypatch, capsys):
    shared, disk = tmp_path / "shared", tmp_path / "disk"
    monkeypatch.setenv("SADDLE_CACHE", str(shared))
    for node in ("1", "2"):
        assert stage.main([str(disk / node), "dcgan_digits", "--seed", "3"]) == 0
    assert capsys.readouterr().out.count("packed 1,797 images") == 1
    names = {p.name for p in shared.iterdir() if p.suffix in (".npy", ".json")}
    for node in ("1", "2"):
        assert {p.name for p in (disk / node).iterdir()} == names and len(names) == 2
        assert not any(p.is_symlink() for p in (disk / node).iterdir())


def test_staging_links_what_the_disk_has_no_room_for(tmp_path, monkeypatch):
    monkeypatch.setenv("SADDLE_CACHE", str(tmp_path / "shared"))
    monkeypatch.setattr(stage, "SPARE", 1.0)
    lines = stage.stage(Data(name="digits", resolution=8, channels=1), tmp_path / "disk")
    assert all("linked" in line for line in lines)
    (made,) = (tmp_path / "disk").glob("*.npy")
    assert made.is_symlink() and made.stat().st_size > 0


def test_staging_says_what_stands_against_it(tmp_path, capsys):
    assert stage.main([str(tmp_path), "dcgan_digits", "--data.cache", str(tmp_path)]) == 1
    assert "--data.cache" in capsys.readouterr().err
