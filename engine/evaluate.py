"""Measure trained runs, or two folders of images: python -m engine.evaluate RUN_DIR...

    python -m engine.evaluate RUN_DIR                         all metrics of its newest checkpoint
    python -m engine.evaluate RUN_A RUN_B --checkpoint best   side by side, under one protocol
    python -m engine.evaluate RUN_DIR --augmentation          do its samples teach a classifier?
    python -m engine.evaluate RUN_DIR --sr Set5/ Set14/       how well does it enlarge these?
    python -m engine.evaluate --real DIR --fake DIR           anybody's generator
    python -m engine.evaluate --real DIR --fake DIR --paired  PSNR and SSIM by file name

Several runs are measured with the first run's metrics settings. A table, and an entry in
evaluation.json of each run directory, a list with the newest figures of every protocol and
checkpoint; --json writes these figures into one file. Figures of different protocols (another
extractor, other images, numbers, sizes) are refused side by side.
"""

import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from engine.checkpoint import CheckpointError
from engine.metrics.augmentation import Augmentation, AugmentationEvaluator
from engine.metrics.evaluator import Evaluation
from engine.metrics.folders import Folders
from engine.metrics.open import Measuring, open_evaluator
from engine.metrics.protocol import Protocol, differences, held_out_words
from engine.metrics.super_resolution import BenchmarkEvaluator
from engine.report.read import EVALUATED, read_evaluated
from engine.run import RunError, read_recipe
from engine.settings import Metrics, Recipe
from engine.trained import Choice, Trained, open_run
from engine.verb import exit_code, say, warn
from engine.whole import write_whole
from engine.world import Ranks, choose_device
from pipelines.datasets import BadImage, DatasetMissing
from pipelines.pack import CacheUnusable
from pipelines.settings import Data

Opened = Measuring | AugmentationEvaluator | BenchmarkEvaluator
FAILURES = (RunError, CheckpointError, BadImage, DatasetMissing, CacheUnusable, OSError)


@dataclass(frozen=True)
class Place:
    """Where datasets lie now, if not where they lay; with folders, what a classifier learns."""

    name: str | None = None
    """With --real and --fake: the labelled dataset on which the small classifier is trained."""
    root: Path | None = None
    """Folder that holds the datasets."""
    path: Path | None = None
    """Folder of this very dataset."""


@dataclass(frozen=True)
class Command:
    """One evaluation."""

    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run directories."""
    real: Path | None = None
    """Folder of real images, in place of runs."""
    fake: Path | None = None
    """Folder of generated images."""
    paired: bool = False
    """With --real and --fake: compare the images of the same name (PSNR, SSIM, LPIPS)."""
    resize: int | None = None
    """With --real and --fake: bring all images to so many pixels square first."""
    teaches: Annotated[bool, tyro.conf.arg(name="augmentation")] = False
    """For class-conditional runs, in place of the other figures: the accuracy on held-out images of
    classifiers that learnt from real images, from these and samples, and from samples alone."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    sr: tuple[Path, ...] = ()
    """For runs that enlarge images, in place of the other figures: folders of large images. PSNR
    and SSIM of each, on luminance, beside bicubic."""
    checkpoint: Choice = None
    """Images seen at the checkpoint to take, or `best`; default: the newest whole one."""
    ema: bool = True
    """Take the moving average of the weights where the run keeps one."""
    json: Path | None = None
    """Write all figures and protocols into this file too."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    data: Place = field(default_factory=Place)
    metrics: Metrics = field(default_factory=Metrics)


def evaluate_runs(command: Command) -> dict[str, Any]:
    """All figures of the runs by name, protocols compared before anything is measured."""
    device = choose_device(command.device)
    ranks = Ranks(0, 0, 1, device)
    ready: dict[str, tuple[Path, Trained, Opened]] = {}
    for name, folder in _names(command.run_dirs).items():
        trained = open_run(folder, command.checkpoint, command.ema, command.device, warn)
        data = trained.data_at(command.data)
        recipe = replace(trained.recipe, metrics=command.metrics, data=data)
        ready[name] = folder, trained, _opened(command, recipe, ranks)
    refuse_mixed({name: e.protocol(t.averaged) for name, (_, t, e) in ready.items()})
    results = {}
    for name, (folder, trained, evaluator) in ready.items():
        evaluation = evaluator.evaluate(trained.networks, trained.averaged)
        evaluator.close()
        results[name] = {"images": trained.images, "checkpoint": trained.checkpoint}
        results[name] |= _plain(evaluation)
        remember(folder, results[name])
    return results


def _opened(command: Command, recipe: Recipe, ranks: Ranks) -> Opened:
    """The evaluator that the command asks for. Raises ValueError."""
    if command.sr:
        return BenchmarkEvaluator(recipe, command.sr, ranks)
    if command.teaches:
        return AugmentationEvaluator(recipe, command.augmentation, ranks.device, say)
    return open_evaluator(recipe, ranks, say)


def remember(folder: Path, result: dict[str, Any]) -> None:
    """Add figures to a run's evaluation.json, in place of those of their protocol and images."""
    known, problems = read_evaluated(folder)
    for problem in problems:
        warn(f"{folder}: {problem}; only what can be read is kept")
    same = ("protocol", "images")
    kept = [entry for entry in known if any(entry[key] != result[key] for key in same)]
    _write(folder / EVALUATED, [*kept, result])


