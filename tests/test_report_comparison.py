"""The comparison of runs: overlaid curves, honest figures, settings that differ."""

import json
from pathlib import Path

import pytest

from engine.report import write_comparison
from engine.report.__main__ import main
from engine.report.comparison import payload, run_names
from engine.report.read import read_run
from tests.reports import RECIPE, Page, make_run, measure, tick


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Two runs of one recipe that differ in their seed and in how long they are."""
    first = make_run(tmp_path / "a", [tick(64, generator__loss=1.0, data__skipped=0)], frames=2)
    lines = [tick(images, generator__loss=2.0, data__skipped=0) for images in (64, 128)]
    second = make_run(tmp_path / "b", lines)
    values = {**RECIPE["values"], "seed": 2}
    (second / "recipe.json").write_text(json.dumps({**RECIPE, "values": values}))
    return [first, second]


def test_curves_are_overlaid_and_settings_told_apart(pair: list[Path]) -> None:
    data = payload(pair)
    assert data["names"] == ["dcgan_digits/a", "dcgan_digits/b"]
    (chart,) = data["overlays"]  # data/skipped never changes
    assert chart["title"] == "Losses"
    assert [(s["run"], s["x"], s["y"]) for s in chart["series"]] == [
        (0, [64], [1.0]),
        (1, [64, 128], [2.0, 2.0]),
    ]
    assert data["differing"]["rows"] == [["seed", "1", "2"]]
    assert data["differing"]["same"] == 2
    assert data["lasts"][0]["images"] == 6400
    assert data["lasts"][1] is None
    assert [row[1] for row in data["overview"]] == ["64", "128"]


def test_figures_of_one_protocol_stand_side_by_side(pair: list[Path]) -> None:
    measure(pair[0], {1000: {"fid": 30.0, "kid": 0.1}, 2000: {"fid": 35.0, "kid": 0.2}})
    measure(pair[1], {1000: {"fid": 20.0}})
    data = payload(pair)
    (table,) = data["figures"]["tables"]
    assert table["runs"] == [0, 1]
    assert data["figures"]["differ"] == []
    fid, kid = table["rows"]
    assert [cell["latest"]["value"] for cell in fid["cells"]] == [35.0, 20.0]
    assert fid["cells"][0]["best"] == {"images": 1000, "value": 30.0}
    assert kid["cells"][1] is None
    assert [chart["title"] for chart in data["overlays"]] == ["FID", "KID", "Losses"]
    assert len(data["overlays"][0]["series"]) == 2


def test_figures_of_other_protocols_stand_apart(pair: list[Path]) -> None:
    measure(pair[0], {1000: {"fid": 30.0}}, extractor="inception")
    measure(pair[1], {1000: {"fid": 1.0}}, generated=100)
    data = payload(pair)
    assert [table["runs"] for table in data["figures"]["tables"]] == [[0], [1]]
    assert data["figures"]["differ"] == [
        ["extractor", "inception", "classifier"],
        ["generated", "5,000", "100"],
    ]
    metrics = [chart for chart in data["overlays"] if "FID" in chart["title"]]
    assert [chart["title"] for chart in metrics] == ["FID (protocol 1)", "FID (protocol 2)"]
    assert [len(chart["series"]) for chart in metrics] == [1, 1]


def test_names_are_distinct(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / top / "seed0", []) for top in ("x", "y")]
    assert run_names([read_run(f) for f in folders]) == ["x/seed0", "y/seed0"]
    assert not any("//" in name for name in run_names([read_run(folders[0])] * 2))
    twice = [read_run(folders[0])] * 2
    assert len(set(run_names(twice))) == 2


def test_command_line(pair: list[Path], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(folder) for folder in pair]) == 0
    assert capsys.readouterr().out == "comparison.html\n"
    out = tmp_path / "new" / "cmp.html"
    assert main([*(str(folder) for folder in pair), "--out", str(out)]) == 0
    assert Page(out).data()["kind"] == "comparison"
    capsys.readouterr()
    assert main([str(pair[0]), str(pair[1] / ".." / "a"), "--out", str(out)]) == 2
    assert "named twice" in capsys.readouterr().err


def test_runs_that_have_hardly_begun(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        (folder / "recipe.json").write_text('{"values": null, "provenance": {"versions": 3}}')
    write_comparison(folders, tmp_path / "cmp.html")
    data = Page(tmp_path / "cmp.html").data()
    assert (data["overlays"], data["figures"]["tables"]) == ([], [])
