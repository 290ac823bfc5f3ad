"""Time to quality: how long from the command to a figure, the PyTorch tutorial's loop and ours?

    python -m bench.speedrun dcgan_mnist
    python -m bench.speedrun dcgan_mnist --kimg 20 --seeds 0 -- --compile off

For each seed the tutorial's loop (bench/tutorial_dcgan.py, eager float32, torchvision's transforms
in a DataLoader) trains its own networks on the recipe's images and is measured every so often: its
best Frechet distance is the target. Then `python -m engine.train RECIPE` runs until it reaches
that. Both are measured by one extractor, against one set of real images.

Clocks run from the process's start: imports, data and compiling are in them. What measuring takes,
and opening what it needs, is in neither. Each run of ours begins with no packed data and nothing
compiled (unless --warm). Flags after -- go to the recipe: the tutorial has of them data and
metrics, ours all.

Everything is kept in --out: the same command skips finished runs and begins an interrupted one
anew, as its clock would be wrong. results.json and curves.png are made at the end.
"""

import json
import re
import shutil
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from bench import speedrun_report as report
from bench.speedrun_folder import (
    finished,
    fresh,
    note_end,
    only_rulers,
    opened,
    run_until,
)
from bench.speedrun_report import Race, arrival, best, read_curve
from engine import recipe as recipes
from engine.metrics.evaluator import Evaluator
from engine.run import RunError, device_name
from engine.settings import Recipe
from engine.start import examine
from engine.steps.adversarial import Adversarial
from engine.verb import exit_code, say, warn
from engine.whole import write_whole
from engine.world import Ranks, choose_device
from pipelines.datasets import BadImage, DatasetMissing
from pipelines.pack import CacheUnusable
from pipelines.settings import cache_home

ROOT = Path(__file__).parents[1]
FAILURES = (RunError, DatasetMissing, BadImage, CacheUnusable, OSError)
OWN = ("seed", "run", "run-name", "runs", "fresh", "dry-run", "profile", "data.cache")
OWN += ("metrics.every-kimg",)
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
    width: int | None = None
    """Channels of the tutorial's networks (its own: latent 100, BatchNorm in both; it has 64);
    default: those of the recipe's generator, where they are fast."""
    workers: int = 2
    """Processes of the tutorial's DataLoader; it has 2."""
    warm: bool = False
    """Ours finds packed data and compiled code, as on a machine where it ran before."""
    out: Path | None = None
    """Folder of this speedrun; default: runs/speedrun/RECIPE."""
    accept: bool = False
    """Write the results into bench/results/speedrun/ too."""
    flags: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()

    def folder(self) -> Path:
        """Where everything is kept."""
        return self.out or Path("runs") / "speedrun" / self.recipe

    def settings(self) -> dict[str, Any]:
        """What two parts of one speedrun must have in common."""
        names = ("recipe", "kimg", "every_kimg", "target", "width", "workers", "warm")
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
    if command.target is not None and not command.target > 0:
        raise ValueError(f"--target {command.target} must be a positive distance")
    if command.width is not None and command.width < 1:
        raise ValueError(f"--width {command.width} must be at least 1")
    if command.accept and len(command.seeds) < 3:
        raise ValueError("--accept wants at least 3 seeds: give more, or leave it out")
    return examine(recipe)[0]


def open_rulers(recipe: Recipe) -> None:
    """Make the extractor and the real images' features, or find that they are there."""
    Evaluator(recipe, Ranks(0, 0, 1, choose_device(recipe.device)), say).close()


def tutorial(command: Command, seed: int, lock: int) -> Path:
    """Train the tutorial's loop, unless that was done: its curve."""
    folder = command.folder() / f"tutorial-seed{seed}"
    if not finished(folder):
        fresh(folder)
        arguments = ["bench.speedrun_tutorial", command.recipe, str(folder.absolute())]
        for flag in ("kimg", "every_kimg", "workers"):
            arguments += [f"--{flag.replace('_', '-')}", str(getattr(command, flag))]
        arguments += ["--seed", str(seed)]
        arguments += ["--width", str(command.width)] if command.width else []
        arguments += ["--", *command.flags]
        run_until(arguments, folder / "log.txt", lock, cache_home(), lambda: False)
        note_end(folder, "ended", {})
    return folder / "metrics.jsonl"


def ours(command: Command, seed: int, target: float, lock: int) -> Path:
    """Train the recipe until it reaches the target, unless that was done: its curve."""
    folder = command.folder() / f"ours-seed{seed}"
    path = folder / command.recipe / "run" / "metrics.jsonl"
    if not finished(folder):
        if command.warm:
            warm_up(command, lock)
        fresh(folder)
        cache = cache_home() if command.warm else only_rulers(folder / "cache")
        how = train_ours(command, seed, folder, cache, lock, target)
        resolved = json.loads((path.parent / "recipe.json").read_text())["resolved"]
        note_end(folder, how, {"resolved": resolved})
        if not command.warm:
            shutil.rmtree(cache)
    return path


def train_ours(
    command: Command, seed: int, folder: Path, cache: Path, lock: int, target: float
) -> str:
    """The ordinary command, until it reaches the target; how it ended."""
    path = folder / command.recipe / "run" / "metrics.jsonl"
    arguments = ["engine.train", command.recipe, *command.flags, "--seed", str(seed)]
    arguments += ["--metrics.every-kimg", str(command.every_kimg)]
    arguments += ["--runs", str(folder.absolute()), "--run-name", "run"]

    def there() -> bool:
        return arrival(read_curve(path), target) is not None

    return run_until(arguments, folder / "log.txt", lock, cache, there)


def warm_up(command: Command, lock: int) -> None:
    """Run ours once until its first measurement, so that data are packed and code is compiled."""
    folder = command.folder() / "warm-up"
    if not finished(folder):
        fresh(folder)
        how = train_ours(command, 0, folder, cache_home(), lock, float("inf"))
        note_end(folder, how, {})


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
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, content)
    title = f"{command.recipe}: the tutorial's loop and networks, and ours\n{facts['device']}, "
    title += f"torch {facts['torch']}, {', '.join(sorted(commits))}"
    try:
        report.plot(folder / "curves.png", title, facts["protocol"]["extractor"], races)
        places.append(folder / "curves.png")
    except ModuleNotFoundError:
        warn("no plot without matplotlib: pip install 'saddle[plot]', and repeat the command")
    say(f"wrote {', '.join(map(str, places))}")


def accepted(command: Command, recipe: Recipe) -> Path:
    """Where accepted results lie: by recipe and device."""
    name = device_name(choose_device(recipe.device)).split(",")[0].lower()
    words = re.findall(r"[a-z0-9]+", name.replace("(r)", "").replace("(tm)", ""))
    folder = ROOT / "bench" / "results" / "speedrun"
    return folder / f"{command.recipe}_{'-'.join(words)}.json"


def speedrun(command: Command) -> None:
    """All of it. Raises ValueError for a wrong command, FAILURES for the rest."""
    recipe = checked(command)
    with opened(command.folder(), command.settings()) as lock:
        folder = command.folder()
        names = [f"{loop}-seed{seed}" for seed in command.seeds for loop in report.LOOPS]
        if not all(finished(folder / name) for name in names):  # one ruler for all, made here
            open_rulers(recipe)
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
    return exit_code(lambda: speedrun(command), FAILURES)


if __name__ == "__main__":
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, _end)
    sys.exit(main())
