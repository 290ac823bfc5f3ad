"""What does a run look like? One self-contained page, report.html, rebuilt while it trains.

`write(run_dir)` reads recipe.json, stats.jsonl, samples/*.png and reals.png and may be called at
any moment of a run; `python -m engine.report RUN_DIR` does the same by hand. The page is
report.html beside this file with one JSON object put into it: each `_section` below makes one key
of that object, and one JavaScript function of the same name draws it.
"""

import argparse
import base64
import functools
import html
import io
import json
import math
import shlex
import sys
import time
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from engine.pictures import write_whole

TEMPLATE = Path(__file__).with_name("report.html")
MAX_FRAMES = 32
"""Sample grids in a page, so that it stays small enough to send by mail."""
MAX_POINTS = 1500
"""Points of a curve: about the pixels of a wide chart."""
MAX_WIDTH = 1024
"""Pixels of an embedded picture; wider ones are reduced."""
SMALL_PNG = 24_000
"""Bytes below which a PNG goes in as it is, without loss."""
BACKWARDS = ("start", "resume", "rollback")
"""Events after which the run goes on from their number of images; what came later is undone."""
LABELS = {"discriminator/real": "D(x)", "discriminator/fake": "D(G(z))"}

TILES = (
    ("speed/images_per_s", "throughput", "images/s"),
    ("time/data_share", "waiting for data", "%"),
    ("memory/gib", "device memory", "GiB"),
)
"""Figures at the top of the page, medians of the last 20 log lines: key, label, unit."""

Json = dict[str, Any]


@dataclass
class Stats:
    """stats.jsonl as read: values by images seen, events in order, and what was odd about it."""

    values: dict[int, dict[str, float]] = field(default_factory=dict)
    events: list[Json] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def write(run_dir: Path) -> None:
    """Rebuild run_dir/report.html; a reader sees the old page or the new one, never half."""
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("@DATA@")
    data = payload(run_dir)
    head = head.replace("@TITLE@", html.escape(data["title"]))
    page = head + _script_safe(data) + tail
    write_whole(run_dir / "report.html", page.encode("utf-8"))


def payload(run_dir: Path) -> Json:
    """Everything the page shows, one key per section."""
    recipe, note = _read_recipe(run_dir / "recipe.json")
    stats = _read_stats(run_dir / "stats.jsonl")
    samples, lost = _samples_section(run_dir)
    events = _events_section(stats, [*note, *lost])
    title = str(recipe.get("recipe") or run_dir.resolve().name)
    return {
        "title": title,
        "run": run_dir.resolve().name,
        "written": round(time.time()),
        "summary": _summary_section(recipe, stats),
        "events": events,
        "samples": samples,
        "curves": _curves_section(stats),
        "settings": _settings_section(recipe),
        "origin": _origin_section(recipe),
        "commands": _commands_section(recipe, run_dir),
    }


