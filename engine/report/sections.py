"""What does the page of a run show? Each function makes one section, which JavaScript draws."""

import json
import math
import shlex
import time
from pathlib import Path
from typing import Any

from engine.report.curves import curves_section, shown
from engine.report.embed import embed, film
from engine.report.quality import evaluated_section, protocol_changes, quality_section
from engine.report.read import Json, Run, Stats, read_run

TILES = (
    ("speed/images_per_s", "throughput", "images/s"),
    ("time/data_share", "waiting for data", "% of the time"),
    ("memory/gib", "peak memory so far", "GiB"),
)
"""Figures at the top of the page: key, label, unit."""
MEDIANS = "Throughput and waiting for data are medians of the last 20 log lines."

NEIGHBOURS = (
    "Each row: a sample, then the training images nearest to it (Euclidean distance of pixels, at "
    "most 32 x 32 of them, among the first 50,000 images at most). "
    "A sample that its neighbours merely resemble is new; one that equals a neighbour was "
    "memorised."
)
NEIGHBOUR_DISTANCE = (
    "The distance puts a number on it: the median distance of samples to their nearest training "
    "image, divided by that of held-out images. 1 means as far from the training set as real "
    "images never seen; much below 1, copies. Blurred or uniform samples lower it as well."
)
INTERPOLATION = (
    "Each row goes from one latent to another along a great arc. Smooth change from picture to "
    "picture is a sign of learning; sudden jumps are a sign of memorising."
)
RECONSTRUCTION = (
    "Rows of real images (held-out ones where the dataset has any), each over what the model makes "
    "of it."
)
PLATES = {
    "neighbours": ("Neighbours in the training set", NEIGHBOURS),
    "interpolation": ("Interpolation", INTERPOLATION),
    "reconstruction": ("Reconstructions", RECONSTRUCTION),
}
"""Pictures in the order of the page: file name, title, words."""
FIGURES = {"neighbours": ("monitor/neighbour_distance", NEIGHBOUR_DISTANCE)}
"""The logged value that goes with a picture, and what it says in words."""


def payload(run_dir: Path) -> Json:
    """Everything the page of a run shows, one key per section."""
    run = read_run(run_dir)
    notes = list(run.notes)
    samples = film(run_dir, notes)
    plates = plates_section(run, notes)
    return {
        "kind": "run",
        "title": run.name,
        "run": run_dir.resolve().name,
        "written": round(time.time()),
        "summary": summary_section(run),
        "events": events_section(run, notes),
        "samples": samples,
        "quality": quality_section(run),
        "evaluated": evaluated_section([run]),
        "plates": plates,
        "curves": curves_section(run.stats),
        "settings": settings_section(run),
        "origin": origin_section(run),
        "commands": commands_section(run),
    }


def plates_section(run: Run, notes: list[str]) -> list[Json]:
    """The pictures that the run has drawn of itself, each with what it shows in words."""
    found = []
    for name, (title, words) in PLATES.items():
        if picture := embed(run.folder / f"{name}.png", notes):
            key, meaning = FIGURES.get(name, ("", ""))
            figure = last(run.stats, key)
            if figure is not None:
                words = f"{words} {meaning}"
            found.append({"title": title, "picture": picture, "words": words, "figure": figure})
    return found


def last(stats: Stats, key: str) -> float | None:
    """The last finite value that was logged."""
    logged = [row[key] for row in stats.values.values() if math.isfinite(row.get(key, math.nan))]
    return shown(logged[-1]) if logged else None


def summary_section(run: Run) -> Json:
    """State of the run, and the few figures at the top of the page."""
    tiles = [("images seen", f"{run.stats.images:,}", "")]
    if run.stats.seconds:
        tiles.append(("trained for", duration(run.stats.seconds), ""))
    figures = [
        (label, number_words(value * (100 if unit.startswith("%") else 1)), unit)
        for key, label, unit in TILES
        if (value := (last if key == "memory/gib" else recent)(run.stats, key)) is not None
    ]
    tiles += figures
    chosen = run.part("resolved")
    tiles += [(key, choice(chosen[key])[0], "") for key in ("device", "precision") if key in chosen]
    return {
        "finished": run.stats.finished,
        "tiles": tiles,
        "words": MEDIANS if figures else "",
    }


