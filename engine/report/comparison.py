"""What does the page of several runs show? Curves overlaid, samples and figures side by side."""

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from engine.report.curves import (
    GROUPS,
    Points,
    chart,
    curve,
    figure_name,
    group_of,
    label_of,
    place,
    series_of,
)
from engine.report.embed import embed, sample_paths
from engine.report.quality import (
    by_protocol,
    differences,
    evaluated_section,
    names,
    protocol_words,
    row,
)
from engine.report.read import Evaluation, Json, Run, read_run
from engine.report.sections import choice, duration, last, number_words, recent, settings_section

Series = tuple[int, Points]  # which run, and its points
Measured = tuple[int, Json, list[Evaluation]]  # which run, its last protocol and evaluations by it


def payload(run_dirs: list[Path]) -> Json:
    """Everything the comparison shows, one key per section."""
    runs = [read_run(folder) for folder in run_dirs]
    measured = [
        (place, *by_protocol(run.evaluations)[-1])
        for place, run in enumerate(runs)
        if run.evaluations
    ]
    groups = same_protocol(measured)
    notes: list[str] = [
        f"{name}: {text}"
        for name, run in zip(run_names(runs), runs, strict=True)
        for text in run.notes
    ]
    return {
        "kind": "comparison",
        "title": f"Comparison of {len(runs)} runs" if len(runs) > 1 else "Comparison of one run",
        "written": round(time.time()),
        "names": run_names(runs),
        "overview": overview_section(runs),
        "lasts": last_samples(runs, notes),
        "evaluated": evaluated_section(runs),
        "figures": figures_section(groups),
        "overlays": overlays_section(runs, groups),
        "differing": differing_section(runs),
        "events": [{"kind": "note", "images": None, "text": text} for text in notes],
    }


def run_names(runs: list[Run]) -> list[str]:
    """recipe/run; of runs that share it, with so many folders in front as tell them apart."""
    folders = [run.folder.resolve() for run in runs]
    named = [f"{run.name}/{folder.name}" for run, folder in zip(runs, folders, strict=True)]
    for depth in range(2, 20):
        counts = Counter(named)
        if counts.total() == len(counts):
            return named
        longer = [str(Path(*folder.parts[-depth:])) for folder in folders]
        named = [
            long if counts[name] > 1 else name for name, long in zip(named, longer, strict=True)
        ]
    return [f"{name} ({place})" for place, name in enumerate(named, 1)]  # one run, named twice


def overview_section(runs: list[Run]) -> list[list[str]]:
    """A row per run: state, images, time, throughput, memory, device, versions."""
    rows = []
    for run in runs:
        speed, memory = recent(run.stats, "speed/images_per_s"), last(run.stats, "memory/gib")
        torch = run.part("provenance").get("versions")
        rows.append(
            [
                "finished" if run.stats.finished else "not finished",
                f"{run.stats.images:,}",
                duration(run.stats.seconds),
                "" if speed is None else number_words(speed),
                "" if memory is None else number_words(memory),
                choice(run.part("resolved").get("device"))[0],
                str(torch.get("torch", "")) if isinstance(torch, dict) else "",
            ]
        )
    return rows


def last_samples(runs: list[Run], notes: list[str]) -> list[Json | None]:
    """The newest sample grid of each run."""
    lasts = []
    for run in runs:
        newest = sample_paths(run.folder)[-1:]
        picture = embed(newest[0], notes) if newest else None
        lasts.append({"images": int(newest[0].stem), "picture": picture} if picture else None)
    return lasts


def same_protocol(measured: list[Measured]) -> list[list[Measured]]:
    """Runs that were measured alike, together."""
    groups: list[list[Measured]] = []
    for one in measured:
        alike = [group for group in groups if one[1] and group[0][1] == one[1]]
        if alike:
            alike[0].append(one)
        else:  # no stated protocol is like no other
            groups.append([one])
    return groups


def figures_section(groups: list[list[Measured]]) -> Json:
    """A table per protocol, and in what the protocols differ: those do not go side by side."""
    tables = []
    for group in groups:
        wanted = dict.fromkeys(name for _, _, evaluations in group for name in names(evaluations))
        rows = [figure_row(name, group) for name in wanted]
        runs = [place for place, _, _ in group]
        words = protocol_words(group[0][1], list(wanted))
        tables.append({"runs": runs, "words": words, "rows": rows})
    differ = differences([group[0][1] for group in groups])
    return {"tables": tables, "differ": [[key, *values] for key, values in differ.items()]}


def figure_row(name: str, group: list[Measured]) -> Json:
    """One figure of the runs of a group."""
    cells = [
        row(name, evaluations) if any(name in e.figures for e in evaluations) else None
        for _, _, evaluations in group
    ]
    better = next(cell["better"] for cell in cells if cell)
    return {"name": figure_name(name), "better": better, "cells": cells}


def overlays_section(runs: list[Run], groups: list[list[Measured]]) -> list[Json]:
    """One chart per quantity with a curve per run; metrics one chart per quantity and protocol."""
    wanted: dict[str, list[Series]] = {}
    for at, run in enumerate(runs):
        for key, points in series_of(run.stats).items():
            if not key.startswith("metric/"):
                wanted.setdefault(key, []).append((at, points))
    kinds = Counter(group_of(key).title for key in wanted)
    charts = []
    for number, group in enumerate(groups, 1):  # all of one protocol before the next
        suffix = f" (protocol {number})" if len(groups) > 1 else ""
        metrics = [overlay(key, series, False, suffix) for key, series in metric_series(group)]
        charts += in_order(metrics)
    others = [
        overlay(key, series, alone=kinds[group_of(key).title] == 1)
        for key, series in wanted.items()
        if not constant(key, series)
    ]
    return charts + in_order(others)


def in_order(charts: list[Json]) -> list[Json]:
    """Charts as the page of a run orders them."""
    return sorted(charts, key=lambda one: one["order"])


def metric_series(group: list[Measured]) -> Iterable[tuple[str, list[Series]]]:
    """The curves of every figure of runs that were measured alike."""
    for name in dict.fromkeys(n for _, _, evaluations in group for n in names(evaluations)):
        series = []
        for at, _, evaluations in group:
            points = [(e.images, e.figures[name]) for e in evaluations if name in e.figures]
            if points:
                series.append((at, points))
        yield f"metric/{name}", series


def constant(key: str, series: list[Series]) -> bool:
    """Whether a value without a chart of its own name never changes in any run."""
    return group_of(key) not in GROUPS and len({y for _, points in series for _, y in points}) == 1


def overlay(key: str, series: list[Series], alone: bool, suffix: str = "") -> Json:
    """The chart of one quantity; alone: of its group there is no other."""
    group = group_of(key)
    title = label_of(key, group)
    if not key.startswith("metric/"):
        title = group.title if alone else f"{group.title}: {title}"
    curves = [{"key": key, "run": at} | curve(points, group) for at, points in series]
    return chart(group) | {
        "title": title + suffix,
        "order": place(group.title),
        "series": curves,
    }


def differing_section(runs: list[Run]) -> Json:
    """Settings that are not the same in all runs: rows of name and each run's value."""
    settings = [dict(settings_section(run)) for run in runs]
    every = dict.fromkeys(name for values in settings for name in values)
    rows = [[name, *(values.get(name, "") for values in settings)] for name in every]
    kept = [row for row in rows if len({*row[1:]}) > 1]
    return {"rows": kept, "same": len(rows) - len(kept)}
