"""Runs through the real command line, and what tests read of a run directory."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from engine import checkpoint, run
from engine.networks.spec import Network
from engine.recipe import flatten, load, parse
from engine.settings import Adam, Recipe
from engine.stored import Loaded
from pipelines.captions import LENGTH
from pipelines.finish import smaller
from pipelines.missing import COMPUTED

ROOT = Path(__file__).parent.parent
QUICK = ("--log-every", "0.02", "--sample-every", "1000", "--checkpoint-every", "1000")


def command(arguments: list[str], ranks: int = 1) -> list[str]:
    """The command line of a run, through torchrun where there are several ranks."""
    train = ["-m", "engine.train", *arguments]
    if ranks == 1:
        return [sys.executable, *train]
    # --standalone picks a free port, so that tests do not meet on one
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *launch, *train]


def environment(**extra: str) -> dict[str, str]:
    """One thread per process: the ranks of a test share two cores."""
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"} | extra


def train(*arguments: str, ranks: int = 1, code: int = 0, **extra: str) -> str:
    """Run to the end; its output. Fails if the exit code is not the expected one."""
    done = subprocess.run(
        command(list(arguments), ranks),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(**extra),
        timeout=300,
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    return output


def start(*arguments: str, ranks: int = 1) -> subprocess.Popen:
    """Start a run in a process group of its own."""
    return subprocess.Popen(
        command(list(arguments), ranks),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
    )


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait until a file is there while the process lives."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"no {path} after {seconds} s"
        time.sleep(0.005)


def wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not after {seconds} s"
        time.sleep(0.05)


def kill_at(folder: Path, images: int, *arguments: str, ranks: int = 1) -> None:
    """Start a run that would go on, kill -9 all of it once it has a checkpoint at `images`, and
    drop the later checkpoints that it may have written until the kill struck."""
    kill_once_at(folder, images, start(*arguments, ranks=ranks))


def kill_once_at(folder: Path, images: int, process: subprocess.Popen) -> None:
    """The same for a run that was started, in a process group of its own."""
    wait_for(folder / "checkpoints" / f"{images:09}" / checkpoint.INDEX, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    _wait_until_left(folder)
    for later in checkpoint.listing(folder / "checkpoints"):
        if int(later.name) > images:
            for part in later.iterdir():
                part.unlink()
            later.rmdir()


def _wait_until_left(folder: Path) -> None:
    """Workers whose launcher was killed are told to leave, and save before they do."""
    while True:
        try:
            with run.locked(folder):
                return
        except run.RunError:
            time.sleep(0.1)


def run_folder(runs: Path, recipe: str) -> Path:
    """The only run of a recipe."""
    (folder,) = [p for p in (runs / recipe).iterdir() if p.is_dir()]
    return folder


def world_size(folder: Path) -> int:
    """How many ranks began a run."""
    return json.loads((folder / "recipe.json").read_text())["provenance"]["world_size"]


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, all ranks' parts."""
    newest = checkpoint.listing(folder / "checkpoints")[0]
    assert not checkpoint.damage_of(newest)
    tensors = {}
    for rank in range(Loaded(newest).index["world_size"]):
        loaded = Loaded(newest, rank)
        tensors |= {f"rank {rank}/{k}": v for k, v in loaded.local.items()}
    return tensors | dict(loaded.shared)


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def newest_picture(folder: Path) -> bytes:
    """The pixels of the last sample grid; its metadata name the run."""
    with Image.open(max((folder / "samples").glob("*.png"))) as picture:
        assert picture.format == "PNG"
        return picture.tobytes()


def parsed(*arguments: str, name: str = "dcgan_digits") -> Recipe:
    """A recipe with what a command line overrides."""
    return parse(name, list(arguments)).recipe


def toy(name: str, batch: int = 8) -> tuple[Recipe, list[str]]:
    """A recipe with networks an eighth as wide, on computed images of at most 16 pixels or the
    recipe's odd size, and the flags that make it so."""
    recipe = load(name)
    small = _shrink(recipe)
    resolution = recipe.data.resolution if recipe.data.resolution < 32 else 32
    name = COMPUTED.get(recipe.data.name, "synthetic")
    data = replace(recipe.data, name=name, resolution=resolution, batch=batch, crop=None, load=None)
    small = replace(small, data=data, metrics=replace(recipe.metrics, every_kimg=0.0))
    before, after = flatten(recipe, flags=True), flatten(small, flags=True)
    flags: list[str] = []
    for flag, value in after.items():
        if value != before[flag]:
            values = value if isinstance(value, tuple) else (value,)
            flags += [f"--{flag}", *(str(v) for v in values)]
    return small, flags


def pair_of(recipe: Recipe, images_NCHW: torch.Tensor) -> torch.Tensor:
    """What a pipeline might hand out with images."""
    scale = recipe.data.scale
    return smaller(images_NCHW, scale) if scale else -images_NCHW.flip(0)


def captions_of(recipe: Recipe, images: int) -> tuple[torch.Tensor, ...]:
    """A caption of each image and their lengths, where the recipe's model reads them."""
    if not recipe.step.reads_captions():
        return ()
    noise = torch.Generator().manual_seed(0)
    lengths_N = torch.randint(1, LENGTH + 1, (images,), generator=noise)
    return torch.randint(0, 9, (images, LENGTH), generator=noise), lengths_N


def _shrink(settings):
    """The same settings with every size of every network divided by eight (at least four, or what
    it was), and a learning rate that does not depend on the run's length."""
    changes = {}
    for f in fields(settings):
        value = getattr(settings, f.name)
        if is_dataclass(value):
            changes[f.name] = _shrink(value)
        elif isinstance(settings, Adam) and f.name == "decay_kimg":
            changes[f.name] = 0.0
        elif isinstance(settings, Network):
            if isinstance(value, tuple):
                changes[f.name] = tuple(max(v // 8, 4) for v in value)
            elif type(value) is int and f.name != "classes":
                changes[f.name] = max(value // 8, min(value, 4))
    return replace(settings, **changes)
