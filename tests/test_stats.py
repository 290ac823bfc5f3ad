"""Statistics: means over iterations, the record that survives a kill, and the monitors."""

import json
import math

import pytest
import torch

from engine.monitors import EARLY_IMAGES, Monitors, pairwise_distance
from engine.stats import Record, Stats, forget_after, memory_gib
from engine.world import Ranks

RANKS = Ranks(0, 0, 1, torch.device("cpu"))


def values_of(**numbers: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in numbers.items()}


def entries(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


@pytest.fixture
def record(tmp_path):
    """A record of a run from its start, at batch 10."""
    made = Record(tmp_path, 0, 10)
    yield made
    made.close()


# stats


def test_readings_are_means_over_the_iterations_since_the_last_one():
    stats = Stats(RANKS)
    for loss in (1.0, 2.0, 6.0):
        stats.add(values_of(loss=loss, other=-loss))
    assert stats.read() == {"loss": 3.0, "other": -3.0}
    stats.add(values_of(loss=10.0, other=20.0))
    assert stats.read() == {"loss": 10.0, "other": 20.0}


def test_extra_values_are_read_as_they_are():
    stats = Stats(RANKS)
    for _ in range(4):
        stats.add(values_of(loss=2.0))
    assert stats.read(values_of(lr=0.5, bad=3.0)) == {"loss": 2.0, "lr": 0.5, "bad": 3.0}


def test_nothing_added_reads_as_nothing():
    assert Stats(RANKS).read() == {}


def test_what_a_step_gave_is_not_changed_by_adding_it():
    stats, values = Stats(RANKS), values_of(loss=2.0)
    stats.add(values)
    stats.add(values)
    stats.read()
    assert float(values["loss"]) == 2.0


def test_one_value_that_is_not_a_number_shows_in_the_mean_and_is_gone_after_it():
    stats = Stats(RANKS)
    stats.add(values_of(loss=1.0))
    stats.add(values_of(loss=math.nan))
    assert math.isnan(stats.read()["loss"])
    stats.add(values_of(loss=1.0))
    assert stats.read() == {"loss": 1.0}


def test_bf16_values_are_summed_in_float32():
    stats = Stats(RANKS)
    for _ in range(600):
        stats.add({"loss": torch.tensor(1.0, dtype=torch.bfloat16)})
    assert stats.read() == {"loss": 1.0}


def test_the_memory_of_this_process_is_between_50_mib_and_the_machines():
    assert 0.05 < memory_gib(torch.device("cpu")) < 4096


# record


def test_the_record_appends_values_and_events(record, tmp_path):
    record.event(0, "start", "here")
    record.values(20, {"loss": 1.5})
    start, tick = entries(tmp_path)
    assert (start["images"], start["event"], start["text"]) == (0, "start", "here")
    assert (tick["images"], tick["step"], tick["values"]) == (20, 2, {"loss": 1.5})
    assert 0 <= start["seconds"] <= tick["seconds"] < 60


def test_values_that_are_not_finite_are_written_as_null(record, tmp_path):
    record.values(10, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0})
    assert entries(tmp_path)[0]["values"] == {"a": None, "b": None, "c": None, "d": 0.0}
    assert "NaN" not in (tmp_path / "stats.jsonl").read_text()


def test_a_resumed_record_forgets_what_came_after_and_keeps_its_clock(record, tmp_path):
    for images in (10, 20, 30):
        record.values(images, {"loss": 1.0})
    lines = entries(tmp_path)
    for line, seconds in zip(lines, (100.0, 200.0, 300.0), strict=True):
        line["seconds"] = seconds
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "stats.jsonl").write_text(text + '{"images": 20, "step": 2, "val')
    resumed = Record(tmp_path, 20, 10)
    resumed.values(30, {"loss": 2.0})
    resumed.close()
    assert [e["images"] for e in entries(tmp_path)] == [10, 20, 30]
    assert entries(tmp_path)[-1]["values"] == {"loss": 2.0}
    assert resumed.seconds == 200 and 200 <= entries(tmp_path)[-1]["seconds"] < 260


