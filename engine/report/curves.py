"""Which chart does a logged value belong to, and which of its points are shown?"""

import math
from collections.abc import Iterable
from operator import itemgetter
from typing import NamedTuple

from engine.report.read import Json, Stats

MAX_POINTS = 1500
"""Points of a curve: about the pixels of a wide chart."""
NOTES = {
    "monitor/diversity": "Diversity: distance of samples from each other; near 0 they are all "
    "alike.",
    "monitor/neighbour_distance": "Neighbour distance: from samples to their nearest training "
    "images; far below 1 they are copies.",
}
"""What a curve means, under the chart that holds it."""
LABELS = {"discriminator/real": "D(x)", "discriminator/fake": "D(G(z))"}

Points = list[tuple[int, float]]


class Group(NamedTuple):
    """A chart, and the beginning and end of the keys that belong to it."""

    title: str
    unit: str
    smooth: bool
    prefix: str
    suffix: str


LOWER = (
    *("fid", "kid", "lpips", "nll", "bits_per_dim", "reconstruction"),
    *("kid_AtoB", "kid_BtoA", "cycle_A", "cycle_B", "content", "style", "code_bits", "word_bits"),
)
HIGHER = (
    *("inception_score", "precision", "recall", "density", "coverage", "psnr", "ssim", "elbo"),
    *("auroc", "auroc_pixels", "auroc_features", "accuracy", "nmi"),
    *("accuracy_real", "accuracy_augmented", "accuracy_samples", "taken_AtoB", "taken_BtoA"),
    "r_precision",
)


def better(name: str) -> str:
    """Which end of a metric is good, in words; empty where neither is, as of a VAE's KL."""
    return "lower is better" if name in LOWER else "higher is better" if name in HIGHER else ""


SHARES = "Precision and recall"
METRICS = (
    *(
        Group(title, better(name), False, f"metric/{name}", "")
        for title, name in (("FID", "fid"), ("KID", "kid"), ("Inception score", "inception_score"))
    ),
    *(
        Group(SHARES, better(name), False, f"metric/{name}", "")
        for name in ("precision", "recall", "density", "coverage")
    ),
)
"""Charts of metrics; every other metric has one of its own, since their scales differ."""

GROUPS = (
    Group("Losses", "", True, "", "/loss"),
    Group("Discriminator outputs", "sigmoid", True, "discriminator/real", ""),
    Group("Discriminator outputs", "sigmoid", True, "discriminator/fake", ""),
    Group("Gradient norms", "L2", True, "", "/grad_norm"),
    Group("Learning rates", "", False, "", "/lr"),
    Group("Collapse and memorisation", "1 = like real images", False, "monitor/", ""),
    Group("Held-out images", "mean per image", False, "test/", ""),
    Group("Throughput", "images/s", False, "speed/", ""),
    Group("Time shares", "%", True, "time/", "_share"),
    Group("Memory", "GiB", False, "memory/", ""),
)
"""Charts in the order of the page; the first that fits takes a key, others go by their prefix."""


def curves_section(stats: Stats) -> Json:
    """Charts by group, each with its series; other values that never change are put in words."""
    series = {k: v for k, v in series_of(stats).items() if not k.startswith("metric/")}
    constants = [
        {"key": key, "value": shown(points[0][1])}
        for key, points in series.items()
        if group_of(key) not in GROUPS and len({value for _, value in points}) == 1
    ]
    still = {constant["key"] for constant in constants}
    charts = [(key, points) for key, points in series.items() if key not in still]
    return {"charts": charts_of(charts), "constants": constants}


def metric_charts(stats: Stats) -> list[Json]:
    """The charts of metrics."""
    every = series_of(stats).items()
    return charts_of((key, points) for key, points in every if key.startswith("metric/"))


def series_of(stats: Stats) -> dict[str, Points]:
    """(images seen, value) of every key."""
    series: dict[str, Points] = {}
    for images, row in stats.values.items():
        for key, value in row.items():
            series.setdefault(key, []).append((images, value))
    return series


def charts_of(series: Iterable[tuple[str, Points]]) -> list[Json]:
    """Charts in the order of the page, each with its series."""
    charts: dict[str, Json] = {}
    for key, points in series:
        group = group_of(key)
        one = charts.setdefault(group.title, chart(group))
        one["series"].append({"key": key, "label": label_of(key, group)} | curve(points, group))
        one["note"] = f"{one['note']} {NOTES.get(key, '')}".strip()
    return sorted(charts.values(), key=lambda chart: place(chart["title"]))


def place(title: str) -> int:
    """Where on the page a chart stands; unnamed ones come last, in the order in which they came."""
    order = [group.title for group in (*METRICS, *GROUPS)]
    return order.index(title) if title in order else len(order)


def chart(group: Group) -> Json:
    """A chart without series."""
    return {
        "title": group.title,
        "unit": group.unit,
        "smooth": group.smooth,
        "note": "",
        "series": [],
    }


def curve(points: Points, group: Group) -> Json:
    """The points of a curve as the page draws them."""
    scale = 100 if group.unit == "%" else 1
    points = decimate(points)
    return {"x": [x for x, _ in points], "y": [shown(scale * y) for _, y in points]}


def group_of(key: str) -> Group:
    """The chart of a logged key: a named one, else one for the metric or the prefix."""
    for group in (*METRICS, *GROUPS):
        if key.startswith(group.prefix) and key.endswith(group.suffix):
            return group
    prefix, _, name = key.partition("/")
    if prefix == "metric":
        return Group(figure_name(name), better(name), False, key, "")
    return Group(prefix.capitalize(), "", True, f"{prefix}/", "")


def label_of(key: str, group: Group) -> str:
    """What a curve is called in its chart."""
    if key.startswith("metric/"):
        return figure_name(key.removeprefix("metric/"))
    return LABELS.get(key) or key.removeprefix(group.prefix).removesuffix(group.suffix).replace(
        "_", " "
    )


def figure_name(name: str) -> str:
    """What people call a metric."""
    short = ("fid", "kid", "psnr", "ssim", "lpips", "elbo", "nll", "kl")
    return name.upper() if name in short else name.replace("_", " ").capitalize()


def decimate(points: Points) -> Points:
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


def shown(value: float) -> float | None:
    """Five digits, which is what a chart can show; null where there is no finite value."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
