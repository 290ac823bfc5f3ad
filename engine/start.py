"""Everything before the first step: from a command to a run that is ready to train."""

import contextlib
import socket
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from engine import probe, resolution, resume, run, session, sharing, world
from engine.describe import Cost
from engine.display import Display
from engine.iteration import CudaGraph, Iteration, own_stream
from engine.metrics.schedule import Schedule
from engine.monitors import Monitors
from engine.precision import choose_precision
from engine.precompile import precompile
from engine.profiling.profiler import Profiler
from engine.recipe import (
    Command,
    check,
    check_captions,
    check_classes,
    flatten,
    total_images,
)
from engine.saver import Saver
from engine.session import Session
from engine.settings import Recipe
from engine.signals import StopRequest
from engine.snapshot import Snapshots
from engine.stats import Record, Stats
from engine.track import Trackers
from engine.watchdog import Watchdog
from engine.world import Ranks
from launch import environment as launcher
from pipelines.datasets import Dataset, DatasetMissing, find
from pipelines.open import Pipeline, open_pipeline
from pipelines.settings import Data

PATIENCE_S = 10.0  # what another rank gives rank 0 to say the same first


@dataclass
class Training:
    """A run that is ready to train, on one rank; record, snapshots exist on rank 0 alone."""

    name: str
    folder: Path
    session: Session
    pipeline: Pipeline
    total: int
    facts: dict[str, Any]
    display: Display
    stop: StopRequest
    stats: Stats
    iterate: Iteration
    exits: ExitStack
    record: Record | None = None
    snapshots: Snapshots | None = None
    metrics: Schedule | None = None
    saver: Saver | None = None
    to_go_on: str = "the same command goes on"
    monitors: Monitors = field(default_factory=Monitors)
    profiler: Profiler | None = None
    begun: bool = False  # whether an iteration was done since the start

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / "checkpoints"


def fail(message: str, code: int) -> NoReturn:
    """Leave with one message from rank 0 alone, before there is a process group.

    Another rank waits for rank 0 to have said the same, and to be stopped by the launcher; if it
    is still there then, the trouble is its own.
    """
    rank = world.environment()[0]
    if rank:
        time.sleep(PATIENCE_S)
        message = f"rank {rank} on {socket.gethostname()}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    world.leave(code)


def examine(recipe: Recipe) -> tuple[Recipe, torch.device, Dataset]:
    """A recipe with what it leaves to others settled, its device and its dataset, once it is known
    that these go together. Raises DatasetMissing, or ValueError naming a setting."""
    ranks, recipe = world.environment()[2], sharing.settled(recipe)
    check(recipe, ranks)
    device = world.choose_device(recipe.device)
    sharing.check(recipe, choose_precision(recipe.precision, device), ranks)
    dataset = find_dataset(recipe.data)
    check_classes(recipe, len(dataset.classes))
    check_captions(recipe, dataset.words)
    return recipe, device, dataset


def find_dataset(data: Data) -> Dataset:
    """The recipe's dataset; where it is to be fetched, one local rank does and the others wait.

    Raises DatasetMissing, or ValueError naming a setting.
    """
    if not data.download or world.environment()[1] == 0:
        return find(data)
    while True:  # a rank that fails to fetch it ends the others through the launcher
        try:
            return find(replace(data, download=False))
        except DatasetMissing:
            time.sleep(1)


def begin(
    command: Command, name: str, dataset: Dataset, device: torch.device, cost: Cost
) -> Training:
    """Join the ranks, open or make the run directory, build everything, load the newest checkpoint,
    compile. Raises ValueError, RunError, CheckpointError, CompileError or BadImage."""
    stop, exits = StopRequest(), ExitStack()
    exits.callback(stop.restore)
    try:
        ranks = world.start(device)
        exits.callback(world.stop)
        exits.callback(stop.settle)
        return _prepare(command, name, dataset, ranks, cost, stop, exits)
    except BaseException:
        exits.close()
        raise


