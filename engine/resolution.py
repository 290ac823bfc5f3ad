"""How what a recipe leaves open is settled where it runs, each with its reason; a run that goes on
keeps to what was settled when it began."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine import micro_batch, probe, run, sharing
from engine.compile import Compiler, choose_compile
from engine.display import Display
from engine.iteration import choose_graph
from engine.precision import Precision, choose_precision
from engine.recipe import Command
from engine.session import Session
from engine.settings import Recipe
from engine.world import Ranks
from kernels.convolution_module import counted
from pipelines.datasets import Dataset
from pipelines.open import Pipeline


@dataclass
class Ways:
    """How a run is done: its recipe with what that left open settled, and why."""

    recipe: Recipe
    micro: str  # why so many micro-batches
    precision: Precision
    compiler: Compiler
    graph: tuple[bool, str]
    found: list[probe.Choice]  # what was measured


def settle(
    command: Command,
    folder: Path,
    before: dict[str, Any] | None,
    classes: int,
    ranks: Ranks,
    flops: float,
    display: Display,
) -> Ways:
    """What a recipe leaves open, settled for a run of so many FLOPs on each rank; before: the run's
    recipe.json, where it goes on. Raises ValueError for sizes that do not fit."""
    shared, micro = as_shared(command.recipe, classes, ranks, before)
    precision, compiler = resolve(shared, ranks, flops, before)

    def measured() -> list[probe.Choice]:
        if before:
            return _known(folder, before, ranks, display)
        return probe.settings(shared, ranks, precision, classes, flops, display.line)

    found = run.agree(ranks, measured)
    graph = choose_graph(command.recipe, ranks.device, command.profile)
    return Ways(probe.applied(shared, found), micro, precision, compiler, graph, found)


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


def facts(live: Session, pipeline: Pipeline, ways: Ways) -> dict[str, Any]:
    """How settings were resolved here, each with its reason."""
    ranks, shared = live.ranks, live.recipe
    measured = {c.what: c.said for c in ways.found}
    parts = [c.why for c in ways.found if c.what == probe.PARTS]
    if shared.convolutions == "matmul" and "convolutions" not in measured:
        counts = [counted(player.network) for player in live.players.values()]
        mapped, every = (sum(both) for both in zip(*counts, strict=True))
        measured["convolutions"] = f"matmul (as asked: {mapped} of {every} layers)"
    return {
        "device": run.device_name(ranks.device),
        "device_type": ranks.device.type,
        "precision": [ways.precision.name, ways.precision.reason],
        "compile": [ways.compiler.active, ways.compiler.reason],
        "graph": ways.graph,
        "memory_format": [shared.memory_format, measured.get("memory_format", "not measured")],
        "convolutions": [shared.convolutions, measured.get("convolutions", "not measured")],
        "kernels": [shared.kernels, measured.get("kernels", "not measured")],
        "pipeline": [pipeline.name, pipeline.choice],
        "ranks": [ranks.world_size, sharing.describe(shared, ranks.world_size)],
        "sync_bn": sharing.choose_sync_bn(shared, ranks.world_size),
        "accumulate": [shared.accumulate, "; ".join([ways.micro, *parts])],
    }


def resolve(
    recipe: Recipe, ranks: Ranks, flops: float, before: dict[str, Any] | None = None
) -> tuple[Precision, Compiler]:
    """Precision and compilation, as they were resolved when the run began on such a device."""
    precision = choose_precision(recipe.precision, ranks.device)
    obstacle = sharing.compile_obstacle(recipe, ranks.world_size)
    compiler = choose_compile(recipe.compile, ranks.device, flops, obstacle)
    if before and before["resolved"]["device_type"] == ranks.device.type:
        name, _ = before["resolved"]["precision"]
        active, _ = before["resolved"]["compile"]
        precision = Precision(name, "as when the run began", ranks.device.type)
        if active != compiler.active and not (active and obstacle):
            compiler = Compiler(active, "as when the run began", compiler.required)
    return precision, compiler


def as_shared(
    recipe: Recipe, classes: int, ranks: Ranks, before: dict[str, Any] | None
) -> tuple[Recipe, str]:
    """The recipe with micro-batches and synchronisation settled, as when the run began on so many
    ranks; and why so many micro-batches."""
    if not before or before["resolved"]["ranks"][0] != ranks.world_size:
        return micro_batch.resolve(recipe, classes, ranks)
    accumulate, synchronised = (before["resolved"][x][0] for x in ("accumulate", "sync_bn"))
    recipe = replace(recipe, sync_bn="on" if synchronised else "off")
    if recipe.batch_per_rank != "auto":
        return micro_batch.resolve(recipe, classes, ranks)
    return replace(recipe, accumulate=accumulate), "as when the run began"


def introduction(
    resolved: dict[str, Any], ranks: Ranks, dataset: Dataset, notes: tuple[str, ...]
) -> list[str]:
    images = f"{len(dataset):,} images"
    lines = [f"data: {dataset.name}, {images}" + (f" ({dataset.note})" if dataset.note else "")]
    lines.append(f"pipeline: {resolved['pipeline'][1]}")
    lines.append(f"device: {resolved['device']}")
    if ranks.world_size > 1:
        lines.append("ranks: {}: {}".format(*resolved["ranks"]))
    parts, why = resolved["accumulate"]
    if parts > 1:
        lines.append(f"micro-batches: {parts} ({why})")
    lines.append("precision: {} ({})".format(*resolved["precision"]))
    for what in ("memory_format", "convolutions"):
        if resolved[what][1] != "not measured":
            lines.append(f"{what.replace('_', ' ')}: {resolved[what][1]}")
    for what in ("compile", "graph"):
        active, reason = resolved[what]
        lines.append(f"{what}: {'on' if active else 'off'} ({reason})")
    return [*lines, *notes]
