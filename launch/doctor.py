"""Look before a long run: python -m launch.doctor [RECIPE] [overrides] [--json FILE]

Takes the recipe and overrides of engine.train, alone or under torchrun, and says of machine,
network, dataset and memory what is ok, what to be warned of and what would fail, each with its
remedy; it starts no training. Exit code: 0 if nothing fails, 1 if something does, 2 for a wrong
command.

    python -m launch.doctor --warm RECIPE [overrides] [--compile-artifact FILE]

compiles instead what training would compile, on as many ranks, so that it is found in the cache;
and writes it to FILE, for engine.train --compile-artifact FILE on other machines of this kind.
"""

import contextlib
import os
import socket
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from engine import recipe as recipes
from engine.start import PATIENCE_S, fail
from engine.world import choose_device, environment, leave
from launch import between, checks, needs, warm
from launch.findings import FAIL, OK, Case, Check, Finding, attempt, merge, show, write_json

LOCAL = (
    Check("versions", checks.versions, 60),
    Check("settings", checks.settings),
    Check("GPUs", checks.gpus, 60, "the driver hangs: see nvidia-smi and dmesg"),
    Check("runs folder", checks.runs_disk),
    Check("cache folder", checks.cache_disk),
    Check("dataset", checks.dataset, 120),
    Check("memory", needs.memory, 120, "the recipe is too large to be counted in time"),
    Check("disk", needs.disk, 120),
    Check("compiler", checks.compiler),
    Check("compile cache", checks.compile_cache),
    Check("launcher", checks.launcher),
)
MEETING_S = between.MEETING_S + 10
NETWORK_S = 60
NETWORK = "see firewall and interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO)"


class Team:
    """The ranks that examine together; group: over which they tell what they found, once met."""

    def __init__(self) -> None:
        self.rank, _, self.size = environment()
        self.group: dist.ProcessGroup | None = None
        self.hosts = [socket.gethostname()]

    def meet(self, case: Case) -> list[Finding]:
        """Join the others; part of a check."""
        patience = 60 + 2 * NETWORK_S + sum(check.limit_s for check in LOCAL)
        group, hosts = between.meet(case.device, patience), [""] * self.size
        dist.all_gather_object(hosts, self.hosts[0], group=group)
        self.group, self.hosts = group, hosts
        several = f" on {len(set(hosts))} hosts" if len(set(hosts)) > 1 else ""
        return [Finding("ranks", OK, f"all {self.size} came{several}")]

    def settle(self) -> None:
        """Wait until rank 0 has shown what was found: a launcher ends it when another rank ends."""
        if self.size == 1:
            return
        if self.group is None:
            time.sleep(PATIENCE_S if self.rank else 0)
            return
        with contextlib.suppress(RuntimeError):  # one of us is lost
            dist.barrier(group=self.group)


def examine(case: Case, team: Team) -> list[Finding]:
    """Every check on this rank, merged with what the other ranks found."""
    found: list[Finding] = []
    if team.size > 1:
        found += attempt(Check("ranks", team.meet, MEETING_S, NETWORK), case)
    if team.group:
        case = replace(case, ranks_here=team.hosts.count(socket.gethostname()))
        found += _network(case, team.group, several_hosts=len(set(team.hosts)) > 1)
    found += [f for check in LOCAL for f in attempt(check, case)]
    return _gather(found, team) if team.group else found


def _network(case: Case, group: dist.ProcessGroup, several_hosts: bool) -> list[Finding]:
    """The checks that ranks make together, in this order on all of them."""
    together = {
        "all-reduce": partial(between.bandwidth, several_hosts=several_hosts),
        "clocks": partial(between.clocks, group=group),
    }
    if several_hosts:
        together["shared runs folder"] = partial(between.one_folder, group=group)
    named = (Check(name, find, NETWORK_S, NETWORK) for name, find in together.items())
    return [f for check in named for f in attempt(check, case)]


def _gather(found: list[Finding], team: Team) -> list[Finding]:
    """What all ranks found, merged; this rank's own if another is lost."""
    place = f"rank {team.rank} on {socket.gethostname()}"
    reports: list[tuple[str, list[Finding]]] = [("", [])] * team.size
    try:
        dist.all_gather_object(reports, (place, found), group=team.group)
    except RuntimeError as error:
        text = f"one was lost before it told what it found: {str(error).splitlines()[0][:200]}"
        return [*found, Finding("ranks", FAIL, text, "see its output above")]
    return merge(reports)


def read(arguments: list[str]) -> tuple[Case, Path | None]:
    """The case, and where to write JSON. Raises ValueError; exits with code 2 on a bad override."""
    arguments, path = _json(arguments)
    if not arguments:
        return Case(None, choose_device("auto")), path
    if arguments[0].startswith("-"):
        raise ValueError(f"{arguments[0]} must follow a recipe: python -m launch.doctor RECIPE ...")
    command = recipes.parse(arguments[0], arguments[1:])
    try:
        device = choose_device(command.recipe.device)
    except ValueError:  # a line of its own says so
        device = torch.device("cpu")
    return Case(command, device, command.runs, command.recipe.data), path


def _json(arguments: list[str]) -> tuple[list[str], Path | None]:
    """The other arguments, and the file of --json."""
    rest, path = list(arguments), None
    for i, argument in enumerate(arguments):
        if argument == "--json":
            if i + 1 == len(arguments):
                raise ValueError("--json needs the name of a file")
            path, rest = Path(arguments[i + 1]), arguments[:i] + arguments[i + 2 :]
        elif argument.startswith("--json="):
            path, rest = Path(argument.partition("=")[2]), arguments[:i] + arguments[i + 1 :]
    return rest, path


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        return 1  # torchrun starts again what failed: the first verdict stands
    try:
        if "--warm" in arguments:
            return warm.main([a for a in arguments if a != "--warm"])
        case, path = read(arguments)
    except ValueError as error:
        fail(str(error), 2)
    team, console = Team(), Console(quiet=environment()[0] > 0)
    with console.status("examining"):
        findings = examine(case, team)
    show(findings, console)
    written = team.rank > 0 or path is None or _written(findings, path)
    team.settle()
    failed = any(f.status == FAIL for f in findings)
    return int(failed) if written else 2


def _written(findings: list[Finding], path: Path) -> bool:
    try:
        write_json(findings, path)
        return True
    except OSError as error:
        print(f"error: --json {path} cannot be written: {error.strerror}", file=sys.stderr)
        return False


if __name__ == "__main__":
    leave(main())
