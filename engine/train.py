"""Train a recipe: python -m engine.train RECIPE [overrides], alone or under torchrun.

The same command goes on with a run that was stopped or killed. `--list` shows the recipes,
`RECIPE --help` every setting, `RECIPE --dry-run` what would be trained and how.
"""

from engine import early_signal

if __name__ == "__main__":
    early_signal.listen()  # importing the rest takes seconds

import sys
import time
from dataclasses import replace

import torch
from rich.console import Console

from engine import checkpoint, describe, progress, sharing, watchdog
from engine import recipe as recipes
from engine.compile import CompileError, choose_compile
from engine.failure import NonFinite, roll_back, write_evidence
from engine.iteration import choose_graph
from engine.precision import choose_precision
from engine.run import RunError, device_name
from engine.settings import Metrics
from engine.start import Training, begin, examine, fail
from engine.world import environment, leave
from kernels import dispatch
from pipelines.datasets import BadImage, Dataset, DatasetMissing
from pipelines.images import with_remedy
from pipelines.open import choose
from pipelines.pack import CacheUnusable

FAILURES = (
    RunError,
    checkpoint.CheckpointError,
    CompileError,
    BadImage,
    CacheUnusable,
    NonFinite,
    OSError,  # the disk's: pictures of a tick are forgiven there, all else ends here
)


def loop(t: Training) -> bool:
    """Train to the end or to a stop request; whether the end was reached.

    Raises NonFinite, CheckpointError or BadImage.
    """
    clock, outputs = t.session.clock, t.session.recipe.outputs
    pace = progress.Pace(clock.images)
    while clock.images < t.total:
        if t.profiler:
            t.profiler.next()
        clock.enter(watchdog.DATA)
        waiting = time.monotonic()
        t.pipeline.ready(clock)
        pace.waited += time.monotonic() - waiting
        t.iterate()
        if not t.begun:
            progress.first_step(t)
        last, stop = clock.images >= t.total, t.stop.agreed(t.session.ranks)
        sample = last or progress.due(clock, outputs.sample_every)
        measure = progress.measures(t, last)
        save = last or stop or progress.due(clock, outputs.checkpoint_every)
        if sample or save or measure or progress.due(clock, outputs.log_every):
            pace = progress.tick(t, pace, sample, measure)
        if save or (measure and t.metrics.improved):
            progress.save(t)
        if stop and not last:
            return False
    return True


def train_with_rollbacks(t: Training) -> bool:
    """The loop, gone back to the last good checkpoint after a non-finite value if so asked."""
    if t.session.recipe.on_nan == "rollback" and t.session.clock.images == 0:
        progress.save(t)  # something to go back to from the first iteration on
    while True:
        try:
            return loop(t)
        except NonFinite as failure:
            write_evidence(t, failure)
            roll_back(t, failure)


def run_command(command: recipes.Command, name: str) -> int:
    """Check, start, train and finish; exit code. Prints one message for what goes wrong."""
    try:
        recipe, device, dataset = examine(command.recipe)
        command = replace(command, recipe=recipe)
        cost = describe.cost(command.recipe, len(dataset.classes))
        if command.dry_run:
            dry_run(command.recipe, name, device, dataset, cost)
            return 0
        t = begin(command, name, dataset, device, cost)
    except ValueError as error:
        fail(str(error), 2)
    except (DatasetMissing, *FAILURES) as error:
        fail(with_remedy(error), 1)
    with t.exits:
        try:
            if t.session.clock.images >= t.total:
                progress.already_finished(t)
            elif train_with_rollbacks(t):
                progress.finish(t)
            else:
                progress.stopped(t)
        except FAILURES as error:
            t.display.close()
            if t.session.ranks.rank == 0:
                print(f"error: {with_remedy(error)}", file=sys.stderr, flush=True)
            return 1
    return 0


def dry_run(
    recipe: recipes.Recipe, name: str, device: torch.device, dataset: Dataset, cost: describe.Cost
) -> None:
    """Print the resolved recipe and how it would run."""
    if environment()[0]:
        return
    ranks = environment()[2]
    total = recipes.total_images(recipe, dataset.images)
    precision = choose_precision(recipe.precision, device)
    obstacle = sharing.compile_obstacle(recipe, ranks)
    compiler = choose_compile(
        recipe.compile, device, cost.flops_per_image * total / ranks, obstacle
    )
    captured, why = choose_graph(recipe, device)
    units = ", ".join(cost.units) if compiler.active else "nothing"
    facts = {
        "dataset": f"{dataset.name}, {len(dataset):,} images"
        + (f" ({dataset.note})" if dataset.note else ""),
        "length": f"{total:,} images, {total // recipe.data.batch:,} steps",
        "FLOPs per image": f"{cost.flops_per_image / 1e6:,.1f} million (all updates, both passes)",
        "device": f"{device_name(device)}, {ranks} rank(s)",
        "ranks": sharing.describe(recipe, ranks),
        "precision": f"{precision.name} ({precision.reason})",
        "compile": f"{units} ({compiler.reason})",
        "graph": f"{'on' if captured else 'off'} ({why})",
        "kernels": "\n".join(": ".join(row) for row in dispatch.explain(device)),
        "pipeline": ": ".join(choose(dataset, recipe.data, device)),
        "metrics": _metrics(recipe.metrics),
    }
    if notes := recipe.step.notes():
        facts["notes"] = "\n".join(notes)
    describe.show(Console(), name, recipe, facts, len(dataset.classes))


def _metrics(settings: Metrics) -> str:
    """When the samples are measured, in words."""
    if not settings.every_kimg:
        return "not while training (--metrics.every-kimg)"
    real = f"{settings.real:,}" if settings.real else "all"
    against = f"{settings.generated:,} generated against {real} of the {settings.split} split"
    return f"every {settings.every_kimg:g} kimg, {against}"


def list_recipes() -> None:
    """Print every recipe with its one-line description."""
    width = max(len(n) for n in recipes.names())
    for name in recipes.names():
        print(f"{name:{width}}  {recipes.summary(name)}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "--list":
        list_recipes()
        return 0
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        list_recipes()
        return 0 if "--help" in arguments or "-h" in arguments else 2
    try:
        command = recipes.parse(arguments[0], arguments[1:])
    except ValueError as error:
        fail(str(error), 2)
    return run_command(command, arguments[0])


if __name__ == "__main__":
    leave(main())
