"""What has a run left so far? Its files as read at any moment, whole, torn or absent."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]
EVALUATED = "evaluation.json"
LEFT_OUT = "could not be read: left out"

BACKWARDS = ("start", "resume", "rollback")
"""Events after which the run goes on from their number of images; what came later is undone."""


@dataclass
class Stats:
    """stats.jsonl as read: values by images seen, events in order, and what was odd about it."""

    values: dict[int, dict[str, float]] = field(default_factory=dict)
    events: list[Json] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def images(self) -> int:
        """Images seen."""
        return max([*self.values, *(event["images"] for event in self.events)], default=0)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end and was not taken up again."""
        kinds = [e["event"] for e in self.events if e["event"] in (*BACKWARDS, "finish")]
        return kinds[-1:] == ["finish"]


@dataclass(frozen=True)
class Evaluation:
    """One line of metrics.jsonl, or entry of evaluation.json: figures and what they were measured
    with. checkpoint: its SHA-256, where it is known."""

    images: int
    figures: dict[str, float]
    protocol: Json
    checkpoint: str = ""


class Unreadable(Exception):
    """A file without which there is nothing to show is damaged."""


@dataclass
class Run:
    """A run directory as read. evaluations: those of training. evaluated: what `engine.evaluate`
    measured, oldest first. best: the best checkpoint (images, metric, value), or empty."""

    folder: Path
    recipe: Json
    stats: Stats
    evaluations: list[Evaluation]
    evaluated: list[Evaluation]
    best: Json
    notes: list[str]

    @property
    def name(self) -> str:
        """Name of the recipe, else of the folder."""
        return str(self.recipe.get("recipe") or self.folder.resolve().name)

    def part(self, key: str) -> Json:
        """A part of recipe.json, empty where it is missing."""
        part = self.recipe.get(key)
        return part if isinstance(part, dict) else {}


def read_run(folder: Path) -> Run:
    """Everything but the pictures."""
    recipe, notes = read_recipe(folder / "recipe.json")
    stats = read_stats(folder / "stats.jsonl")
    evaluations, torn = _read_metrics(folder / "metrics.jsonl", stats)
    best = _read_best(folder / "checkpoints" / "best.json")
    entries, problems = read_evaluated(folder)
    evaluated = [
        Evaluation(e["images"], _numbers(e["figures"]), e["protocol"], str(e.get("checkpoint", "")))
        for e in entries
    ]
    notes = [*stats.notes, *torn, *problems, *notes]
    return Run(folder, recipe, stats, evaluations, evaluated, best, notes)


def read_evaluated(folder: Path) -> tuple[list[Json], list[str]]:
    """The entries of a run's evaluation.json, oldest first, and notes on what cannot be read."""
    try:
        found = json.loads((folder / EVALUATED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [], []
    except (OSError, ValueError) as error:
        return [], [f"{EVALUATED} could not be read: {error}"]
    if not isinstance(found, list):
        return [], [f"{EVALUATED} holds no list of evaluations"]
    kinds = {"images": int, "figures": dict, "protocol": dict}
    whole = [
        entry
        for entry in found
        if isinstance(entry, dict) and all(isinstance(entry.get(k), kinds[k]) for k in kinds)
    ]
    odd = len(found) - len(whole)
    return whole, [f"{counted(odd, 'entry', 'entries')} of {EVALUATED} {LEFT_OUT}"] * bool(odd)


def read_recipe(path: Path) -> tuple[Json, list[str]]:
    """recipe.json, and a note where it cannot be read."""
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {}, [f"recipe.json could not be read: {error}"]
    if not isinstance(recipe, dict):
        return {}, ["recipe.json holds no object"]
    return recipe, []


def read_stats(path: Path) -> Stats:
    """stats.jsonl without its torn lines and without what a resume or rollback has undone."""
    stats, last = Stats(), 0.0
    for images, line in _lines(path, stats.notes):
        if "event" in line:
            stats.events.append(line | {"images": images})
            if line["event"] in BACKWARDS:
                stats.values = {at: row for at, row in stats.values.items() if at <= images}
        seconds = number(line.get("seconds"))
        if math.isfinite(seconds):  # a process that counts from zero again adds to the sum
            stats.seconds += seconds - last if seconds >= last else seconds
            last = seconds
        if isinstance(line.get("values"), dict):
            stats.values.setdefault(images, {}).update(_numbers(line["values"]))
    stats.values = dict(sorted(stats.values.items()))
    return stats


def _read_metrics(path: Path, stats: Stats) -> tuple[list[Evaluation], list[str]]:
    """The evaluations that stand, by images seen; of several at one place the last."""
    notes: list[str] = []
    found: dict[int, Evaluation] = {}
    for images, line in _lines(path, notes):
        figures, protocol = line.get("figures"), line.get("protocol")
        if isinstance(figures, dict):
            protocol = protocol if isinstance(protocol, dict) else {}
            found[images] = Evaluation(images, _numbers(figures), protocol)
    return [found[at] for at in sorted(found) if not _undone(at, stats)], notes


def _undone(images: int, stats: Stats) -> bool:
    """Whether a run that went back to before an evaluation has not made it anew.

    metrics.jsonl has no events; stats.jsonl, which has, holds the same figures.
    """
    back = [e["images"] for e in stats.events if e["event"] in ("resume", "rollback")]
    went_back = any(at < images for at in back)
    return went_back and not any(key.startswith("metric/") for key in stats.values.get(images, ()))


def _read_best(path: Path) -> Json:
    """best.json with its three fields, else nothing."""
    try:
        best = json.loads(path.read_text(encoding="utf-8"))
        figure = {"metric": str(best["metric"]), "value": number(best["value"])}
        return {"images": int(best["images"])} | figure
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _lines(path: Path, notes: list[str]) -> Iterator[tuple[int, Json]]:
    """The objects of a .jsonl file with their number of images; a note tells of torn lines."""
    content = path.read_bytes() if path.exists() else b""
    torn = 0
    for raw in content.splitlines():
        try:
            line = json.loads(raw)
            images = int(line["images"])
        except (ValueError, TypeError, KeyError, OverflowError):
            torn += 1
            continue
        yield images, line
    being_written = not content.endswith(b"\n")
    if torn > being_written:
        notes.append(f"{counted(torn, 'line', 'lines')} of {path.name} {LEFT_OUT}")


def counted(count: int, one: str, several: str) -> str:
    """A number of things in words."""
    return f"{count:,} {one if count == 1 else several}"


def _numbers(values: Json) -> dict[str, float]:
    return {str(key): number(value) for key, value in values.items()}


def number(value: Any) -> float:
    """A logged value as a float; null, "NaN", "Infinity" and anything else unreadable is NaN."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
