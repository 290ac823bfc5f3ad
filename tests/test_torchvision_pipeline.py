"""The torchvision pipeline: do its workers outlive signals, do they end with every kind of run, and
does its memory stay?"""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest

from tests.batches import clock_of, opened


def test_workers_outlive_signals_and_end_with_the_pipeline(data):
    data = replace(data, pipeline="torchvision", workers=2)
    clock, before = clock_of(data), multiprocessing.active_children()
    pipeline = opened(data, clock)
    pipeline.ready(clock)
    workers = [worker for worker in multiprocessing.active_children() if worker not in before]
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGTERM):
        for pid in (*(worker.pid for worker in workers), forkserver._forkserver._forkserver_pid):
            os.kill(pid, number)
    time.sleep(0.2)
    for _ in range(12):
        clock.advance()
        pipeline.ready(clock)
    assert all(worker.is_alive() for worker in workers)
    pipeline.close()
    for worker in workers:
        worker.join(10)
    assert not any(worker.is_alive() for worker in workers)


LEFT_OPEN = """
import os, signal, sys, torch
from multiprocessing import active_children
from pathlib import Path
from kernels import philox
from pipelines.batch import Clock
from pipelines.datasets import find
from pipelines.open import open_pipeline
from pipelines.settings import Data

if __name__ == "__main__":
    data = Data(name="folder", path=Path(sys.argv[1]), batch=2, pipeline="torchvision", workers=2)
    clock = Clock(2, torch.device("cpu"))
    pipeline = open_pipeline(find(data), data, clock, 3, philox.make_key(5))
    pipeline.ready(clock)
    pipeline.cycle = pipeline
    print(*(worker.pid for worker in active_children()), flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "raises":
        raise KeyError
    del pipeline
"""


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie that waits for its new parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("end", ["killed", "raises", "forgotten"])
def test_no_worker_outlives_a_run_that_did_not_close(data, tmp_path, end):
    script = tmp_path / "left_open.py"
    script.write_text(LEFT_OPEN)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(script), str(data.path), end]
    # communicate() returns once no process holds the pipe any more, the fork server included
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        pids = [int(pid) for pid in process.communicate(timeout=180)[0].split()]
    assert len(pids) == 2 and not any(runs(pid) for pid in pids)


@pytest.mark.parametrize("workers", [0, 2])
def test_host_memory_does_not_grow(data, workers):
    """Of this process and its workers, over sixty epochs after a hundred."""
    data = replace(data, pipeline="torchvision", workers=workers, resolution=128)
    clock = clock_of(data)
    pipeline = opened(data, clock)
    me, memory = psutil.Process(), []
    for _ in range(8):
        for _ in range(20 * 22 // 8):
            pipeline.ready(clock)
            pipeline.batch(clock)
            clock.advance()
        gc.collect()
        everyone = [me, *me.children(recursive=True)]
        memory.append(sum(p.memory_full_info().uss for p in everyone))
    pipeline.close()
    assert memory[-1] - memory[4] < 8 << 20, memory
