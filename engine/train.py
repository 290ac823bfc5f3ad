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

from engine import checkpoint, describe, progress, watchdog
from engine import recipe as recipes
from engine.compile import CompileError
from engine.dry_run import dry_run
from engine.failure import NonFinite, roll_back, write_evidence
from engine.run import RunError
from engine.start import Training, begin, examine, fail
from engine.world import leave
from pipelines.datasets import BadImage, DatasetMissing
from pipelines.images import with_remedy
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
