"""Metrics in the report: every figure with its protocol, nothing undone, nothing mixed."""

import json
from pathlib import Path

from engine.metrics import held_out, protocol
from engine.report.curves import HIGHER, LOWER
from engine.report.quality import differences, protocol_words
from engine.report.sections import payload
from tests.reports import PROTOCOL, make_run, measure, tick


def test_latest_and_best_figures_with_their_protocol(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [tick(64, generator__loss=1.0)])
    measure(run, {1000: {"fid": 30.0, "precision": 0.4}, 2000: {"fid": 20.0, "precision": 0.6}})
    measure(run, {3000: {"fid": 25.0, "precision": None, "odd": 1.0}})
    quality = payload(run)["quality"]
    (table,) = quality["tables"]
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == ["FID", "Precision", "Odd"]
    assert rows["FID"]["latest"] == {"images": 3000, "value": 25.0}
    assert rows["FID"]["best"] == {"images": 2000, "value": 20.0}
    assert rows["FID"]["better"] == "lower is better"
    assert rows["Precision"]["latest"] == {"images": 3000, "value": None}
    assert rows["Precision"]["best"] == {"images": 2000, "value": 0.6}
    assert rows["Odd"]["best"] is None  # nobody knows which end of it is good
    assert table["span"] == [1000, 3000, 3]
    assert table["words"] == (
        "5,000 generated images, 10,000 real images (test split), features of classifier "
        "(weights ab12cd34ef56), moving average of the weights, seed 0"
    )


def test_metrics_have_charts_of_their_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [tick(64, generator__loss=1.0, time__metrics_share=0.02)])
    names = ("fid", "kid", "inception_score", "precision", "recall", "density", "coverage", "psnr")
    measure(run, {1000: dict.fromkeys(names, 0.5)})
    data = payload(run)
    charts = {chart["title"]: chart for chart in data["quality"]["charts"]}
    assert list(charts) == ["FID", "KID", "Inception score", "Precision and recall", "PSNR"]
    labels = [series["label"] for series in charts["Precision and recall"]["series"]]
    assert labels == ["Precision", "Recall", "Density", "Coverage"]
    assert [chart["title"] for chart in data["curves"]["charts"]] == ["Losses", "Time shares"]


def test_a_change_of_protocol_is_noted_and_splits_the_table(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])
    measure(run, {1000: {"fid": 5.0}}, generated=1000)
    measure(run, {2000: {"fid": 20.0}, 3000: {"fid": 19.0}})
    data = payload(run)
    spans = [table["span"] for table in data["quality"]["tables"]]
    assert spans == [[2000, 3000, 2], [1000, 1000, 1]]
    assert data["quality"]["tables"][0]["rows"][0]["best"] == {"images": 3000, "value": 19.0}
    (note,) = data["events"]
    assert (note["kind"], note["images"]) == ("note", 2000)
    assert "generated from 1,000 to 5,000" in note["text"]


def test_figures_that_a_resume_has_undone_are_dropped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [tick(1000, generator__loss=1.0)])
    measure(run, {1000: {"fid": 30.0}, 2000: {"fid": 1.0}, 3000: {"fid": 2.0}})
    with open(run / "stats.jsonl", "a") as file:
        file.write(json.dumps({"images": 1500, "event": "rollback", "text": ""}) + "\n")
    (table,) = payload(run)["quality"]["tables"]
    assert table["span"] == [1000, 1000, 1]
    measure(run, {2000: {"fid": 22.0}})  # made anew
    (table,) = payload(run)["quality"]["tables"]
    assert table["rows"][0]["best"] == {"images": 2000, "value": 22.0}


def test_any_of_the_files_may_be_absent_or_torn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])
    assert payload(run)["quality"] is None
    (run / "metrics.jsonl").write_text('{"images": 5, "figures": 3}\n[]\n{"images": 9, "fig')
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "best.json").write_text("{}")
    data = payload(run)
    assert data["quality"] is None
    assert "2 lines of metrics.jsonl" in data["events"][0]["text"]
    best = {"images": 2000, "metric": "fid", "value": 12.345678}
    (run / "checkpoints" / "best.json").write_text(json.dumps(best))
    data = payload(run)
    assert data["quality"]["best"] == {"images": 2000, "metric": "FID", "value": 12.346}
    assert any("--checkpoint best" in row["command"] for row in data["commands"])


def test_the_words_on_held_out_figures_are_true() -> None:
    assert held_out.IMAGES == protocol.HELD_OUT_IMAGES
    sampled = {"fid", "kid", "inception_score", "precision", "recall", "density", "coverage"}
    sampled |= {"accuracy_real", "accuracy_augmented", "accuracy_samples"}
    sampled |= {"kid_AtoB", "kid_BtoA", "taken_AtoB", "taken_BtoA"}
    neither = {"kl", "score_normal", "score_anomaly", "code_perplexity", "codes_in_use"}
    neither |= {
        "code_bits_frequencies",
        "code_bits_uniform",
        "word_bits_frequencies",
        "word_bits_uniform",
    }
    neither |= {"r_precision_chance", "r_precision_real"}
    assert {*LOWER, *HIGHER, *neither} - sampled == {*protocol.HELD_OUT}


def test_what_was_measured_after_training_has_a_table_per_protocol(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])
    assert payload(run)["evaluated"] == []
    entries = [
        {"images": 2000, "checkpoint": "ab" * 32, "figures": {"kid": 1.0, "fid": 9.0}},
        {"images": 1000, "checkpoint": "cd" * 32, "figures": {"fid": None}},
    ]
    entries = [entry | {"protocol": PROTOCOL} for entry in entries]
    entries.append(entries[0] | {"protocol": PROTOCOL | {"generated": 7}})
    entries.append({"images": "many"})
    (run / "evaluation.json").write_text(json.dumps(entries))
    data = payload(run)
    newest, older = data["evaluated"]
    assert newest["words"].startswith("7 generated images")
    assert older["heads"] == [["FID", "lower is better"], ["KID", "lower is better"]]
    assert older["rows"] == [
        [0, 1000, "cd" * 6, [[None], []]],
        [0, 2000, "ab" * 6, [[9.0], [1.0]]],
    ]
    assert data["events"][-1]["text"] == "1 entry of evaluation.json could not be read: left out"
    for torn in ("{", "{}"):
        (run / "evaluation.json").write_text(torn)
        data = payload(run)
        assert data["evaluated"] == []
        assert "evaluation.json" in data["events"][-1]["text"]


def test_protocols_in_words() -> None:
    assert "compare it with nothing" in protocol_words({}, [])
    words = "weights as trained, split train"
    assert protocol_words({"split": "train", "ema": False}, ["fid"]) == words
    assert "psnr: of held-out images" in protocol_words(PROTOCOL, ["fid", "psnr"])
    assert differences([PROTOCOL, PROTOCOL]) == {}
    other = {**PROTOCOL, "ema": False, "crop": 1}
    assert differences([PROTOCOL, other]) == {"ema": ["yes", "no"], "crop": ["not stated", "1"]}
