"""The report: right numbers, whole at any moment of a run, self-contained, cheap."""

import json
import math
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import pictures, report

RECIPE = {
    "recipe": "dcgan_digits",
    "values": {"seed": 1, "note": "</script><script>alert(1)</script><!--", "data": {"batch": 64}},
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


def series(data: Any) -> dict[str, tuple[list[int], list[float | None]]]:
    every = [one for chart in data["curves"]["charts"] for one in chart["series"]]
    return {one["key"]: (one["x"], one["y"]) for one in every}


def test_the_page_loads_nothing_and_holds_its_pictures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [tick(64, generator__loss=1.0)], frames=2)
    pictures.save(pictures.grid(torch.zeros(4, 1, 8, 8)), run / "reals.png")
    report.write(run)
    page = Page(run / "report.html")
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "a"), tag
        assert not {"src", "href", "srcset", "action"} & set(attributes), (tag, attributes)
    template = report.TEMPLATE.read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(|import\(|fetch\(|XMLHttp", template)
    assert "default-src 'none'" in template
    samples = page.data()["samples"]
    assert [frame["images"] for frame in samples["frames"]] == [0, 6400]
    for picture in [samples["reals"], *(frame["picture"] for frame in samples["frames"])]:
        assert re.match(r"data:image/(png|jpeg);base64,", picture)


def test_settings_cannot_leave_the_script_element(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])
    RISKY = {**RECIPE, "recipe": "</title><script>alert(2)</script>"}
    (run / "recipe.json").write_text(json.dumps(RISKY))
    report.write(run)
    page = Page(run / "report.html")
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert "<!--" not in page.scripts[0]
    assert ["note", RECIPE["values"]["note"]] in page.data()["settings"]
    assert page.data()["title"] == RISKY["recipe"]


def test_sections_of_a_run(tmp_path: Path) -> None:
    lines = [
        {"images": 0, "event": "start", "text": "seed 1"},
        tick(
            6400,
            generator__loss=0.7,
            discriminator__real=0.6,
            discriminator__fake=0.3,
            time__data_share=0.02,
            speed__images_per_s=1234.5,
            data__skipped=0,
            monitor__spread=1.0,
        ),
        tick(12800, generator__loss=0.8, data__skipped=0, monitor__spread=2.0),
        {"images": 12800, "event": "warning", "text": "the discriminator wins"},
        {"images": 12800, "event": "finish", "text": "done"},
    ]
    data = report.payload(make_run(tmp_path / "run", lines))
    titles = [chart["title"] for chart in data["curves"]["charts"]]
    assert titles == ["Losses", "Discriminator outputs", "Throughput", "Time shares", "Monitor"]
    curves = series(data)
    assert curves["generator/loss"] == ([6400, 12800], [0.7, 0.8])
    assert curves["time/data_share"] == ([6400], [2.0])  # in per cent
    outputs = data["curves"]["charts"][1]["series"]
    assert [one["label"] for one in outputs] == ["D(x)", "D(G(z))"]
    assert data["curves"]["constants"] == [{"key": "data/skipped", "value": 0.0}]
    assert [event["kind"] for event in data["events"]] == ["start", "warning", "finish"]
    assert data["summary"]["finished"]
    assert ("images seen", "12,800", "") in data["summary"]["tiles"]
    assert ("trained for", "13 s", "") in data["summary"]["tiles"]
    assert ("throughput", "1,234", "images/s") in data["summary"]["tiles"]
    assert ("data.batch", "64") in data["settings"]
    origin = {table["title"]: table["rows"] for table in data["origin"]}
    assert ["precision", "bf16", "the CPU has it"] in origin["Chosen"]
    assert ["compile", "off", "no g++"] in origin["Chosen"]
    assert ["torch", "2.15.0", ""] in origin["Versions"]
    commands = [row["command"] for row in data["commands"]]
    assert commands[:2] == [
        RECIPE["provenance"]["command"],
        f"python -m engine.sample {tmp_path / 'run'}",
    ]


def test_values_that_are_not_finite_are_gaps_with_a_warning(tmp_path: Path) -> None:
    lines = [
        tick(64, generator__loss=1.0),
        tick(128, generator__loss=None),
        tick(192, generator__loss="NaN"),
        '{"images": 256, "values": {"generator/loss": NaN}}\n',
        tick(320, generator__loss="Infinity"),
        tick(384, generator__loss=2.0),
    ]
    data = report.payload(make_run(tmp_path / "run", lines))
    assert series(data)["generator/loss"][1] == [1.0, None, None, None, None, 2.0]
    (event,) = data["events"]
    assert (event["kind"], event["images"]) == ("nan", 128)
    assert "4 of 6 log lines" in event["text"]


def test_a_resumed_run_shows_only_what_its_weights_have_seen(tmp_path: Path) -> None:
    lines = [
        tick(1000, a__loss=1.0),
        tick(2000, a__loss=2.0),
        tick(2500, a__loss=9.0),
        {"images": 2000, "event": "resume", "text": "from checkpoints/2000"},
        {**tick(3000, a__loss=3.0), "seconds": 1.0},  # the new process counts from zero
        tick(2000, a__fid=7.0),  # a metric that arrives late undoes nothing
    ]
    data = report.payload(make_run(tmp_path / "run", lines))
    assert series(data)["a/loss"] == ([1000, 2000, 3000], [1.0, 2.0, 3.0])
    assert ("trained for", "4 s", "") in data["summary"]["tiles"]
    assert not data["summary"]["finished"]


@pytest.mark.parametrize("lines", [[], ['{"images": 64, "val'], ["\n", "3\n", "[]\n", "{}\n"]])
def test_any_moment_of_a_run_gives_a_page(tmp_path: Path, lines: list[str]) -> None:
    run = make_run(tmp_path / "run", lines)
    report.write(run)
    notes = [event["text"] for event in Page(run / "report.html").data()["events"]]
    assert len(notes) == (1 if len(lines) > 1 else 0)  # a last line being written is no news
    (run / "stats.jsonl").unlink()
    (run / "recipe.json").write_text('{"recipe":')
    report.write(run)
    (run / "recipe.json").write_text('{"values": null, "resolved": [], "provenance": {}}')
    report.write(run)
    assert Page(run / "report.html").data()["title"] == "run"


def test_an_unreadable_picture_is_named_and_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [], frames=2)
    torn = run / "samples/000006400.png"
    torn.write_bytes(torn.read_bytes()[:5000])
    (run / "samples/000012800.png").write_bytes(b"")
    data = report.payload(run)
    assert [frame["images"] for frame in data["samples"]["frames"]] == [0]
    names = [re.search(r"\d{9}\.png", event["text"]).group() for event in data["events"]]
    assert names == ["000006400.png", "000012800.png"]


def test_a_long_curve_keeps_its_peaks_and_gaps() -> None:
    points = [(64 * place, math.sin(place)) for place in range(10_000)]
    points[5001] = (64 * 5001, 50.0)
    points[7001] = (64 * 7001, math.nan)
    short = report._decimate(points)
    assert len(short) <= report.MAX_POINTS + 3
    assert points[5001] in short
    assert points[7001][0] in [x for x, _ in short]
    assert (short[0], short[-1]) == (points[0], points[-1])
    assert short == sorted(short, key=lambda point: point[0])


@pytest.mark.parametrize("count", [0, 1, 2, 31, 32, 33, 100, 1000])
def test_the_film_has_the_first_and_the_last_frame(count: int) -> None:
    paths = [Path(f"{place:09d}.png") for place in range(count)]
    chosen = report._spread(paths)
    assert len(chosen) <= report.MAX_FRAMES
    assert len(chosen) >= min(count, report.MAX_FRAMES // 2)
    assert chosen[:1] == paths[:1]
    assert chosen[-1:] == paths[-1:]


def test_a_page_is_cheap_to_write(tmp_path: Path) -> None:
    values = {f"player_{number}__loss": 1 / 3 for number in range(12)}
    lines = [tick(64 * n, **values) for n in range(2000)]
    run = make_run(tmp_path / "run", lines, frames=24, size=32)
    took = []
    for _ in range(4):
        start = time.process_time()
        report.write(run)
        took.append(time.process_time() - start)
    assert took[0] < 1.0  # every picture encoded: 0.2 s where this was written
    assert min(took[1:]) < 0.3  # the pictures known: 0.08 s


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", [tick(64, generator__loss=1.0)])
    command = [sys.executable, "-m", "engine.report", run]
    good = subprocess.run(command, capture_output=True, text=True, check=True)
    assert good.stdout == f"{run / 'report.html'}\n"
    assert (run / "report.html").exists()
    assert report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path} is no run directory: it has no recipe.json\n"
