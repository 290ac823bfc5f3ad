"""Which figures were measured of the very weights that are exported? Those of `engine.evaluate`
(evaluation.json), else the last ones of training (metrics.jsonl) at that checkpoint."""

import json
from pathlib import Path
from typing import Any

from engine.trained import Trained

Json = dict[str, Any]


def measurement(trained: Trained, run_dir: Path) -> Json | None:
    """{"figures": {name: value}, "protocol": {key: value}} of these weights, or None.

    Figures of the moving average say nothing of the weights as trained, nor the other way round.
    """
    evaluated = [
        found
        for found in _objects(run_dir / "evaluation.json", whole=True)
        if found.get("checkpoint") == trained.checkpoint
    ]
    during = [
        found
        for found in _objects(run_dir / "metrics.jsonl")
        if found.get("images") == trained.images
    ]
    for found in (*evaluated, *reversed(during)):
        ema = found.get("protocol", {}).get("ema", trained.averaged)
        if ema == trained.averaged and found.get("figures"):
            return found
    return None


def table(found: Json) -> str:
    """The figures, and what they were measured with, as Markdown."""
    rows = [
        f"| {name} | {'not a number' if value is None else format(value, '.5g')} |"
        for name, value in found["figures"].items()
    ]
    protocol = [f"- {key}: {value}" for key, value in found.get("protocol", {}).items()]
    lines = ["| figure | value |", "| --- | --- |", *rows, ""]
    lines += ["Protocol, without which the figures mean little:", "", *protocol, ""]
    return "\n".join(lines)


def _objects(path: Path, whole: bool = False) -> list[Json]:
    """The JSON objects of a file, one per line or a single one; what is torn is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    found = []
    for part in [text] if whole else text.splitlines():
        try:
            found.append(json.loads(part))
        except ValueError:
            continue
    return [x for x in found if isinstance(x, dict)]
