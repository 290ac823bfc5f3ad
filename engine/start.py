"""Everything before the first step: from a command to a run that is ready to train."""

import contextlib
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from engine import checkpoint, probe, resolution, run, session, sharing, world
from engine.artifact import ArtifactError, load_artifact
from engine.compile import Compiler, graphs, rehearse
from engine.describe import Cost
from engine.display import Display
from engine.iteration import CudaGraph, Iteration, choose_graph, own_stream
from engine.metrics.schedule import Schedule
from engine.monitors import Monitors
from engine.precision import choose_precision
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
from engine.stored import Loaded
from engine.track import Trackers
from engine.watchdog import Watchdog
from engine.world import Ranks
from launch import environment as launcher
from pipelines.batch import Batch
from pipelines.datasets import BadImage, Dataset, DatasetMissing, find
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
    recipe = command.recipe
    folder = _agree(ranks, lambda: run.choose(command, name))
    before = _agree(ranks, lambda: _open_folder(exits, folder, recipe))
    total = total_images(recipe, dataset.images)
    display = exits.enter_context(Display(total, f"{name} {folder.name}", quiet=ranks.rank > 0))
    flops = cost.flops_per_image * total / ranks.world_size
    shared, micro = resolution.as_shared(recipe, len(dataset.classes), ranks, before)
    precision, compiler = resolution.resolve(shared, ranks, flops, before)
    measure = partial(probe.settings, shared, ranks, precision, len(dataset.classes), flops)
    found = _agree(
        ranks, lambda: _known(folder, before, ranks, display) if before else measure(display.line)
    )
    shared = probe.applied(shared, found)
    captured = choose_graph(recipe, ranks.device, command.profile)
    if captured[0]:
        own_stream(ranks.device)
    products, classes = probe.products(found), len(dataset.classes)
    live = session.start(shared, ranks, precision, compiler, total, classes, products)
    facts = _facts(name, recipe, dataset)
    resumed = _resume(live, folder, facts, dataset, display)
    fed = before["resolved"]["pipeline"][0] if before else None
    pipeline = open_pipeline(
        dataset, recipe.data, live.clock, recipe.seed, live.key, display.line, fed
    )
    exits.callback(pipeline.close)
    parts = [c.why for c in found if c.what == probe.PARTS]
    resolved = resolution.facts(live, pipeline, precision, compiler, captured, found) | {
        "accumulate": [shared.accumulate, "; ".join([micro, *parts])]
    }
    _introduce(display, resolution.introduction(resolved, ranks, dataset, recipe.step.notes()))
    graph, stats = CudaGraph if captured[0] else None, Stats(ranks)
    iterate = Iteration(live, pipeline, stats, graph, display.line)
    t = Training(name, folder, live, pipeline, total, facts, display, stop, stats, iterate, exits)
    t.saver = Saver(ranks)
    exits.callback(t.saver.close)
    if command.fresh:
        t.to_go_on = f"the same command with --run-name {folder.name} in place of --fresh goes on"
    if recipe.metrics.every_kimg and live.clock.images < total:
        t.metrics = Schedule(live, folder, display.line)  # may refuse: before anything is written
        exits.callback(t.metrics.close)
    if found and not before and ranks.rank == 0:
        probe.write(folder, found)
    _agree(ranks, lambda: _open_outputs(t, recipe, dataset, None if before else resolved, resumed))
    if ranks.world_size > 1 and recipe.hang_after and live.clock.images < total:
        watchdog = Watchdog(folder, ranks, live.clock, recipe.hang_after)
        exits.callback(watchdog.start().close)
    if live.clock.images < total:
        known = any(c.what.startswith(probe.COMPILE) for c in found)
        begins = live.clock.images == 0 and not known  # also after a kill while it compiled
        made = _compile(t, compiler, command, found, begins)
        if made and ranks.rank == 0:
            probe.write(folder, found + made)
    if command.profile and ranks.rank == 0 and live.clock.images < total:
        t.profiler = Profiler(live, folder / "profile", name, pipeline.name, display.line)
        exits.callback(t.profiler.close)
    return t


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


def _agree(ranks: Ranks, check_on_rank_0: Callable[[], Any]) -> Any:
    """Rank 0's result, or its ValueError, RunError or BadImage, on every rank; what the disk
    refuses is a RunError."""
    answer: tuple[Any, Exception | None] = (None, None)
    if ranks.rank == 0:
        try:
            answer = (check_on_rank_0(), None)
        except (ValueError, run.RunError, BadImage) as error:
            answer = (None, error)
        except OSError as error:
            text = f"cannot write the run folder ({error}); --runs names another place"
            answer = (None, run.RunError(text))
    result, error = ranks.share(answer)
    if error:
        raise error
    return result


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


