"""Runs in forks of a process that has imported everything: as real as tests.runs', but the seconds
of importing are spent once. A rank finds its place as under torchrun, without torchrun.
"""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile

from pipelines.workers import SIGNALS, shielded
from tests.runs import ROOT, environment

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["engine.train", "tests.runs"])


class Run:
    """A run of the command in a process group of its own, handled as a subprocess.Popen is."""

    def __init__(self, *arguments: str, rank: int = 0, ranks: int = 1, port: int = 0, **extra: str):
        descriptor, log = tempfile.mkstemp(suffix=".log")
        self.stdout = os.fdopen(descriptor)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        variables = {name: str(value) for name, value in place.items()} if ranks > 1 else {}
        variables |= {"MASTER_ADDR": "127.0.0.1"} | environment(**extra)
        self._process = CONTEXT.Process(target=_run, args=(arguments, log, variables))
        with shielded():  # the fork server is the process's only one: it may serve a pipeline too
            self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit code, None while it lives."""
        return self._process.exitcode

    def wait(self, seconds: float = 300) -> int:
        """Its exit code, once it has one."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
        return self._process.exitcode


def _run(arguments: tuple[str, ...], log: str, variables: dict[str, str]) -> None:
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.unlink(log)
    os.chdir(ROOT)
    os.environ.clear()  # of the fork server, which another test may have started
    os.environ.update(variables)
    sys.argv = ["engine.train", *arguments]
    import torch

    from engine.train import main
    from engine.world import leave

    torch.set_num_threads(1)
    leave(main(list(arguments)))


def train(*arguments: str, ranks: int = 1, code: int = 0, **extra: str) -> str:
    """Run to the end; its output. Fails if a rank ends with another exit code."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = [Run(*arguments, rank=r, ranks=ranks, port=port, **extra) for r in range(ranks)]
    codes = [process.wait() for process in processes]
    output = "".join(process.stdout.read() for process in processes)
    assert codes == [code] * ranks, output
    return output
