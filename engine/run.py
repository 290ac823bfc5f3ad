"""The run directory: its name, what it says of itself, and whether a command may go on with it."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import unused_name, write_synced
from engine.recipe import (
    Command,
    contradictions,
    digest,
    file_digests,
    from_values,
    load,
    run_name,
    to_values,
)
from engine.settings import Recipe
from engine.world import Ranks
from pipelines.images import BadImage

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "safetensors", "tyro", "triton")


class RunError(RuntimeError):
    """The run directory is not free for this command."""


def choose(command: Command, name: str) -> Path:
    """The folder of the run that a command starts or goes on with. Only rank 0 calls it."""
    folder = command.runs / name / (command.run or run_name(command.recipe))
    if folder.parent != command.runs / name or folder.name in ("", ".", ".."):
        raise ValueError(f"--run-name {command.run} must be a plain name, without folders")
    if not command.fresh:
        return folder
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
    restarted += int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if restarted:  # a launcher's restart of this very command: go on with what it began
        begun = [folder, *folder.parent.glob(f"{folder.name}.*")]
        return max(
            (f for f in begun if f.exists()), key=lambda f: f.stat().st_ctime, default=folder
        )
    return unused_name(folder)


def read_recipe(folder: Path) -> tuple[str, Recipe, dict[str, Any]]:
    """(recipe name, settings, the whole of recipe.json) of a run directory. Raises ValueError."""
    path = folder / "recipe.json"
    try:
        content = json.loads(path.read_text())
        return content["recipe"], from_values(load(content["recipe"]), content["values"]), content
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a run directory: it has no recipe.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from None


def check_same(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """recipe.json of the run that is being resumed, None for a new one. Raises ValueError, showing
    the differences, if the command's settings contradict the run's."""
    if not (folder / "recipe.json").exists():
        return None
    _, stored, content = read_recipe(folder)
    if lines := contradictions(recipe, stored, content.get("files")):
        raise ValueError(
            f"{folder} was started with other settings:\n  "
            + "\n  ".join(lines)
            + "\nLeave them as they were, or choose another --run-name NAME, or add --fresh."
        )
    return content


def write_recipe(folder: Path, name: str, recipe: Recipe, resolved: dict[str, Any]) -> None:
    """Write recipe.json: the settings, how they were resolved here, and the provenance."""
    content = {
        "recipe": name,
        "values": to_values(recipe),
        "digest": digest(name),
        "files": file_digests(recipe),
        "resolved": resolved,
        "provenance": provenance(resolved["device"]),
        "uses": recipe.step.uses(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / ".recipe.json"
    write_synced(scratch, json.dumps(content, indent=1).encode())
    os.replace(scratch, folder / "recipe.json")


def provenance(device: str) -> dict[str, Any]:
    """Versions, device, commit, command and time."""
    return {
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        "device": device,
        "commit": commit(),
        "command": shlex.join(["python", "-m", "engine.train", *sys.argv[1:]]),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def commit() -> str:
    """The source's git commit, with `+` if it was changed since; empty outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    git += ["--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), model
        )
    return f"CPU {model}, {torch.get_num_threads()} threads"


def _holder(folder: Path) -> str:
    """Which process says that it trains there."""
    with contextlib.suppress(OSError):
        if text := (folder / ".lock").read_text().strip():
            return f" ({text})"
    return ""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the run directory against a second process; whether it could be locked. Raises RunError
    if another process holds it.

    A kill frees the lock at once. It holds against other hosts too where the file system carries
    flock over the network (NFS of Linux, BeeGFS, GPFS, Lustre mounted with `flock`), and against
    this host alone where its mount says `nolock`, `local_lock` or `localflock`. Some have no locks
    at all (Lustre mounted with neither): that is no reason not to train.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                yield False
                return
            raise RunError(
                f"{folder} is being trained by another process{_holder(folder)}; "
                "use --run-name NAME"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield True


def agree(ranks: Ranks, check_on_rank_0: Callable[[], Any]) -> Any:
    """Rank 0's result, or its ValueError, RunError or BadImage, on every rank; what the disk
    refuses is a RunError."""
    answer: tuple[Any, Exception | None] = (None, None)
    if ranks.rank == 0:
        try:
            answer = (check_on_rank_0(), None)
        except (ValueError, RunError, BadImage) as error:
            answer = (None, error)
        except OSError as error:
            text = f"cannot write the run folder ({error}); --runs names another place"
            answer = (None, RunError(text))
    result, error = ranks.share(answer)
    if error:
        raise error
    return result
