"""Kills a tiny run at random moments and repeats its command: is anything ever lost?

    python -m bench.soak --kills 200 --ranks 1 --seed 0 --json soak.json

Every kill is a SIGKILL, of all processes or of one rank, while the run starts, trains, saves or
samples; the moments are drawn from the seed. After it the newest whole checkpoint must not be older
than the newest that was there before, and the next start must go on from it. A run that reaches its
end must equal, bit for bit, the one that nobody killed, and the next one begins. Exit code 1 where
anything was lost, damaged or not equal.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import psutil
import tyro

from engine import checkpoint, train
from tests.runs import ROOT, command, differences, environment, final_state, toy

NAME, BATCH, STEPS = "dcgan_digits", 8, 200
OFTEN = {"checkpoint": 5, "sample": 20, "log": 10}  # in steps
MOMENTS = {  # seconds, at most, from what is waited for to the kill
    "start": None,  # from the process's start; as long as that takes here
    "training": 0.3,
    "saving": 0.005,
    "sampling": 0.05,
}
LAUNCHER = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}  # what is left when one rank is killed
LONG_S = 300.0  # a life that has neither ended nor come to its moment by then is stuck


@dataclass(frozen=True)
class Command:
    """One soak."""

    kills: int = 200
    """How many."""
    ranks: int = 1
    """Ranks of the run, through torchrun where there are several."""
    seed: int = 0
    """Draws the moments and the victims."""
    steps: int = STEPS
    """Iterations of a run."""
    preload: bool = False
    """Fork each start from a process that has imported everything: many more kills in a time, none
    of them during imports; one rank."""
    json: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """Where to write the account too."""


@dataclass
class Account:
    """What happened."""

    kills: Counter[str] = field(default_factory=Counter)  # by moment and victim
    resumes: int = 0
    ended: int = 0
    lost: int = 0
    unequal: int = 0
    troubles: list[str] = field(default_factory=list)

    def lose(self, text: str) -> None:
        """Note a checkpoint that was there and is not used."""
        self.lost += 1
        self.troubles.append(text)


class Forked:
    """The command in a fork of this process, to be handled as a subprocess.Popen is."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                _become(arguments, log)
                code = train.main(arguments)
            except SystemExit as leaving:
                code = int(leaving.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)

    def poll(self) -> int | None:
        """Its exit code, None while it lives."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, seconds: float) -> int:
        """Its exit code, once it has one."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("the run", seconds)
            time.sleep(0.001)
        return self.returncode


def _become(arguments: list[str], log: Path) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
    os.environ.update(environment())
    sys.argv = ["engine.train", *arguments]


@dataclass
class Life:
    """One start of the command, from which it goes to its end or to a kill."""

    process: subprocess.Popen | Forked
    folder: Path
    log: Path
    newest: int = 0  # images of the newest checkpoint seen so far

    def look(self) -> None:
        """See which checkpoints are there."""
        there = checkpoint.listing(self.folder / "checkpoints")
        self.newest = max([self.newest, *(int(path.name) for path in there)])

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.folder / "checkpoints").glob(".writing-*"))

    def samples(self) -> float:
        """When the folder of samples was changed last."""
        try:
            return (self.folder / "samples").stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def kill(self, draw: random.Random, one: bool) -> None:
        """Kill one rank, or all there is; returns when all are gone."""
        launcher = psutil.Process(self.process.pid)
        ranks = launcher.children(recursive=True)
        workers = [p for p in ranks if "engine.train" in _words(p)]
        victims = [draw.choice(workers)] if one and workers else [launcher, *ranks]
        for victim in victims:
            _send(victim, signal.SIGKILL)
        self.process.wait(LONG_S)
        psutil.wait_procs(ranks, LONG_S)

    def resumed_from(self) -> int | None:
        """The images that it went on from, if it came that far."""
        found = re.search(r"^resuming .* from ([\d,]+) images", self.log.read_text(), re.M)
        return int(found[1].replace(",", "")) if found else None


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def begin(settings: Command, runs: Path, name: str) -> Life:
    """Start the command."""
    every = {k: str(v * BATCH / 1000) for k, v in OFTEN.items()}
    flags = [*toy(NAME, BATCH)[1], "--compile", "off", "--steps", str(settings.steps)]
    flags += [f for k, v in every.items() for f in (f"--{k}-every", v)]
    flags += ["--runs", str(runs), "--run-name", name]
    log = runs / f"{name}-{time.monotonic_ns()}.log"
    log.touch()
    if settings.preload:
        return Life(Forked([NAME, *flags], log), runs / NAME / name, log)
    with open(log, "w") as file:
        process = subprocess.Popen(
            command([NAME, *flags], settings.ranks),
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment(**LAUNCHER),
            start_new_session=True,
        )
    return Life(process, runs / NAME / name, log)


