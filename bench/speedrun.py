"""Time to quality: how long from the command to a figure, the PyTorch tutorial's loop and ours?

    python -m bench.speedrun dcgan_mnist
    python -m bench.speedrun dcgan_mnist --kimg 20 --seeds 0 -- --compile off

For each seed the tutorial's loop (bench/tutorial_dcgan.py, eager float32, torchvision's transforms
in a DataLoader) trains the recipe's networks on the recipe's images and is measured every so often:
its best Frechet distance is the target. Then `python -m engine.train RECIPE` runs until it reaches
that. Both are measured by one extractor, against one set of real images.

Clocks run from the process's start: imports, data and compiling are in them. What measuring takes,
and opening what it needs, is in neither. Each run of ours begins with no packed data and nothing
compiled (unless --warm). Flags after -- go to the recipe: the tutorial has of them data, networks
and metrics, ours all.

Everything is kept in --out: the same command skips finished runs and begins an interrupted one
anew, as its clock would be wrong. results.json and curves.png are made at the end.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from bench import speedrun_report as report
from bench.speedrun_report import Race, arrival, best, read_curve
from engine import recipe as recipes
from engine.metrics.evaluator import Evaluator
from engine.run import RunError, commit, device_name
from engine.settings import Recipe
from engine.start import examine
from engine.steps.adversarial import Adversarial
from engine.verb import exit_code, say, warn
from engine.whole import write_whole
from engine.world import Ranks, choose_device
from pipelines.datasets import BadImage, DatasetMissing
from pipelines.pack import CacheUnusable

ROOT = Path(__file__).parents[1]
FAILURES = (RunError, DatasetMissing, BadImage, CacheUnusable, OSError)
LOOK_S = 0.25  # between looks at what a run has measured
LEAVE_S = 120.0  # that a run may take to save and stop
OWN = ("seed", "run", "run-name", "runs", "fresh", "dry-run", "profile", "data.cache")
OWN += ("metrics.every-kimg", "on-nan")
"""Flags of engine.train that a speedrun gives itself, or cannot do with."""


@dataclass(frozen=True)
class Command:
    """One speedrun."""

    recipe: Annotated[str, tyro.conf.Positional]
    """Name of an adversarial recipe whose networks are given no classes."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; more can be added later."""
    kimg: float = 300.0
    """Thousands of images that the tutorial's loop sees. Ours has its recipe's length, or that of
    a --kimg after --."""
    every_kimg: float = 10.0
    """Measure both each time so many thousand images were seen."""
    target: float | None = None
    """The figure to reach, in place of the tutorial's own best."""
    own_networks: bool = False
    """The tutorial's loop trains the tutorial's networks (latent 100, width 64, BatchNorm in both)
    in place of the recipe's."""
    workers: int = 2
    """Processes of the tutorial's DataLoader; it has 2."""
    warm: bool = False
    """Ours finds packed data and compiled code, as on a machine where it ran before."""
    out: Path | None = None
    """Folder of this speedrun; default: runs/speedrun/RECIPE."""
    accept: bool = False
    """Write the results into bench/results/ too."""
    flags: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()

    def folder(self) -> Path:
        """Where everything is kept."""
        return self.out or Path("runs") / "speedrun" / self.recipe

    def settings(self) -> dict[str, Any]:
        """What two parts of one speedrun must have in common."""
        names = ("recipe", "kimg", "every_kimg", "target", "own_networks", "workers", "warm")
        return {name: getattr(self, name) for name in names} | {"flags": list(self.flags)}


def checked(command: Command) -> Recipe:
    """The recipe, once command, recipe and data are known to go together. Raises ValueError naming
    a setting, or DatasetMissing."""
    recipes.load(command.recipe)
    words = {flag.removeprefix("--").split("=", 1)[0] for flag in command.flags}
    if taken := sorted(words & {*OWN, *(name.replace("-", "_") for name in OWN)}):
        raise ValueError(f"--{taken[0]} after -- is the speedrun's own affair: leave it out")
    recipe = recipes.parse(command.recipe, list(command.flags)).recipe
    if type(recipe.step) is not Adversarial or recipe.step.told():
        raise ValueError(
            f"{command.recipe}: the tutorial's loop trains a generator and a discriminator without "
            f"classes; take a recipe of that kind, as dcgan_mnist"
        )
    if not command.seeds or len(set(command.seeds)) < len(command.seeds) or min(command.seeds) < 0:
        raise ValueError("--seeds wants different numbers, none of them negative")
    if not (command.kimg > 0 and command.every_kimg > 0) or command.workers < 0:
        raise ValueError("--kimg and --every-kimg must be positive, --workers not negative")
    if command.accept and len(command.seeds) < 3:
        raise ValueError("--accept wants at least 3 seeds: give more, or leave it out")
    return examine(recipe)[0]