def _facts(name: str, recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint says of the run."""
    return {
        "recipe": name,
        "dataset": dataset.identity(),
        "dataset_images": dataset.images,
        "classes": len(dataset.classes),
        "words": list(dataset.words) if recipe.step.reads_captions() else [],
    }


def _known(
    folder: Path, before: dict[str, Any], ranks: Ranks, display: Display
) -> list[probe.Choice]:
    """What was measured when the run began, if that was on such a device. Micro-batches are those
    of so many ranks."""
    if before["resolved"]["device_type"] != ranks.device.type:
        return []
    try:
        return [c for c in probe.read(folder) if c.what != probe.PARTS]
    except ValueError as error:
        display.warn(f"{error}: the usual ways from here on, whose rounding may be another")
        return []


def _resume(
    live: Session, folder: Path, facts: dict[str, Any], dataset: Dataset, display: Display
) -> bool:
    """Load the newest whole checkpoint, if there is one."""
    newest = _agree(live.ranks, lambda: _newest(folder / "checkpoints", display))
    if newest is None:
        return False
    loaded = Loaded(newest, live.ranks.rank)
    # checkpoints of before knew a dataset by the times of its files as well
    if loaded.index["dataset"] not in (facts["dataset"], dataset.identity(times=True)):
        raise ValueError(
            f"the dataset is not the one that {folder} was trained on ({facts['dataset_images']} "
            f"images now, {loaded.index['dataset_images']} then, or changed files); restore it, "
            f"or start another run with --fresh"
        )
    checkpoint.restore(live, loaded)
    text = f"resuming {folder} from {loaded.images:,} images"
    if (then := loaded.index["world_size"]) != live.ranks.world_size:
        text += f", trained on {then} rank(s) until there, now on {live.ranks.world_size}"
    display.line(text)
    return True


def _newest(checkpoints: Path, display: Display) -> Path | None:
    """The newest whole checkpoint, None where there never was one. A run whose checkpoints are all
    damaged does not begin again by itself: that would overwrite what is left of it."""
    newest = checkpoint.newest_whole(checkpoints, display.warn, set_aside=True)
    damaged = sorted(checkpoints.glob("*.damaged*")) if newest is None else []
    if damaged:
        raise run.RunError(
            f"no checkpoint in {checkpoints} is whole: put back the files of one "
            f"({damaged[-1].name} is the newest, without `.damaged`), or begin anew with --fresh"
        )
    return newest


def _compile(
    t: Training, compiler: Compiler, command: Command, found: list[probe.Choice], begins: bool
) -> list[probe.Choice]:
    """Compile what is to be; a run that begins measures whether that was well done."""
    if not compiler.active:
        if command.compile_artifact:
            t.display.warn(f"--compile-artifact: nothing is compiled ({compiler.reason})")
        return []
    if command.compile_artifact:
        take_artifact(command.compile_artifact, t.session.ranks.device, t.display)
    compiler.kept_eager = probe.kept_eager(found)
    t.pipeline.ready(t.session.clock)
    batch = t.pipeline.batch(t.session.clock)
    compile_all(t.session, batch, t.display.line)
    recipe = t.session.recipe
    if not begins or not compiler.active or (recipe.compile, recipe.probe) != ("auto", "auto"):
        return []
    choices = probe.compilation(t.session, compiler, batch)
    for made in choices:
        t.display.line(f"{made.what}: {made.said}")
    return choices


def take_artifact(path: Path, device: torch.device, display: Display) -> None:
    """Have what is compiled found in a file of `launch.doctor --warm`."""
    try:
        load_artifact(path, device)
    except OSError as error:
        display.warn(f"--compile-artifact {path}: {error.strerror}; compiling instead")
    except ArtifactError as error:
        display.warn(f"--compile-artifact {path} {error}; compiling instead")


def compile_all(live: Session, batch: Batch, say: Callable[[str], None]) -> None:
    """Compile by a rehearsal on this batch, and say how long it took."""
    began = time.monotonic()
    with live.rehearsing():
        rehearse(
            lambda: live.rehearse(batch),
            next(iter(live.players.values())).compiler,
            live.ranks,
            say,
            together=any(player.shared.sharded for player in live.players.values()),
        )
    new, cached = (sum(n) for n in zip(*live.ranks.gather(graphs()), strict=True))
    seconds = time.monotonic() - began
    say(f"compiled in {seconds:.0f} s: {new} graphs new, {cached} from the cache")
