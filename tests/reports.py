"""Run directories made by hand, and report pages as a browser reads them."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from engine import pictures

RECIPE = {
    "recipe": "dcgan_digits",
    "values": {"seed": 1, "note": "</script><script>alert(1)</script><!--", "data": {"batch": 64}},
    "uses": {"sample": "python -m engine.sample RUN_DIR"},
    "resolved": {
        "precision": {"value": "bf16", "reason": "the CPU has it"},
        "compile": ["off", "no g++"],
    },
    "digest": "9f1c",
    "provenance": {
        "versions": {"torch": "2.15.0"},
        "command": "python -m engine.train dcgan_digits --seed 1",
        "tracker": "https://example.org/run",
    },
}


class Page(HTMLParser):
    """The elements of a page as a browser sees them, and the text of its scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data

    def data(self) -> Any:
        return json.loads(self.scripts[0])


def make_run(run: Path, lines: list[Any], frames: int = 0, size: int = 8) -> Path:
    """A run directory with these lines in stats.jsonl (text as it is, the rest as JSON)."""
    (run / "samples").mkdir(parents=True)
    (run / "recipe.json").write_text(json.dumps(RECIPE))
    text = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    (run / "stats.jsonl").write_text("".join(text))
    for frame in range(frames):
        noise_NCHW = torch.rand(64, 3, size, size) * 2 - 1
        pictures.save(pictures.grid(noise_NCHW), run / f"samples/{frame * 6400:09d}.png")
    return run


def tick(images: int, **values: Any) -> dict[str, Any]:
    named = {key.replace("__", "/"): value for key, value in values.items()}
    return {"images": images, "step": images // 64, "seconds": images / 1000, "values": named}


PROTOCOL = {
    "extractor": "classifier",
    "extractor_digest": "ab12cd34ef56",
    "split": "test",
    "real": 10_000,
    "generated": 5_000,
    "ema": True,
    "seed": 0,
}


def measure(run: Path, figures: dict[int, dict[str, float | None]], **protocol: Any) -> None:
    """Write metrics.jsonl, and the same figures into stats.jsonl, as training does."""
    lines = [
        {"images": images, "figures": values, "protocol": PROTOCOL | protocol, "seconds": 4.2}
        for images, values in figures.items()
    ]
    with open(run / "metrics.jsonl", "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    with open(run / "stats.jsonl", "a") as file:
        for images, values in figures.items():
            named = {f"metric/{name}": value for name, value in values.items()}
            file.write(json.dumps({"images": images, "values": named}) + "\n")
