"""How good are the samples? Figures in tables, each with the protocol that measured it."""

import json
import math
from itertools import pairwise
from typing import Any

from engine.metrics.protocol import held_out_words
from engine.report.curves import HIGHER, LOWER, better, figure_name, metric_charts, shown
from engine.report.read import Evaluation, Json, Run

SAID = ("generated", "real", "split", "ema", "extractor", "extractor_digest")


def quality_section(run: Run) -> Json | None:
    """Tables of figures, the newest protocol first, their curves, and the best checkpoint."""
    tables = [
        {
            "words": protocol_words(protocol, names(evaluations)),
            "rows": [row(name, evaluations) for name in names(evaluations)],
            "span": [evaluations[0].images, evaluations[-1].images, len(evaluations)],
        }
        for protocol, evaluations in reversed(by_protocol(run.evaluations))
    ]
    charts = metric_charts(run.stats)
    if not (tables or charts or run.best):
        return None
    best = run.best and {
        **run.best,
        "metric": figure_name(run.best["metric"]),
        "value": shown(run.best["value"]),
    }
    return {"tables": tables, "charts": charts, "best": best or None}


def evaluated_section(runs: list[Run]) -> list[Json]:
    """What `engine.evaluate` measured: a table per protocol with a row per run and checkpoint; the
    protocols of the most runs first, then the newest."""
    groups: dict[str, list[tuple[int, Evaluation]]] = {}
    for place, run in enumerate(runs):
        for one in reversed(run.evaluated):
            key = json.dumps(one.protocol, sort_keys=True)
            groups.setdefault(key, []).append((place, one))
    tables = []
    for group in groups.values():
        group.sort(key=lambda row: (row[0], row[1].images))
        every = names([one for _, one in group])
        rows = [
            [place, one.images, one.checkpoint[:12], [_cell(one, name) for name in every]]
            for place, one in group
        ]
        heads = [[figure_name(name), better(name)] for name in every]
        words = protocol_words(group[0][1].protocol, every)
        tables.append({"heads": heads, "rows": rows, "words": words})
    return sorted(tables, key=lambda table: -len({row[0] for row in table["rows"]}))


def _cell(one: Evaluation, name: str) -> list[float | None]:
    """[value], [null] where it was not finite, [] where it was not measured."""
    return [shown(one.figures[name])] if name in one.figures else []


def by_protocol(evaluations: list[Evaluation]) -> list[tuple[Json, list[Evaluation]]]:
    """Evaluations of one protocol together, in the order in which the protocols were last used."""
    groups: dict[str, tuple[Json, list[Evaluation]]] = {}
    for evaluation in evaluations:
        key = repr(sorted(evaluation.protocol.items()))
        protocol, group = groups.pop(key, (evaluation.protocol, []))
        groups[key] = (protocol, [*group, evaluation])
    return list(groups.values())


def names(evaluations: list[Evaluation]) -> list[str]:
    """Every figure that was measured: the known ones in their order, then the others."""
    there = dict.fromkeys(name for evaluation in evaluations for name in evaluation.figures)
    known = [name for name in ("fid", "kid", *HIGHER, *LOWER) if name in there]
    return list(dict.fromkeys([*known, *there]))


def row(name: str, evaluations: list[Evaluation]) -> Json:
    """The latest and the best value of a figure, each with its number of images."""
    points = [(e.images, e.figures[name]) for e in evaluations if name in e.figures]
    finite = [point for point in points if math.isfinite(point[1])]
    best = None
    if finite and name in LOWER + HIGHER:
        choose = min if name in LOWER else max
        images, value = choose(finite, key=lambda point: point[1])
        best = {"images": images, "value": shown(value)}
    return {
        "name": figure_name(name),
        "better": better(name),
        "latest": {"images": points[-1][0], "value": shown(points[-1][1])},
        "best": best,
    }


def protocol_words(protocol: Json, figures: list[str]) -> str:
    """A protocol in words, with what it leaves unsaid of these figures."""
    if not protocol:
        return "measured with no stated protocol: compare it with nothing"
    parts = []
    if "generated" in protocol:
        parts.append(f"{_words(protocol['generated'])} generated images")
    if "real" in protocol:
        split = f" ({protocol['split']} split)" if "split" in protocol else ""
        parts.append(f"{_words(protocol['real'])} real images{split}")
    if "extractor" in protocol:
        digest = protocol.get("extractor_digest")
        weights = f" (weights {str(digest)[:12]})" if digest else ""
        parts.append(f"features of {protocol['extractor']}{weights}")
    if "ema" in protocol:
        parts.append("moving average of the weights" if protocol["ema"] else "weights as trained")
    left = [] if "real" in protocol else ["split"]
    rest = [key for key in protocol if key not in SAID or key in left]
    parts += [f"{key.replace('_', ' ')} {_words(protocol[key])}" for key in rest]
    apart = held_out_words(figures)
    return ", ".join(parts) + (f". Apart from these, {apart}" if apart else "")


def protocol_changes(evaluations: list[Evaluation]) -> list[tuple[int, str]]:
    """(images seen, text) of every change of protocol from one evaluation to the next."""
    changes = []
    for before, after in pairwise(evaluations):
        if differ := differences([before.protocol, after.protocol]):
            parts = [f"{key} from {values[0]} to {values[1]}" for key, values in differ.items()]
            text = f"the metrics' protocol changed ({'; '.join(parts)}): figures before and after"
            changes.append((after.images, f"{text} do not compare"))
    return changes


def differences(protocols: list[Json]) -> dict[str, list[str]]:
    """The parts in which protocols differ, with the value that each has in words."""
    keys = dict.fromkeys(key for protocol in protocols for key in protocol)
    values = {key: [_words(protocol.get(key)) for protocol in protocols] for key in keys}
    return {key.replace("_", " "): texts for key, texts in values.items() if len({*texts}) > 1}


def _words(value: Any) -> str:
    """A part of a protocol for people."""
    if value is None:
        return "not stated"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
