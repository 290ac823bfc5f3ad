"""Where the runs of a speedrun are kept, and how each is started, stopped and found finished.

settings.json    what it was begun with; another command is refused
LOOP-seedN/      a run; finished.json is written at its end, and what has none is begun anew
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.run import RunError, commit
from engine.whole import write_whole
from pipelines.settings import cache_home

LOOK_S = 0.25  # between looks at what a run has measured
LEAVE_S = 120.0  # that a run may take to save and stop


@contextmanager
def opened(folder: Path, now: dict[str, Any]) -> Iterator[int]:
    """The folder, alone, with these settings written down; gives the lock's file descriptor, which
    runs inherit, so that one that outlives its speedrun is not overtaken. Raises ValueError for
    a folder of something else or of other settings, RunError for one in use."""
    stored = folder / "settings.json"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: name a folder")
    if stored.exists():
        before = _settings(stored)
        lines = [
            f"{k}: {before.get(k)} then, {v} now" for k, v in now.items() if before.get(k) != v
        ]
        if lines:
            text = f"{folder} was begun with other settings ({'; '.join(lines)})"
            raise ValueError(f"{text}: name another --out")
    elif folder.exists() and any(path.name != ".lock" for path in folder.iterdir()):
        raise ValueError(f"{folder} holds something else than a speedrun: name another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = f"{folder} is in use by another speedrun, or a run of one that was killed"
            raise RunError(f"{text}: wait for it, or end it") from None
        write_whole(stored, json.dumps(now, indent=1).encode())
        yield lock.fileno()


def _settings(stored: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(stored.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"{stored} is damaged: name another --out") from None


def run_until(
    arguments: list[str], log: Path, lock: int, cache: Path, there: Callable[[], bool]
) -> str:
    """Run a module in a process of its own until it ends or is `there`, and is told to stop: which.
    Raises RunError where it fails."""
    cache = cache.absolute()
    variables = {"SADDLE_CACHE": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "compiled")}
    variables |= {"TRITON_CACHE_DIR": str(cache / "triton"), "PYTHONUNBUFFERED": "1"}
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | variables,
            pass_fds=(lock,),
        )
        try:
            while process.poll() is None:
                if there():
                    return "reached"
                time.sleep(LOOK_S)
        finally:
            _leave(process)
    if process.returncode:
        lines = log.read_text().strip().splitlines() or ["nothing"]
        raise RunError(f"{arguments[0]} ended with {process.returncode} ({log}): {lines[-1]}")
    return "reached" if there() else "ended"


def _leave(process: subprocess.Popen) -> None:
    """Tell a process to stop and wait until it has."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def fresh(folder: Path) -> None:
    """An empty folder for a run: what an interrupted one left there is taken away."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def only_rulers(cache: Path) -> Path:
    """A cache without packed data and compiled code: it has the extractors and features of real
    images of the usual one, which are for measuring."""
    cache.mkdir()
    for pattern in ("classifier-*.safetensors", "features-*.safetensors"):
        for path in cache_home().glob(pattern):
            shutil.copy2(path, cache)
    return cache


def note_end(folder: Path, how: str, more: dict[str, Any]) -> None:
    """Write down that a run is finished, and on what machine."""
    facts = {"ended": how, "commit": commit(), "load": round(os.getloadavg()[1], 2)} | more
    write_whole(folder / "finished.json", json.dumps(facts, indent=1).encode())


def finished(folder: Path) -> bool:
    """Whether a run need not be made again."""
    return (folder / "finished.json").exists()