def _prepare(
    command: Command,
    name: str,
    dataset: Dataset,
    ranks: Ranks,
    cost: Cost,
    stop: StopRequest,
    exits: ExitStack,
) -> Training:
    recipe, classes = command.recipe, len(dataset.classes)
    folder = run.agree(ranks, lambda: run.choose(command, name))
    before = run.agree(ranks, lambda: _open_folder(exits, folder, recipe))
    total = total_images(recipe, dataset.images)
    display = exits.enter_context(Display(total, f"{name} {folder.name}", quiet=ranks.rank > 0))
    flops = cost.flops_per_image * total / ranks.world_size
    ways = resolution.settle(command, folder, before, classes, ranks, flops, display)
    if ways.graph[0]:
        own_stream(ranks.device)
    products = probe.products(ways.found)
    live = session.start(
        ways.recipe, ranks, ways.precision, ways.compiler, total, classes, products
    )
    facts = resume.facts(name, recipe, dataset)
    resumed = resume.resume(live, folder, facts, dataset, display)
    fed = before["resolved"]["pipeline"][0] if before else None
    pipeline = open_pipeline(
        dataset, recipe.data, live.clock, recipe.seed, live.key, display.line, fed
    )
    exits.callback(pipeline.close)
    resolved = resolution.facts(live, pipeline, ways)
    _introduce(display, resolution.introduction(resolved, ranks, dataset, recipe.step.notes()))
    graph, stats = CudaGraph if ways.graph[0] else None, Stats(ranks)
    iterate = Iteration(live, pipeline, stats, graph, display.line)
    t = Training(name, folder, live, pipeline, total, facts, display, stop, stats, iterate, exits)
    _equip(t, command)
    if ways.found and not before and ranks.rank == 0:
        probe.write(folder, ways.found)
    new = None if before else resolved
    run.agree(ranks, lambda: _open_outputs(t, recipe, dataset, new, resumed))
    if live.clock.images < total:
        _make_ready(t, command, ways)
    return t


def _equip(t: Training, command: Command) -> None:
    """Add what saves and what measures the run; nothing is written yet."""
    t.saver = Saver(t.session.ranks)
    t.exits.callback(t.saver.close)
    if command.fresh:
        t.to_go_on = f"the same command with --run-name {t.folder.name} in place of --fresh goes on"
    if command.recipe.metrics.every_kimg and t.session.clock.images < t.total:
        t.metrics = Schedule(t.session, t.folder, t.display.line)  # may refuse
        t.exits.callback(t.metrics.close)


def _make_ready(t: Training, command: Command, ways: resolution.Ways) -> None:
    """Watch, compile, and prepare to profile a run that has images left."""
    live, display = t.session, t.display
    if live.ranks.world_size > 1 and command.recipe.hang_after:
        watchdog = Watchdog(t.folder, live.ranks, live.clock, command.recipe.hang_after)
        t.exits.callback(watchdog.start().close)
    artifact, found = command.compile_artifact, ways.found
    made = precompile(live, t.pipeline, ways.compiler, artifact, found, display)
    if made and live.ranks.rank == 0:
        probe.write(t.folder, found + made)
    if command.profile and live.ranks.rank == 0:
        t.profiler = Profiler(live, t.folder / "profile", t.name, t.pipeline.name, display.line)
        t.exits.callback(t.profiler.close)


def _open_outputs(
    t: Training,
    recipe: Recipe,
    dataset: Dataset,
    resolved: dict[str, Any] | None,
    resumed: bool,
) -> None:
    """Open what rank 0 writes; recipe.json too where the run is new."""
    images = t.session.clock.images
    if resolved:
        run.write_recipe(t.folder, t.name, recipe, resolved)
    trackers = Trackers(recipe.outputs.track, t.folder, t.name, flatten(recipe), t.display.warn)
    t.record = Record(t.folder, images, recipe.data.batch, trackers)
    t.exits.callback(t.record.close)
    t.snapshots = Snapshots(t.session, t.folder, dataset)
    t.exits.callback(t.snapshots.close)
    t.record.event(images, "resume" if resumed else "start", str(t.folder))


def _open_folder(exits: ExitStack, folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    stored = run.check_same(folder, recipe)
    made = [place for place in (folder, *folder.parents[:2]) if not place.exists()]
    exits.callback(_remove_unused, folder, made)
    if not exits.enter_context(run.locked(folder)):
        print(f"warning: {folder} cannot be locked there; start no second run in it", flush=True)
    return stored


def _remove_unused(folder: Path, made: list[Path]) -> None:
    """Take back the folders that a start made, if it failed before it wrote anything there."""
    with contextlib.suppress(OSError):  # another process may use them by now
        if folder in made and [p.name for p in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink()
            for place in made:
                place.rmdir()


def _introduce(display: Display, lines: list[str]) -> None:
    """Say how the run is done, and what is doubtful of the machine."""
    for line in lines:
        display.line(line)
    for line in launcher.doubts():
        display.warn(line)