@contextmanager
def opened(command: Command) -> Iterator[int]:
    """The folder, alone, with its settings written down; gives the lock's file descriptor, which
    runs inherit, so that one that outlives its speedrun is not overtaken. Raises ValueError for
    a folder of something else, RunError for one in use."""
    folder = command.folder()
    stored, now = folder / "settings.json", command.settings()
    if (
        folder.exists()
        and not stored.exists()
        and [p for p in folder.iterdir() if p.name[0] != "."]
    ):
        raise ValueError(f"{folder} holds something else than a speedrun: name another --out")
    if stored.exists() and (before := json.loads(stored.read_text())) != now:
        lines = [
            f"{k}: {before.get(k)} then, {v} now" for k, v in now.items() if before.get(k) != v
        ]
        raise ValueError(
            f"{folder} was begun with other settings ({'; '.join(lines)}): name another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = f"{folder} is in use by another speedrun, or a run of one that was killed"
            raise RunError(f"{text}: wait for it, or end it") from None
        write_whole(stored, json.dumps(now, indent=1).encode())
        yield lock.fileno()


def run_until(
    arguments: list[str], log: Path, lock: int, cache: Path, there: Callable[[], bool]
) -> str:
    """Run a module in a process of its own until it ends or is `there`, and is told to stop: which.
    Raises RunError where it fails."""
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


def fresh(folder: Path, rulers: Path | None = None) -> Path:
    """A folder for a run with what an interrupted one left there taken away; its cache, which holds
    the extractor and the real images' features, if given, and nothing else."""
    if folder.exists():
        shutil.rmtree(folder)
    cache = folder / "cache"
    cache.mkdir(parents=True)
    for pattern in ("classifier-*", "features-*"):
        for path in rulers.glob(pattern) if rulers else ():
            shutil.copy2(path, cache)
    return cache


def note_end(folder: Path, how: str, more: dict[str, Any]) -> None:
    """Write down that a run is finished, and on what machine."""
    facts = {"ended": how, "commit": commit(), "load": round(os.getloadavg()[1], 2)} | more
    write_whole(folder / "finished.json", json.dumps(facts, indent=1).encode())


def finished(folder: Path) -> bool:
    """Whether a run need not be made again."""
    return (folder / "finished.json").exists()


def tutorial(command: Command, seed: int, lock: int) -> Path:
    """Train the tutorial's loop, unless that was done: its curve."""
    folder = command.folder() / f"tutorial-seed{seed}"
    path = folder / "metrics.jsonl"
    if not finished(folder):
        fresh(folder)
        arguments = ["bench.speedrun_tutorial", command.recipe, str(folder.absolute())]
        for flag in ("kimg", "every_kimg", "workers"):
            arguments += [f"--{flag.replace('_', '-')}", str(getattr(command, flag))]
        arguments += ["--seed", str(seed), *(["--own-networks"] * command.own_networks)]
        rulers = command.folder().absolute() / "cache"
        run_until(
            [*arguments, "--", *command.flags], folder / "log.txt", lock, rulers, lambda: False
        )
        note_end(folder, "ended", {})
    return path


def ours(command: Command, seed: int, target: float, lock: int) -> Path:
    """Train the recipe until it reaches the target, unless that was done: its curve."""
    folder = command.folder() / f"ours-seed{seed}"
    path = folder / command.recipe / "run" / "metrics.jsonl"
    if not finished(folder):
        rulers = command.folder().absolute() / "cache"
        cache = fresh(folder, None if command.warm else rulers)
        if command.warm:
            warm_up(command, lock)
        how = train_ours(
            command, seed, folder, rulers if command.warm else cache.absolute(), lock, target
        )
        resolved = json.loads((path.parent / "recipe.json").read_text())["resolved"]
        note_end(folder, how, {"resolved": resolved})
        shutil.rmtree(cache)
    return path


def train_ours(
    command: Command, seed: int, folder: Path, cache: Path, lock: int, target: float
) -> str:
    """The ordinary command, until it reaches the target; how it ended."""
    runs = ["--runs", str(folder.absolute()), "--run-name", "run"]
    measure = ["--metrics.every-kimg", str(command.every_kimg)]
    arguments = ["engine.train", command.recipe, *command.flags, "--seed", str(seed)]
    path = folder / command.recipe / "run" / "metrics.jsonl"
    return run_until(
        [*arguments, *measure, *runs],
        folder / "log.txt",
        lock,
        cache,
        lambda: arrival(read_curve(path), target) is not None,
    )


def warm_up(command: Command, lock: int) -> None:
    """Run ours once until its first measurement, so that data are packed and code is compiled."""
    folder = command.folder() / "warm-up"
    if not finished(folder):
        fresh(folder)
        rulers = command.folder().absolute() / "cache"
        note_end(folder, train_ours(command, 0, folder, rulers, lock, float("inf")), {})


def race(command: Command, seed: int, lock: int) -> Race:
    """Both loops with one seed. Raises RunError where there is nothing to reach."""
    say(f"seed {seed}: the tutorial's loop, {command.kimg:g} thousand images")
    path = tutorial(command, seed, lock)
    curve, target = read_curve(path), command.target
    if target is None:
        try:
            target = best(curve)
        except ValueError as error:
            raise RunError(f"{path}: {error}, so it sets no target: give one, --target") from None
    say(f"seed {seed}: ours, until it reaches {target:.3f}")
    found = ours(command, seed, target, lock)
    check_protocols(path, found)
    return Race(seed, target, {"tutorial": curve, "ours": read_curve(found)})


def check_protocols(*paths: Path) -> None:
    """Raise RunError unless all lines were measured alike, but for whether weights are averaged."""
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    protocols = [line["protocol"] | {"ema": None} for line in lines]
    if any(protocol != protocols[0] for protocol in protocols):
        raise RunError(f"{paths[0]} and {paths[1]} were measured by different protocols")


def provenance(command: Command, recipe: Recipe, races: list[Race]) -> dict[str, Any]:
    """What the figures are of: settings, machine, protocol, and how each run ended."""
    folder = command.folder()
    runs = {f"{loop}-seed{race.seed}": None for race in races for loop in report.LOOPS}
    runs = {name: json.loads((folder / name / "finished.json").read_text()) for name in runs}
    line = (folder / f"tutorial-seed{races[0].seed}" / "metrics.jsonl").read_text().splitlines()[0]
    return {
        "speedrun": command.recipe,
        "settings": command.settings(),
        "device": device_name(choose_device(recipe.device)),
        "torch": torch.__version__,
        "protocol": json.loads(line)["protocol"] | {"ema": "the recipe's, not the tutorial's"},
        "clock": "from the process's start; measuring, and opening what it needs, not counted",
        "runs": runs,
    }


def publish(command: Command, recipe: Recipe, races: list[Race]) -> None:
    """Print the table; write results and plot."""
    facts = provenance(command, recipe, races)
    commits = {run["commit"] for run in facts["runs"].values()}
    if len(commits) > 1:
        warn(f"the runs are of different commits: {', '.join(sorted(commits))}")
    print(report.table(races))
    folder = command.folder()
    content = json.dumps(facts | report.results(races), indent=1).encode()
    places = [folder / "results.json", *([accepted(command, recipe)] * command.accept)]
    for place in places:
        write_whole(place, content)
    nets = "its own networks" if command.own_networks else "the recipe's networks"
    title = f"{command.recipe}: the tutorial's loop ({nets}) and ours\n{facts['device']}, "
    title += f"torch {facts['torch']}, {', '.join(sorted(commits))}"
    try:
        report.plot(folder / "curves.png", title, races)
        places.append(folder / "curves.png")
    except ModuleNotFoundError:
        warn("no plot without matplotlib: pip install 'saddle[plot]', and repeat the command")
    say(f"wrote {', '.join(map(str, places))}")


def accepted(command: Command, recipe: Recipe) -> Path:
    """Where accepted results lie: by recipe and device."""
    name = device_name(choose_device(recipe.device)).split(",")[0].lower()
    words = re.findall(r"[a-z0-9]+", name.replace("(r)", "").replace("(tm)", ""))
    return ROOT / "bench" / "results" / f"speedrun_{command.recipe}_{'-'.join(words)}.json"


def speedrun(command: Command) -> None:
    """All of it. Raises ValueError for a wrong command, FAILURES for the rest."""
    recipe = checked(command)
    with opened(command) as lock:
        folder = command.folder()
        names = [f"{loop}-seed{seed}" for seed in command.seeds for loop in report.LOOPS]
        if not all(finished(folder / name) for name in names):  # one ruler for all, made here
            data = replace(recipe.data, cache=folder.absolute() / "cache")
            device = choose_device(recipe.device)
            Evaluator(replace(recipe, data=data), Ranks(0, 0, 1, device), say).close()
        publish(command, recipe, [race(command, seed, lock) for seed in command.seeds])


def _end(number: int, _frame: object) -> None:
    sys.exit(128 + number)  # so that the run that is under way is ended, too


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code: 2 for a wrong command, 1 for one that fails."""
    arguments = sys.argv[1:] if arguments is None else arguments
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    prog = "python -m bench.speedrun"
    command = tyro.cli(Command, prog=prog, description=__doc__, args=arguments[:cut])
    command = replace(command, flags=tuple(arguments[cut + 1 :]))
    signal.signal(signal.SIGTERM, _end)
    return exit_code(lambda: speedrun(command), FAILURES)


if __name__ == "__main__":
    sys.exit(main())