def refuse_mixed(protocols: dict[str, Protocol]) -> None:
    """Raise ValueError, saying why, if figures of these protocols cannot be compared."""
    if lines := differences(protocols):
        raise ValueError(
            "figures of different protocols do not go side by side:\n  "
            + "\n  ".join(lines)
            + "\nmeasure the runs one by one, or make these equal (--metrics.*, --no-ema)"
        )


def _names(folders: tuple[Path, ...]) -> dict[str, Path]:
    """The runs by their shortest distinct names. Raises ValueError for the same run twice."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("the same run directory is named twice")
    short = {folder.resolve().name: folder for folder in folders}
    return short if len(short) == len(folders) else {str(folder): folder for folder in folders}


def evaluate_folders(command: Command) -> dict[str, Any]:
    """The figures of the folder of generated images."""
    data, labelled = command.data, None
    if data.name:
        labelled = Data(name=data.name, root=data.root, path=data.path)
    folders = Folders(command.real, command.fake, command.resize, labelled)
    device = choose_device(command.device)
    if command.paired:
        evaluation = folders.evaluate_pairs(command.metrics, device)
    else:
        evaluation = folders.evaluate(command.metrics, device, say)
    return {command.fake.resolve().name: _plain(evaluation)}


def _plain(evaluation: Evaluation) -> dict[str, Any]:
    values = evaluation.figures.items()
    return {
        "figures": {k: v if math.isfinite(v) else None for k, v in values},
        "protocol": evaluation.protocol.values(),
        "seconds": round(evaluation.seconds, 3),
    }


def _write(path: Path, content: dict[str, Any] | list[dict[str, Any]]) -> None:
    write_whole(path, json.dumps(content, indent=1).encode())
    say(f"wrote {path}")


def show(results: dict[str, Any], console: Console) -> None:
    """A table with one column per run, and the protocol in words under it."""
    table = Table(title="Metrics")
    table.add_column("figure")
    for name, result in results.items():
        at = f"\n{result['images']:,} images" if "images" in result else ""
        table.add_column(f"{name}{at}", justify="right")
    figures = [result["figures"] for result in results.values()]
    for figure in dict.fromkeys(key for row in figures for key in row):
        cells = [row.get(figure, "") for row in figures]
        table.add_row(
            figure, *("nan" if c is None else c if c == "" else f"{c:.5g}" for c in cells)
        )
    console.print(table)
    protocol = next(iter(results.values()))["protocol"]
    console.print("protocol: " + ", ".join(f"{k} {v}" for k, v in protocol.items()), soft_wrap=True)
    of_runs = any("images" in result for result in results.values())
    if of_runs and (words := held_out_words([name for row in figures for name in row])):
        console.print(words, soft_wrap=True)


def check(command: Command) -> None:
    """Raise ValueError for flags that do not go together."""
    if bool(command.real) != bool(command.fake):
        raise ValueError("--real and --fake go together: name both folders")
    if bool(command.run_dirs) == bool(command.real):
        raise ValueError("name run directories, or --real DIR and --fake DIR")
    for flag, value in (("--paired", command.paired), ("--resize", command.resize)):
        if value and not command.real:
            raise ValueError(f"{flag} is for --real and --fake")
    if command.teaches and command.real:
        raise ValueError("--augmentation is for runs: leave --real and --fake out")
    if command.sr and (command.real or command.teaches):
        raise ValueError("--sr is for runs, and alone: leave --real, --fake and --augmentation out")
    if command.augmentation != Augmentation() and not command.teaches:
        raise ValueError("--augmentation.* are settings of --augmentation: give it too")
    if command.augmentation.steps < 1:
        raise ValueError("--augmentation.steps must be at least 1")
    if command.data.name and not command.real:
        raise ValueError("--data.name is for --real and --fake; a run knows its dataset")
    if command.resize is not None and command.resize < 8:
        raise ValueError("--resize must be at least 8")
    if command.metrics.generated < 1 or command.metrics.real < 0 or command.metrics.seed < 0:
        raise ValueError("--metrics.generated, .real and .seed must not be negative")


def parse(arguments: list[str]) -> Command:
    """The command, the first run's metrics settings being the defaults. Raises ValueError."""
    first = next((a for a in arguments if (Path(a) / "recipe.json").is_file()), None)
    metrics = read_recipe(Path(first))[1].metrics if first else Metrics()
    default = Command(metrics=metrics)
    prog = "python -m engine.evaluate"
    return tyro.cli(Command, prog=prog, description=__doc__, args=arguments, default=default)


def run_command(arguments: list[str]) -> None:
    """Parse, check, measure, show. Raises ValueError for a wrong command, FAILURES for the rest."""
    command = parse(arguments)
    check(command)
    results = evaluate_folders(command) if command.real else evaluate_runs(command)
    show(results, Console(width=None if sys.stdout.isatty() else 120))
    if command.json:
        _write(command.json, results)


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code: 2 for a wrong command, 1 for one that fails."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return exit_code(lambda: run_command(arguments), FAILURES)


if __name__ == "__main__":
    sys.exit(main())
