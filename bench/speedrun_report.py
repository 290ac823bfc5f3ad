"""How long did each loop take to a figure? The arithmetic, table, results and plot of a speedrun.

A curve is what one run measured: images seen, seconds until then without measuring, the figure (a
Frechet distance: lower is better). The time to a target is that of the first measurement at or
below it, so its resolution is the distance of two measurements.
"""

import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.whole import write_whole

LOOPS = ("tutorial", "ours")
AIM = 1 / 3
NOT = "not reached"


@dataclass(frozen=True)
class Point:
    """One measurement. figure: nan where it was not finite."""

    images: int
    seconds: float
    figure: float


@dataclass(frozen=True)
class Race:
    """Both loops with one seed: the figure to reach, and their curves by name."""

    seed: int
    target: float
    curves: dict[str, list[Point]]

    def arrival(self, loop: str) -> Point | None:
        """Where a loop reached the target; None where it never did."""
        return arrival(self.curves[loop], self.target)


def read_curve(path: Path) -> list[Point]:
    """The measurements in a metrics.jsonl; empty while there is none. A line that is still being
    written is left out."""
    if not path.exists():
        return []
    entries = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    return [
        Point(entry["images"], entry["since_start"], number(entry["figures"]["fid"]))
        for entry in entries
    ]


def number(value: float | None) -> float:
    """A figure as it was written; null stands for one that was not finite."""
    return math.nan if value is None else value


def best(curve: Sequence[Point]) -> float:
    """The lowest figure of a curve. Raises ValueError where none is finite."""
    finite = [point.figure for point in curve if math.isfinite(point.figure)]
    if not finite:
        raise ValueError("none of its figures is finite")
    return min(finite)


def arrival(curve: Sequence[Point], target: float) -> Point | None:
    """The first measurement at or below the target."""
    return next((point for point in curve if point.figure <= target), None)


def median_seconds(races: Sequence[Race], loop: str) -> float:
    """Median over seeds of the time to the target; one that was never reached took for ever."""
    arrivals = [race.arrival(loop) for race in races]
    return statistics.median(a.seconds if a else math.inf for a in arrivals)


def ratio(races: Sequence[Race]) -> float:
    """Our median time over the tutorial's; inf or nan where a median is not finite."""
    ours, tutorial = (median_seconds(races, loop) for loop in ("ours", "tutorial"))
    return ours / tutorial


def table(races: Sequence[Race]) -> str:
    """Each seed's target and times, the medians and their ratio."""
    lines = [f"{'seed':>6}  {'target':>8}  {'tutorial':>26}  {'ours':>26}  ratio"]
    for race in races:
        cells = [_cell(race.arrival(loop)) for loop in LOOPS]
        lines.append(
            f"{race.seed:>6}  {race.target:8.3f}  {cells[0]:>26}  {cells[1]:>26}  "
            f"{_share(ratio([race]))}"
        )
    medians = [_seconds(median_seconds(races, loop)) for loop in LOOPS]
    lines.append(f"median  {'':8}  {medians[0]:>26}  {medians[1]:>26}  {_share(ratio(races))}")
    for race in races:
        if race.arrival("ours") is None:
            end = race.curves["ours"][-1]
            lines.append(
                f"seed {race.seed}: ours came to {_lowest(race.curves['ours'])} in "
                f"{end.images:,} images, {end.seconds:,.1f} s"
            )
    return "\n".join(lines)


def _cell(point: Point | None) -> str:
    return f"{point.seconds:,.1f} s ({point.images:,})" if point else NOT


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if math.isfinite(seconds) else NOT


def _share(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else NOT


def _lowest(curve: Sequence[Point]) -> str:
    try:
        return f"{best(curve):.3f}"
    except ValueError:
        return "no finite figure"


def results(races: Sequence[Race]) -> dict[str, Any]:
    """The same for JSON, with all curves; null is a figure that was not finite, or not reached."""
    rows = []
    for race in races:
        row: dict[str, Any] = {"seed": race.seed, "target": race.target}
        for loop in LOOPS:
            found = race.arrival(loop)
            row[loop] = {
                "seconds": found.seconds if found else None,
                "images": found.images if found else None,
                "curve": [[p.images, p.seconds, _plain(p.figure)] for p in race.curves[loop]],
            }
        rows.append(row)
    medians = {loop: _plain(median_seconds(races, loop)) for loop in LOOPS}
    return {"seeds": rows, "median_seconds": medians, "ratio": _plain(ratio(races)), "aim": AIM}


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def plot(path: Path, title: str, ruler: str, races: Sequence[Race]) -> None:
    """Draw figure over seconds, with a ring where the target was reached; ruler: what the distance
    was measured by."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for loop, name, colour in (
        ("tutorial", "PyTorch tutorial", "tab:orange"),
        ("ours", "Saddle", "tab:blue"),
    ):
        for race in races:
            curve = race.curves[loop]
            x, y = [p.seconds for p in curve], [p.figure for p in curve]
            label = name if race is races[0] else None
            axes.plot(x, y, color=colour, marker=".", markersize=4, linewidth=1, label=label)
            if there := race.arrival(loop):
                ring = {"markersize": 9, "markerfacecolor": "none", "color": colour}
                axes.plot(there.seconds, there.figure, "o", **ring)
    for race in races:
        label = "target, per seed" if race is races[0] else None
        axes.axhline(race.target, color="grey", linewidth=0.8, linestyle="--", label=label)
    axes.set(yscale="log", xlabel="seconds from the command, without measuring")
    axes.set_ylabel(f"Frechet distance\n{ruler}")
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format=path.suffix.removeprefix(".") or "png")
    write_whole(path, picture.getvalue())