def recent(stats: Stats, key: str) -> float | None:
    """Median of a value over the last 20 log lines."""
    rows = list(stats.values.values())[-20:]
    values = sorted(row[key] for row in rows if math.isfinite(row.get(key, math.nan)))
    return values[len(values) // 2] if values else None


def number_words(value: float) -> str:
    """A figure of a tile: three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def events_section(run: Run, notes: list[str]) -> list[Json]:
    """What happened on the way: events in order, values that were not finite, unreadable files."""
    events = [
        {"kind": str(event["event"]), "images": event["images"], "text": str(event.get("text", ""))}
        for event in run.stats.events
    ]
    broken: dict[str, list[int]] = {}
    for images, row in run.stats.values.items():
        for key, value in row.items():
            if not math.isfinite(value):
                broken.setdefault(key, []).append(images)
    for key, where in broken.items():
        count = f"{len(where):,} of {len(run.stats.values):,} log lines"
        text = f"{key} was not finite in {count}, first here"
        events.append({"kind": "nan", "images": where[0], "text": text})
    events += [
        {"kind": "note", "images": images, "text": text}
        for images, text in protocol_changes(run.evaluations)
    ]
    return events + [{"kind": "note", "images": None, "text": text} for text in notes]


def settings_section(run: Run) -> list[tuple[str, str]]:
    """The recipe's values as dotted names with their values in words."""
    return [(name, text) for name, text in flatten(run.part("values")) if name]


def flatten(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names with their values in words."""
    if isinstance(value, dict) and value:
        pairs = ((f"{name}.{key}" if name else str(key), inner) for key, inner in value.items())
        return [row for key, inner in pairs for row in flatten(inner, key)]
    return [(name, value if isinstance(value, str) else json.dumps(value))]


def origin_section(run: Run) -> list[Json]:
    """What was chosen and why, and where the run comes from: rows of name, value, reason."""
    chosen = [[key, *choice(value)] for key, value in run.part("resolved").items()]
    provenance = dict(run.part("provenance"))
    versions = provenance.pop("versions", {})
    provenance.pop("command", None)  # it has its own section
    made = [[key, *choice(value)] for key, value in provenance.items()]
    if run.recipe.get("digest"):
        made.append(["recipe digest", str(run.recipe["digest"]), ""])
    rows = [[name, text, ""] for name, text in flatten(versions) if name]
    tables = {"Chosen": chosen, "Provenance": made, "Versions": rows}
    return [{"title": title, "rows": rows} for title, rows in tables.items() if rows]


def choice(value: Any) -> tuple[str, str]:
    """A resolved setting as (value, reason), from a plain value, a pair or an object."""
    if isinstance(value, dict) and "value" in value:
        return choice(value["value"])[0], str(value.get("reason") or value.get("why") or "")
    if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str):
        return choice(value[0])[0], value[1]
    if value is None:
        return "", ""
    return value if isinstance(value, str) else json.dumps(value), ""


def commands_section(run: Run) -> list[Json]:
    """What to type to go on with the run, to use it, and to rebuild this page."""
    command = run.part("provenance").get("command")
    command = shlex.join(map(str, command)) if isinstance(command, list) else command
    where = shlex.quote(str(run.folder))
    rows = [("resume, from the last checkpoint", str(command))] if command else []
    uses = {k: str(c).replace("RUN_DIR", where) for k, c in run.part("uses").items()}
    rows += uses.items()
    if run.best:
        rows += [
            (f"{k}, by the best checkpoint", f"{c} --checkpoint best") for k, c in uses.items()
        ]
    rows.append(("rebuild this page", f"python -m engine.report {where}"))
    compare = f"python -m engine.report {where} OTHER_RUN_DIR --out comparison.html"
    rows.append(("compare with another run", compare))
    return [{"label": label, "command": text} for label, text in rows]


def duration(seconds: float) -> str:
    """Seconds in the two units that matter."""
    minutes, hours = round(seconds / 60), round(seconds / 3600, 1)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{hours:,} h"
