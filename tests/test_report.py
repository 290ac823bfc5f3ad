"""The report: right numbers, whole at any moment of a run, self-contained, cheap."""

import base64
import io
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin

from engine import pictures, report
from engine.report import curves, embed
from engine.report.__main__ import main
from engine.report.page import template
from engine.report.sections import payload
from tests.reports import RECIPE, Page, make_run, tick


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
    empty = template()
    assert not re.search(r"https?:|//[a-z]|@import|url\(|import\(|fetch\(|XMLHttp", empty)
    assert "default-src 'none'" in empty
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
    data = payload(make_run(tmp_path / "run", lines))
    titles = [chart["title"] for chart in data["curves"]["charts"]]
    monitors = "Collapse and memorisation"
    assert titles == ["Losses", "Discriminator outputs", monitors, "Throughput", "Time shares"]
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
    assert "medians of the last 20" in data["summary"]["words"]
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
    data = payload(make_run(tmp_path / "run", lines))
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
    data = payload(make_run(tmp_path / "run", lines))
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
    data = payload(run)
    assert [frame["images"] for frame in data["samples"]["frames"]] == [0]
    names = [re.search(r"\d{9}\.png", event["text"]).group() for event in data["events"]]
    assert names == ["000006400.png", "000012800.png"]


def test_a_long_curve_keeps_its_peaks_and_gaps() -> None:
    points = [(64 * place, math.sin(place)) for place in range(10_000)]
    points[5001] = (64 * 5001, 50.0)
    points[7001] = (64 * 7001, math.nan)
    short = curves.decimate(points)
    assert len(short) <= curves.MAX_POINTS + 3
    assert points[5001] in short
    assert points[7001][0] in [x for x, _ in short]
    assert (short[0], short[-1]) == (points[0], points[-1])
    assert short == sorted(short, key=lambda point: point[0])


@pytest.mark.parametrize("count", [0, 1, 2, 31, 32, 33, 100, 1000])
def test_the_film_has_the_first_and_the_last_frame(count: int) -> None:
    paths = [Path(f"{place:09d}.png") for place in range(count)]
    chosen = embed.spread(paths)
    assert len(chosen) <= embed.MAX_FRAMES
    assert len(chosen) >= min(count, embed.MAX_FRAMES // 2)
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


def test_the_plates_have_their_words_and_figure(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [tick(64, monitor__neighbour_distance=0.81234567)])
    assert payload(run)["plates"] == []
    for name in ("neighbours", "interpolation", "reconstruction"):
        pictures.save(pictures.grid(torch.zeros(4, 1, 8, 8)), run / f"{name}.png")
    plates = payload(run)["plates"]
    titles = ["Neighbours in the training set", "Interpolation", "Reconstructions"]
    assert [plate["title"] for plate in plates] == titles
    assert [plate["figure"] for plate in plates] == [0.81235, None, None]
    (run / "interpolation.png").write_bytes(b"")
    data = payload(run)
    assert len(data["plates"]) == 2
    assert "interpolation.png could not be read" in data["events"][-1]["text"]


def test_a_mark_of_origin_goes_along_with_a_picture() -> None:
    mark = '<x:xmpmeta xmlns:x="adobe:ns:meta/"/>'
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("XML:com.adobe.xmp", mark)
    buffer = io.BytesIO()
    noise = Image.fromarray((torch.rand(128, 128, 3) * 255).byte().numpy())
    noise.save(buffer, "PNG", pnginfo=chunks)
    assert mark.encode() in base64.b64decode(embed.as_address(buffer.getvalue()).split(",")[1])


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", [tick(64, generator__loss=1.0)])
    command = [sys.executable, "-m", "engine.report", run]
    good = subprocess.run(command, capture_output=True, text=True, check=True)
    assert good.stdout == f"{run / 'report.html'}\n"
    assert (run / "report.html").exists()
    assert main([str(run), "--out", str(tmp_path / "elsewhere" / "page.html")]) == 0
    assert Page(tmp_path / "elsewhere" / "page.html").data()["kind"] == "run"
    capsys.readouterr()
    assert main([str(run), str(tmp_path)]) == 2
    text = f"error: {tmp_path} is not a run directory: it has no recipe.json\n"
    assert capsys.readouterr().err == text
    assert main([str(run), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: --out {tmp_path} is a folder: name a file in it\n"
    assert main([str(run), "--out", str(run / "recipe.json" / "page.html")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run / 'recipe.json' / 'page.html'} cannot be written: ")
    assert error.count("\n") == 1


def test_damaged_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", [tick(64, generator__loss=1.0), "\x00garbage\n", "{\n"])
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    assert main([str(run)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{run / 'report.html'}\n"
    assert said.err.splitlines() == [
        f"warning: {run}: 2 lines of stats.jsonl could not be read: left out",
        f"warning: {run}: 1 line of metrics.jsonl could not be read: left out",
    ]
    assert series(Page(run / "report.html").data())["generator/loss"] == ([64], [1.0])
    other = make_run(tmp_path / "other", [])
    (other / "recipe.json").write_text('{"recipe":')
    for arguments in ([str(other)], [str(run), str(other), "--out", str(tmp_path / "c.html")]):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {other}: recipe.json could not be read: ")
        assert error.count("\n") == 1
    assert not (other / "report.html").exists() and not (tmp_path / "c.html").exists()


def test_a_note_is_of_curves_that_are_there(tmp_path: Path) -> None:
    both = {"monitor__diversity": 1.0, "monitor__neighbour_distance": 0.5}
    for name, values in (("one", {"monitor__diversity": 1.0}), ("two", both)):
        (chart,) = payload(make_run(tmp_path / name, [tick(64, **values)]))["curves"]["charts"]
        assert ("Neighbour distance" in chart["note"]) == (len(values) == 2)
        assert chart["note"].startswith("Diversity: ")


def test_the_report_needs_no_torch() -> None:
    code = "import sys, engine.report.__main__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
