"""Which figures were measured of the very weights that are exported? Those of `engine.evaluate`
(evaluation.json), and the last ones of training (metrics.jsonl) at that checkpoint."""

import json
from pathlib import Path
from typing import Any

from engine.metrics.protocol import held_out_words
from engine.report.read import read_evaluated
from engine.trained import Trained

Json = dict[str, Any]


def measurements(trained: Trained, run_dir: Path) -> list[Json]:
    """{"figures": {name: value}, "protocol": {key: value}} of these weights, one per protocol,
    those of the protocol that training has logged first, then the newest.

    Figures of the moving average say nothing of the weights as trained, nor the other way round.
    """
    evaluated, _ = read_evaluated(run_dir)
    logged = _logged(run_dir / "metrics.jsonl")
    during = [line for line in logged if line.get("images") == trained.images]
    measured = [found for found in evaluated if found.get("checkpoint") == trained.checkpoint]
    by_protocol: dict[str, Json] = {}
    for found in (*reversed(measured), *reversed(during)):
        ema = found.get("protocol", {}).get("ema", trained.averaged)
        if ema == trained.averaged and found.get("figures"):
            by_protocol.setdefault(_key(found), found)
    usual = _key(logged[-1]) if logged else ""
    return sorted(by_protocol.values(), key=lambda found: _key(found) != usual)


def _key(found: Json) -> str:
    """The protocol but for the weights, of which a card has one kind only."""
    protocol = {k: v for k, v in found.get("protocol", {}).items() if k != "ema"}
    return json.dumps(protocol, sort_keys=True)


def table(found: Json) -> str:
    """The figures, and what they were measured with, as Markdown."""
    rows = [
        f"| {name} | {'not a number' if value is None else format(value, '.5g')} |"
        for name, value in found["figures"].items()
    ]
    protocol = [f"- {key}: {value}" for key, value in found.get("protocol", {}).items()]
    lines = ["| figure | value |", "| --- | --- |", *rows, ""]
    lines += ["Protocol, without which the figures mean little:", "", *protocol]
    if words := held_out_words(found["figures"]):
        lines.append(f"- {words}")
    lines.append("")
    return "\n".join(lines)


def _logged(path: Path) -> list[Json]:
    """The JSON objects of a file, one per line; what is torn is left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [x for x in found if isinstance(x, dict) and isinstance(x.get("protocol", {}), dict)]
