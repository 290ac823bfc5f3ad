"""Compile a recipe before it is trained, without its images: `launch.doctor --warm`."""

import sys
from contextlib import ExitStack
from dataclasses import replace

from rich.console import Console

from engine import describe, micro_batch, resolution, session, world
from engine import recipe as recipes
from engine.artifact import save_artifact
from engine.compile import CompileError
from engine.precompile import compile_all
from engine.run import RunError
from engine.settings import Recipe
from engine.start import examine
from engine.world import Ranks
from pipelines.datasets import Dataset, DatasetMissing

FAILURES = (CompileError, DatasetMissing, RunError, OSError)


def main(arguments: list[str]) -> int:
    """The command line without --warm; exit code. Raises ValueError for a wrong command."""
    if not arguments or arguments[0].startswith("-"):
        raise ValueError("--warm needs a recipe: python -m launch.doctor --warm RECIPE ...")
    command = recipes.parse(arguments[0], arguments[1:])
    if command.recipe.compile == "off":
        raise ValueError("--compile off leaves nothing to compile ahead: leave it out")
    if command.compile_artifact and command.compile_artifact.is_dir():
        raise ValueError(f"--compile-artifact {command.compile_artifact} is a folder: name a file")
    try:
        recipe, device, dataset = examine(command.recipe)
        with ExitStack() as exits:
            ranks = world.start(device)
            exits.callback(world.stop)
            console = Console(quiet=ranks.rank > 0)
            compile_ahead(recipe, dataset, ranks, console)
            if command.compile_artifact and ranks.rank == 0:
                size = save_artifact(command.compile_artifact)
                console.print(f"wrote {command.compile_artifact}: {size / 1e6:.1f} MB", style="")
            ranks.barrier()
    except FAILURES as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def compile_ahead(recipe: Recipe, dataset: Dataset, ranks: Ranks, console: Console) -> None:
    """Build what training would, and rehearse on a batch of black images. Raises CompileError where
    something cannot be compiled."""
    classes = len(dataset.classes)
    recipe = replace(recipe, compile="required")
    recipe, _ = micro_batch.resolve(recipe, classes, ranks)
    precision, compiler = resolution.resolve(recipe, ranks, float("inf"))
    total = recipes.total_images(recipe, dataset.images)
    live = session.start(recipe, ranks, precision, compiler, total, classes)
    images = live.clock.batch // ranks.world_size
    batch = describe.example_batch(recipe, images, ranks.device)
    if dataset.labels is None:
        batch.labels_N = None
    batch.position_N = live.clock.position_N()
    compile_all(live, batch, lambda text: console.print(text, style="", highlight=False))