@pytest.mark.parametrize(
    "torn", ["", "{", '{"images": 5', '{"images": 5, "values": {"a": 1}', "\0"]
)
def test_a_torn_last_line_is_dropped_and_the_whole_ones_stay(torn, tmp_path):
    path = tmp_path / "stats.jsonl"
    whole = '{"images": 1, "seconds": 2.5}\n{"images": 2, "seconds": 3.5}\n'
    path.write_text(whole + torn)
    assert forget_after(path, 100) == 3.5
    assert path.read_text() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["stats.jsonl"]


def test_there_is_nothing_to_forget_of_a_new_run(tmp_path):
    assert forget_after(tmp_path / "stats.jsonl", 100) == 0.0
    assert not list(tmp_path.iterdir())


# monitors

SURE = {"discriminator/real": 0.999, "discriminator/fake": 0.001}
UNSURE = {"discriminator/real": 0.7, "discriminator/fake": 0.3}


def test_a_saturated_discriminator_is_named_at_the_third_tick_once_and_again_after_it_passed():
    monitors = Monitors()
    said = [monitors.opinions(v) for v in [SURE] * 5 + [UNSURE] + [SURE] * 4]
    assert [bool(text) for text in said] == [False] * 2 + [True] + [False] * 5 + [True, False]
    assert "discriminator is sure of everything (D(x) 0.999, D(G(z)) 0.001)" in said[2]
    assert "--discriminator.lr" in said[2]


def test_one_doubtful_tick_starts_the_count_anew():
    monitors = Monitors()
    assert not any(monitors.opinions(v) for v in [SURE, SURE, UNSURE] * 3)


@pytest.mark.parametrize(("real", "fake"), [(0.999, 0.3), (0.7, 0.001), (math.nan, math.nan)])
def test_a_discriminator_that_is_not_sure_of_both_is_left_in_peace(real, fake):
    monitors = Monitors()
    values = {"discriminator/real": real, "discriminator/fake": fake}
    assert not any(monitors.opinions(values) for _ in range(5))


def test_a_family_without_opinions_is_left_in_peace():
    monitors = Monitors()
    assert not any(monitors.opinions({"autoencoder/loss": 1.0}) for _ in range(5))


def test_alike_samples_are_named_at_the_second_picture_once_and_again_after_it_passed():
    monitors = Monitors()
    said = [monitors.diversity(r) for r in (1.0, 0.1, 0.3, 0.1, 0.05, 0.05, 0.5, 0.1, 0.1)]
    assert [bool(text) for text in said] == [False] * 4 + [True] + [False] * 3 + [True]
    assert "5% of the real images" in said[4] and "collapsed" in said[4]


def test_a_tick_without_a_picture_says_nothing_of_diversity():
    monitors = Monitors()
    alike = {"monitor/diversity": 0.1}
    ticks = [alike, UNSURE, UNSURE, UNSURE | alike, SURE, SURE, SURE]
    said = [monitors.warnings(EARLY_IMAGES, values) for values in ticks]
    assert [len(texts) for texts in said] == [0, 0, 0, 1, 0, 0, 1]
    assert "nearly alike" in said[3][0] and "sure of everything" in said[6][0]


def test_the_first_images_of_a_run_give_no_warning_and_do_not_count():
    monitors, trouble = Monitors(), SURE | {"monitor/diversity": 0.1}
    assert not any(monitors.warnings(EARLY_IMAGES - 1, trouble) for _ in range(9))
    assert monitors.warnings(EARLY_IMAGES, trouble) == []
    assert len(monitors.warnings(EARLY_IMAGES, trouble)) == 1


def test_the_pairwise_distance_is_the_mean_over_pairs():
    images = torch.zeros(3, 1, 1, 2)
    images[1, 0, 0, 0], images[2, 0, 0, 1] = 3.0, 4.0
    assert float(pairwise_distance(images)) == pytest.approx((3 + 4 + 5) / 3)
    assert float(pairwise_distance(torch.ones(4, 3, 2, 2))) == 0
