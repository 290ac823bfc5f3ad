"""A real Slurm on this machine: a controller and two nodes, each of 16 CPUs and 8 GPUs in name."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.runs import ROOT

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("n1", "n2")
SETTINGS = """
ClusterName=saddle
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
KillWait=5
BatchStartTimeout=30
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 Gres=gpu:8 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16 Gres=gpu:8 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing() -> list[str]:
    """Slurm's programs that are not on this machine; its daemons lie outside users' PATH."""
    return [name for name in PROGRAMS if not shutil.which(name, path=_path())]


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin"


@dataclass
class Cluster:
    """A running Slurm; `environment` leads its commands to it."""

    folder: Path
    environment: dict[str, str]

    def ask(self, *command: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands."""
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=self.environment | extra,
            timeout=300,
        )

    def run(self, *command: str, **extra: str) -> str:
        """Output of a command. Fails if the command does."""
        done = self.ask(*command, **extra)
        assert done.returncode == 0, "\n".join(
            (" ".join(command), done.stdout, done.stderr, self.logs())
        )
        return done.stdout + done.stderr

    def submit(self, *arguments: str, **extra: str) -> str:
        """Number of a submitted job."""
        return self.run("sbatch", "--parsable", *arguments, **extra).strip()

    def state(self, job: str) -> dict[str, str]:
        """What Slurm says of a job."""
        said = self.run("scontrol", "show", "job", "--oneliner", job)
        return dict(fact.split("=", 1) for fact in said.split() if "=" in fact)

    def wait(self, job: str, *states: str, seconds: float = 300) -> str:
        """The state of a job once it is one of these."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)["JobState"]) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state}\n{self.logs()}"
            time.sleep(0.2)
        return state

    def logs(self) -> str:
        """The last words of the controller and the nodes."""
        logs = sorted(self.folder.glob("slurm*.log"))
        return "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in logs)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """Start Slurm with all it writes in a folder, wait until both nodes are idle; end it."""
    host = socket.gethostname()
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    (folder / "state").mkdir(parents=True)
    text = SETTINGS.format(host=host, user=user, folder=folder, ports=_free_ports(3))
    (folder / "slurm.conf").write_text(text)
    for number in range(8):  # Slurm counts GPUs by their files, whatever these are
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    own |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path(), "OMP_NUM_THREADS": "1"}
    cluster = Cluster(folder, own)
    daemons = [["slurmctld", "-D", "-i", "-c"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    with contextlib.ExitStack() as exits:
        for daemon in daemons:
            exits.enter_context(_kept_running(daemon, own, folder / f"out-{daemon[-1]}.log"))
        _wait_for_nodes(cluster)
        exits.callback(_cancel_all, cluster, user)
        yield cluster


@contextlib.contextmanager
def _kept_running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("w") as file:
        daemon = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        yield
    finally:
        daemon.terminate()
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _wait_for_nodes(cluster: Cluster) -> None:
    deadline = time.monotonic() + 30
    idle = ("sinfo", "-h", "-N", "-t", "idle", "-o", "%N")
    while sorted(cluster.ask(*idle).stdout.split()) != list(NODES):
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.1)


def _cancel_all(cluster: Cluster, user: str) -> None:
    """End every job, so that no process of one outlives the daemons."""
    cluster.run("scancel", f"--user={user}")
    deadline = time.monotonic() + 30
    while cluster.run("squeue", "-h").strip() and time.monotonic() < deadline:
        time.sleep(0.2)
