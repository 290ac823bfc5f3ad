"""How far are runs from real images? python -m bench.yardstick RUN_DIR...

The Frechet distance of each run's newest measurement (metrics.jsonl), over that of as many training
images against the same real images by the same extractor: 1 would be as good as new real images.
"""

import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from engine.metrics.distances import figures
from engine.metrics.evaluator import real_features
from engine.metrics.extractor import open_extractor
from engine.report.read import Evaluation, read_run
from engine.run import RunError, read_recipe
from engine.verb import exit_code
from engine.world import Ranks
from pipelines.datasets import find


@dataclass(frozen=True)
class Command:
    """Runs of one recipe, measured by one protocol."""

    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories."""


def newest(run: Path) -> Evaluation:
    """The newest entry of a run's metrics.jsonl. Raises ValueError where there is none."""
    evaluations = read_run(run).evaluations
    if not evaluations:
        raise ValueError(f"{run} has no metrics.jsonl; train with --metrics.every-kimg")
    return evaluations[-1]


def real_distance(run: Path) -> float:
    """The Frechet distance of training images from the real images that the run is measured
    against, in equal numbers."""
    _, recipe, _ = read_recipe(run)
    ranks, data = Ranks(0, 0, 1, torch.device("cpu")), replace(recipe.data, flip=False)
    extractor = open_extractor(recipe.metrics, data, ranks.device, print)
    fresh = replace(recipe.metrics, split="train", real=recipe.metrics.generated)
    real, other = (
        real_features(find(data, metrics.split), data, metrics, extractor, ranks)
        for metrics in (recipe.metrics, fresh)
    )
    return figures(real, other)["fid"]


def show(command: Command) -> None:
    """Print each run's distance and share, their mean, and the protocol."""
    entries = [newest(run) for run in command.run_dirs]
    protocols = [entry.protocol for entry in entries]
    if any(p != protocols[0] for p in protocols):
        raise ValueError("the runs were measured by different protocols")
    floor, shares = real_distance(command.run_dirs[0]), []
    for run, entry in zip(command.run_dirs, entries, strict=True):
        shares.append(entry.figures["fid"] / floor)
        print(f"{run}: {entry.figures['fid']:.3f} at {entry.images:,} images, {shares[-1]:.2f}x")
    print(
        f"training images: {floor:.3f}; mean of {len(shares)} runs: {statistics.mean(shares):.2f}x"
    )
    print("protocol: " + ", ".join(f"{k} {v}" for k, v in protocols[0].items()))


def main() -> int:
    """The command line; exit code."""
    command = tyro.cli(Command, prog="python -m bench.yardstick", description=__doc__)
    return exit_code(lambda: show(command), (RunError,))


if __name__ == "__main__":
    sys.exit(main())