def to_the_end(life: Life) -> None:
    """Let it finish. Raises RuntimeError with its output if it does not."""
    if life.process.wait(LONG_S):
        raise RuntimeError(f"exit code {life.process.returncode}:\n{life.log.read_text()}")


def live_until(life: Life, moment: str, delay_s: float) -> bool:
    """Wait for the moment and so much longer; False if the run ended before."""
    began, samples, start = time.monotonic(), life.samples(), None
    life.look()
    at_first = life.newest
    while life.process.poll() is None:
        now = time.monotonic()
        life.look()
        here = (
            moment == "start"
            or (moment == "training" and life.newest > at_first)
            or (moment == "saving" and life.saving())
            or (moment == "sampling" and life.samples() != samples)
        )
        start = now if here and start is None else start
        if start is not None and now - start >= delay_s:
            return True
        if now - began > LONG_S:
            raise RuntimeError(f"stuck before {moment}:\n{life.log.read_text()}")
        time.sleep(0.001)
    return False


def one_life(settings: Command, life: Life, draw: random.Random, start_s: float) -> str:
    """Live to a drawn moment and be killed: which one it was; "ended" if the end came first."""
    moment = draw.choice(list(MOMENTS))
    delay_s = draw.uniform(0.0, MOMENTS[moment] or start_s)
    one = settings.ranks > 1 and draw.random() < 0.5
    if live_until(life, moment, delay_s):
        life.kill(draw, one)
        return f"{moment}, {'one rank' if one else 'all'}"
    to_the_end(life)
    return "ended"


def check_kept(account: Account, life: Life, expected: int) -> int:
    """Compare what a life went on from with what there was, and what is there now with what was
    seen; the images of the newest whole checkpoint."""
    where = life.log.name
    resumed = life.resumed_from()
    if resumed is not None:
        account.resumes += 1
        if resumed != expected:
            account.lose(f"{where}: went on from {resumed} images, {expected} were there")
    elif expected and "first step after" in life.log.read_text():
        account.lose(f"{where}: began anew, though {expected} images were there")
    whole = checkpoint.newest_whole(life.folder / "checkpoints", account.troubles.append)
    images = int(whole.name) if whole else 0
    if images < max(life.newest, expected):
        account.lose(f"{where}: {images} images after it, {life.newest} before")
    return images


def soak(settings: Command, runs: Path) -> Account:
    """Kill as often as asked; the runs' folders are left in `runs`."""
    draw, account = random.Random(settings.seed), Account()
    began, life = time.monotonic(), begin(settings, runs, "unbroken")
    live_until(life, "training", 0.0)
    start_s = time.monotonic() - began
    to_the_end(life)
    unbroken, expected, number = final_state(life.folder), 0, 1
    while account.kills.total() < settings.kills or expected:
        life = begin(settings, runs, f"killed-{number}")
        if account.kills.total() < settings.kills:
            what = one_life(settings, life, draw, start_s)
        else:
            to_the_end(life)
            what = "ended"
        expected = check_kept(account, life, expected)
        if what == "ended":
            account.ended += 1
            account.unequal += bool(differences(unbroken, final_state(life.folder)))
            number, expected = number + 1, 0
            continue
        account.kills[what] += 1
        if account.kills.total() % 10 == 0:
            print(f"{account.kills.total()} kills, {account.resumes} resumes", flush=True)
    return account


def main() -> int:
    """The command line; exit code."""
    settings = tyro.cli(Command, description=__doc__)
    if settings.preload and settings.ranks > 1:
        print("error: --preload is for one rank; leave it out", file=sys.stderr)
        return 2
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        account = soak(settings, Path(place))
    for text in account.troubles:
        print(text)
    seconds = round(time.monotonic() - began)
    print(
        f"{account.kills.total()} kills on {settings.ranks} rank(s) in {seconds} s: "
        f"{account.resumes} resumes, {account.lost} checkpoints lost, {account.ended} runs "
        f"reached their end, {account.unequal} of them unequal to the unbroken one"
    )
    content = {"seed": settings.seed, "ranks": settings.ranks, "seconds": seconds}
    content |= vars(account) | {"kills": account.kills.total(), "moments": account.kills}
    print(json.dumps(content))
    if settings.json:
        settings.json.write_text(json.dumps(content, indent=1) + "\n")
    return int(bool(account.lost or account.unequal or account.troubles))


if __name__ == "__main__":
    sys.exit(main())