def _script_safe(data: Json) -> str:
    """JSON that cannot end the script element it stands in, nor open a comment there."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _read_recipe(path: Path) -> tuple[Json, list[str]]:
    """recipe.json, and a note where it cannot be read."""
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {}, [f"recipe.json could not be read: {error}"]
    if not isinstance(recipe, dict):
        return {}, ["recipe.json holds no object"]
    return recipe, []


def _read_stats(path: Path) -> Stats:
    """stats.jsonl without its torn lines and without what a resume or rollback has undone."""
    stats, torn, last = Stats(), 0, 0.0
    content = path.read_bytes() if path.exists() else b""
    for raw in content.splitlines():
        try:
            line = json.loads(raw)
            images = int(line["images"])
        except (ValueError, TypeError, KeyError, OverflowError):
            torn += 1
            continue
        if "event" in line:
            stats.events.append(line | {"images": images})
            if line["event"] in BACKWARDS:
                stats.values = {at: row for at, row in stats.values.items() if at <= images}
        seconds = _number(line.get("seconds"))
        if math.isfinite(seconds):  # a process that counts from zero again adds to the sum
            stats.seconds += seconds - last if seconds >= last else seconds
            last = seconds
        if isinstance(line.get("values"), dict):
            numbers = {key: _number(value) for key, value in line["values"].items()}
            stats.values.setdefault(images, {}).update(numbers)
    being_written = not content.endswith(b"\n")
    if torn > being_written:
        stats.notes.append(f"{torn} lines of stats.jsonl could not be read and are left out")
    stats.values = dict(sorted(stats.values.items()))
    return stats


def _number(value: Any) -> float:
    """A logged value as a float; null, "NaN", "Infinity" and anything else unreadable is NaN."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _summary_section(recipe: Json, stats: Stats) -> Json:
    """State of the run, and the few figures at the top of the page."""
    kinds = [event["event"] for event in stats.events if event["event"] in (*BACKWARDS, "finish")]
    images = max([*stats.values, *(event["images"] for event in stats.events)], default=0)
    tiles = [("images seen", f"{images:,}", "")]
    if stats.seconds:
        tiles.append(("trained for", _duration(stats.seconds), ""))
    for key, label, unit in TILES:
        recent = [row[key] for row in list(stats.values.values())[-20:] if key in row]
        recent = sorted(value for value in recent if math.isfinite(value))
        if recent:
            value = recent[len(recent) // 2] * (100 if unit == "%" else 1)
            tiles.append((label, f"{value:,.0f}" if value >= 100 else f"{value:.3g}", unit))
    chosen = _object(recipe, "resolved")
    tiles += [
        (key, _choice(chosen[key])[0], "") for key in ("device", "precision") if key in chosen
    ]
    return {"finished": kinds[-1:] == ["finish"], "tiles": tiles}


def _events_section(stats: Stats, notes: list[str]) -> list[Json]:
    """What happened on the way: events in order, values that were not finite, unreadable files."""
    events = [
        {"kind": str(event["event"]), "images": event["images"], "text": str(event.get("text", ""))}
        for event in stats.events
    ]
    broken: dict[str, list[int]] = {}
    for images, row in stats.values.items():
        for key, value in row.items():
            if not math.isfinite(value):
                broken.setdefault(key, []).append(images)
    for key, where in broken.items():
        text = f"{key} was not finite in {len(where):,} of {len(stats.values):,} log lines"
        events.append({"kind": "nan", "images": where[0], "text": f"{text}, first here"})
    return events + [{"kind": "note", "images": None, "text": text} for text in stats.notes + notes]


class Group(NamedTuple):
    """A chart, and the beginning and end of the keys that belong to it."""

    title: str
    unit: str
    smooth: bool
    prefix: str
    suffix: str


GROUPS = (
    Group("Losses", "", True, "", "/loss"),
    Group("Discriminator outputs", "sigmoid", True, "discriminator/real", ""),
    Group("Discriminator outputs", "sigmoid", True, "discriminator/fake", ""),
    Group("Gradient norms", "L2", True, "", "/grad_norm"),
    Group("Learning rates", "", False, "", "/lr"),
    Group("Throughput", "images/s", False, "speed/", ""),
    Group("Time shares", "%", True, "time/", "_share"),
    Group("Memory", "GiB", False, "memory/", ""),
)
"""Charts in the order of the page; the first that fits takes a key, others go by their prefix."""


def _curves_section(stats: Stats) -> Json:
    """Charts by group, each with its series; other values that never change are put in words."""
    series: dict[str, list[tuple[int, float]]] = {}
    for images, row in stats.values.items():
        for key, value in row.items():
            series.setdefault(key, []).append((images, value))
    charts: dict[str, Json] = {}
    constants = []
    for key, points in series.items():
        group = _group(key)
        if group not in GROUPS and len({value for _, value in points}) == 1:
            constants.append({"key": key, "value": _shown(points[0][1])})
            continue
        label = LABELS.get(key) or key.removeprefix(group.prefix).removesuffix(group.suffix)
        label = label.replace("_", " ")
        scale = 100 if group.unit == "%" else 1
        points = _decimate(points)
        xs, ys = [x for x, _ in points], [_shown(scale * y) for _, y in points]
        chart = {"title": group.title, "unit": group.unit, "smooth": group.smooth, "series": []}
        charts.setdefault(group.title, chart)["series"].append(
            {"key": key, "label": label, "x": xs, "y": ys}
        )
    order = [group.title for group in GROUPS]
    ranked = sorted(charts.values(), key=lambda c: (*order, c["title"]).index(c["title"]))
    return {"charts": ranked, "constants": constants}


def _group(key: str) -> Group:
    """The chart of a logged key: a named one, else one for its prefix."""
    for group in GROUPS:
        if key.startswith(group.prefix) and key.endswith(group.suffix):
            return group
    prefix = key.partition("/")[0]
    return Group(prefix.capitalize(), "", True, f"{prefix}/", "")


def _decimate(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most about MAX_POINTS points that keep every peak: lowest and highest of each stretch."""
    if len(points) <= MAX_POINTS:
        return points
    stretch = math.ceil(len(points) / (MAX_POINTS // 2))
    kept = {points[0], points[-1]}
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        finite = [point for point in part if math.isfinite(point[1])]
        if finite:
            kept |= {min(finite, key=itemgetter(1)), max(finite, key=itemgetter(1))}
        if len(finite) < len(part):  # the gap stays visible
            kept.add(next(point for point in part if not math.isfinite(point[1])))
    return sorted(kept, key=itemgetter(0))


def _shown(value: float) -> float | None:
    """Five digits, which is what a chart can show; null where there is no finite value."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _samples_section(run_dir: Path) -> tuple[Json, list[str]]:
    """The film of sample grids, the reals, and a note for every picture that cannot be read."""
    found = sorted(path for path in run_dir.glob("samples/*.png") if path.stem.isdigit())
    frames, notes = [], []
    for path in _spread(found):
        try:
            frames.append({"images": int(path.stem), "picture": _embed(path)})
        except OSError as error:
            notes.append(f"samples/{path.name} could not be read: {error}")
    reals = None
    if (run_dir / "reals.png").exists():
        try:
            reals = _embed(run_dir / "reals.png")
        except OSError as error:
            notes.append(f"reals.png could not be read: {error}")
    return {"frames": frames, "found": len(found), "reals": reals}, notes


def _spread(paths: list[Path]) -> list[Path]:
    """At most MAX_FRAMES of them, evenly spaced, with the first and the last.

    The spacing is a power of two, so that a growing run keeps the frames that it has encoded.
    """
    spacing = 1
    while math.ceil(len(paths) / spacing) >= MAX_FRAMES:
        spacing *= 2
    chosen = paths[::spacing]
    return chosen if not paths or chosen[-1] == paths[-1] else [*chosen, paths[-1]]


def _embed(path: Path) -> str:
    """A picture file as a data address."""
    state = path.stat()
    return _encode(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=4 * MAX_FRAMES)
def _encode(path: Path, changed_ns: int, size: int) -> str:
    """Small PNG files as they are, others as JPEG; kept, since a page is rewritten many times.

    JPEG, because encoding a 528-pixel grid takes 6 ms, against 14 ms for WebP of similar quality.
    """
    content, kind = path.read_bytes(), "png"
    picture = Image.open(io.BytesIO(content))
    picture.load()  # a torn file must not get through
    if size > SMALL_PNG:
        picture.thumbnail((MAX_WIDTH, 4 * MAX_WIDTH))
        buffer, kind = io.BytesIO(), "jpeg"
        picture.convert("RGB").save(buffer, "JPEG", quality=87)
        content = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _settings_section(recipe: Json) -> list[tuple[str, str]]:
    """The recipe's values as dotted names with their values in words."""
    return [(name, text) for name, text in _flatten(_object(recipe, "values")) if name]


def _flatten(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names with their values in words."""
    if isinstance(value, dict) and value:
        pairs = ((f"{name}.{key}" if name else str(key), inner) for key, inner in value.items())
        return [row for key, inner in pairs for row in _flatten(inner, key)]
    return [(name, value if isinstance(value, str) else json.dumps(value))]


def _origin_section(recipe: Json) -> list[Json]:
    """What was chosen and why, and where the run comes from: rows of name, value, reason."""
    chosen = [[key, *_choice(value)] for key, value in _object(recipe, "resolved").items()]
    provenance = dict(_object(recipe, "provenance"))
    versions = provenance.pop("versions", {})
    provenance.pop("command", None)  # it has its own section
    made = [[key, *_choice(value)] for key, value in provenance.items()]
    if recipe.get("digest"):
        made.append(["recipe digest", str(recipe["digest"]), ""])
    rows = [[name, text, ""] for name, text in _flatten(versions) if name]
    tables = {"Chosen": chosen, "Provenance": made, "Versions": rows}
    return [{"title": title, "rows": rows} for title, rows in tables.items() if rows]


def _choice(value: Any) -> tuple[str, str]:
    """A resolved setting as (value, reason), from a plain value, a pair or an object."""
    if isinstance(value, dict) and "value" in value:
        return _choice(value["value"])[0], str(value.get("reason") or value.get("why") or "")
    if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str):
        return _choice(value[0])[0], value[1]
    if value is None:
        return "", ""
    return value if isinstance(value, str) else json.dumps(value), ""


def _commands_section(recipe: Json, run_dir: Path) -> list[Json]:
    """What to type to go on with the run, to sample from it, and to rebuild this page."""
    command = _object(recipe, "provenance").get("command")
    command = shlex.join(map(str, command)) if isinstance(command, list) else command
    where = shlex.quote(str(run_dir))
    rows = [("resume, from the last checkpoint", str(command))] if command else []
    rows.append(("sample", f"python -m engine.sample {where}"))
    rows.append(("rebuild this page", f"python -m engine.report {where}"))
    return [{"label": label, "command": text} for label, text in rows]


def _object(recipe: Json, key: str) -> Json:
    """A part of recipe.json, empty where it is missing."""
    part = recipe.get(key)
    return part if isinstance(part, dict) else {}


def _duration(seconds: float) -> str:
    """Seconds in the two units that matter."""
    minutes, hours = round(seconds / 60), round(seconds / 3600, 1)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{hours:,} h"


def main(arguments: list[str] | None = None) -> int:
    """Rebuild a report by hand."""
    parser = argparse.ArgumentParser(prog="python -m engine.report", description=write.__doc__)
    parser.add_argument("run_dir", type=Path)
    run_dir = parser.parse_args(arguments).run_dir
    if not (run_dir / "recipe.json").is_file():
        sys.stderr.write(f"{run_dir} is no run directory: it has no recipe.json\n")
        return 2
    write(run_dir)
    sys.stdout.write(f"{run_dir / 'report.html'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
