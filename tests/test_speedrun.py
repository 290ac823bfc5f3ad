"""bench.speedrun: times to a target from curves, what is skipped and begun anew, and a real one."""

import fcntl
import json
import math
import shlex
import time
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from bench import speedrun, speedrun_folder, speedrun_tutorial
from bench.speedrun import Race, accepted, main
from bench.speedrun_report import (
    Point,
    arrival,
    best,
    median_seconds,
    plot,
    ratio,
    read_curve,
    results,
    table,
)
from bench.speedrun_tutorial import Images, Watch, with_its_networks
from engine import recipe as recipes
from engine.metrics import schedule
from engine.session import build_networks
from pipelines.datasets import find
from pipelines.settings import Data
from tests.images import images
from tests.runs import ROOT, toy

NAME = "dcgan_digits"
README = (ROOT / "README.md").read_text()
PROTOCOL = {"extractor": "made up", "ema": False}


def curve(*figures: float, every: float = 10.0) -> list[Point]:
    """A measurement every 1,000 images and so many seconds."""
    return [Point(1000 * i, every * i, figure) for i, figure in enumerate(figures, 1)]


def races(*ours: list[Point]) -> list[Race]:
    """Against a tutorial that takes 30 s to its best."""
    tutorial = curve(9.0, 6.0, 4.0, 5.0)
    return [Race(seed, 4.0, {"tutorial": tutorial, "ours": c}) for seed, c in enumerate(ours)]


def test_the_time_to_a_target_is_that_of_the_first_measurement_at_or_below_it():
    found = curve(9.0, 4.0, 3.0, 8.0)
    assert arrival(found, 4.0) == found[1]
    assert arrival(found, 3.5) == found[2]
    assert arrival(found, 2.9) is None
    assert arrival([], 2.9) is None


def test_figures_that_are_not_finite_reach_nothing():
    found = curve(math.nan, 5.0, math.nan)
    assert best(found) == 5.0
    assert arrival(found, 6.0) == found[1]
    with pytest.raises(ValueError, match="finite"):
        best(curve(math.nan))


def test_the_ratio_is_that_of_the_medians():
    found = races(curve(9.0, 3.0), curve(3.0), curve(9.0, 9.0, 9.0, 3.0))
    assert median_seconds(found, "tutorial") == 30.0
    assert median_seconds(found, "ours") == 20.0
    assert ratio(found) == pytest.approx(2 / 3)
    assert [ratio([race]) for race in found] == pytest.approx([2 / 3, 1 / 3, 4 / 3])


def test_one_that_never_came_there_is_told_and_counts_as_the_slowest():
    found = races(curve(9.0, 5.5), curve(3.0), curve(4.0))
    assert ratio(found) == pytest.approx(1 / 3)
    lines = table(found).splitlines()
    assert lines[1].split()[0] == "0" and "not reached" in lines[1]
    assert "seed 0: ours came to 5.500 in 2,000 images, 20.0 s" in lines[-1]
    found = races(curve(9.0, 5.5), curve(math.nan), curve(4.0))
    assert "not reached" in table(found).splitlines()[4]
    content = json.loads(json.dumps(results(found), allow_nan=False))
    assert content["ratio"] is None and content["median_seconds"]["tutorial"] == 30.0
    assert content["seeds"][0]["ours"]["seconds"] is None
    assert content["seeds"][0]["ours"]["curve"] == [[1000, 10.0, 9.0], [2000, 20.0, 5.5]]
    assert content["seeds"][1]["ours"]["curve"] == [[1000, 10.0, None]]
    assert content["seeds"][2]["ours"]["images"] == 1000


def test_the_plot_is_drawn_for_what_was_not_reached_too(tmp_path):
    plot(tmp_path / "curves.png", "two loops", "made up", races(curve(math.nan, 5.0), curve(3.0)))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def write_curve(path, points: list[Point]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        for p in points:
            figures = {"fid": None if math.isnan(p.figure) else p.figure}
            line = {"images": p.images, "figures": figures, "protocol": PROTOCOL}
            file.write(json.dumps(line | {"seconds": 1.0, "since_start": p.seconds}) + "\n")


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_curve(path) == []
    write_curve(path, curve(9.0, math.nan))
    with open(path, "a") as file:
        file.write('{"images": 3000, "fig')
    one, two = read_curve(path)
    assert one == Point(1000, 10.0, 9.0) and math.isnan(two.figure)


@pytest.fixture
def pretended(monkeypatch):
    """Runs are not started: what would have been is listed, and a curve is written for each."""
    started = []

    def run_until(arguments, log, lock, cache, there):
        started.append(arguments)
        ours = arguments[0] == "engine.train"
        folder = log.parent / NAME / "run" if ours else log.parent
        write_curve(folder / "metrics.jsonl", curve(9.0, 2.0) if ours else curve(9.0, 6.0, 3.0))
        if ours:
            (folder / "recipe.json").write_text('{"resolved": {}}')
        return "reached" if there() else "ended"

    monkeypatch.setattr(speedrun, "run_until", run_until)
    monkeypatch.setattr(speedrun, "open_rulers", lambda _: None)
    monkeypatch.setattr(speedrun.report, "plot", lambda path, *_: path.touch())
    return started


def test_finished_runs_are_skipped_and_an_interrupted_one_begins_anew(tmp_path, pretended, capsys):
    command = [NAME, "--seeds", "0", "--out", str(tmp_path / "it")]
    assert main(command) == 0
    assert [a[0] for a in pretended] == ["bench.speedrun_tutorial", "engine.train"]
    pretended.clear()
    left = tmp_path / "it" / "tutorial-seed1" / "metrics.jsonl"
    write_curve(left, curve(1.0, 0.5))  # of a run that was killed
    command[2:3] = ["0", "1"]
    assert main(command) == 0
    assert [a[a.index("--seed") + 1] for a in pretended] == ["1", "1"]
    content = json.loads((tmp_path / "it" / "results.json").read_text())
    assert [row["target"] for row in content["seeds"]] == [3.0, 3.0]
    assert content["ratio"] == pytest.approx(2 / 3)
    assert content["runs"]["ours-seed1"]["ended"] == "reached"
    assert (tmp_path / "it" / "curves.png").exists()
    pretended.clear()
    assert main(command) == 0
    assert not pretended
    assert "0.67" in capsys.readouterr().out


def test_a_stated_figure_takes_the_place_of_the_tutorials_best(tmp_path, pretended, capsys):
    command = [NAME, "--seeds", "0", "--target", "2.5", "--out", str(tmp_path)]
    assert main([*command, "--", "--compile", "off"]) == 0
    assert all(a[a.index("--compile") + 1] == "off" for a in pretended)
    row = json.loads((tmp_path / "results.json").read_text())["seeds"][0]
    assert (row["target"], row["tutorial"]["seconds"], row["ours"]["seconds"]) == (2.5, None, 20.0)
    assert "not reached" in capsys.readouterr().out
    assert main(command) == 2
    assert "begun with other settings (flags:" in capsys.readouterr().err


def test_a_warm_start_has_one_before_it_that_is_not_timed(tmp_path, pretended):
    command = [NAME, "--seeds", "3", "4", "--warm", "--out", str(tmp_path)]
    assert main(command) == 0
    ours = [a for a in pretended if a[0] == "engine.train"]
    assert [a[a.index("--seed") + 1] for a in ours] == ["0", "3", "4"]
    folders = [Path(a[a.index("--runs") + 1]).name for a in ours]
    assert folders == ["warm-up", "ours-seed3", "ours-seed4"]


def test_figures_of_two_protocols_are_not_compared(tmp_path, pretended, monkeypatch, capsys):
    command = [NAME, "--seeds", "0", "--out", str(tmp_path)]
    assert main(command) == 0
    monkeypatch.setitem(PROTOCOL, "extractor", "another")
    write_curve(tmp_path / "tutorial-seed0" / "metrics.jsonl", curve(9.0, 3.0))
    assert main(command) == 1
    assert "different protocols" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no_such"], "there is no recipe"),
        (["cdcgan_cifar10"], "without classes"),
        (["vae_mnist"], "without classes"),
        ([NAME, "--", "--seed", "3"], "--seed after --"),
        ([NAME, "--", "--data.cache=x"], "--data.cache after --"),
        ([NAME, "--seeds", "1", "1"], "--seeds"),
        ([NAME, "--kimg", "0"], "--kimg"),
        ([NAME, "--accept", "--seeds", "0"], "--accept"),
    ],
)
def test_a_wrong_command_is_refused_in_a_line(arguments, said, tmp_path, capsys):
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    out = ["--out", str(tmp_path / "it")]
    assert main([*arguments[:cut], *out, *arguments[cut:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not (tmp_path / "it").exists()


def test_missing_data_are_named_before_anything_is_made(tmp_path, capsys):
    flags = ["--", "--data.root", str(tmp_path)]
    assert main(["dcgan_mnist", "--out", str(tmp_path / "it"), *flags]) == 1
    assert "dataset 'mnist' not found" in capsys.readouterr().err
    assert not (tmp_path / "it").exists()


def test_a_folder_in_use_or_of_something_else_is_refused(tmp_path, pretended, capsys):
    with open(tmp_path / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([NAME, "--out", str(tmp_path)]) == 1
    assert "in use" in capsys.readouterr().err
    (tmp_path / "thesis.tex").touch()
    assert main([NAME, "--out", str(tmp_path)]) == 2
    assert "something else" in capsys.readouterr().err
    assert not pretended


def test_a_run_that_fails_is_told_with_its_last_line(tmp_path):
    failed = pytest.raises(speedrun_folder.RunError, match=r"ended with 1 .*no_such_module")
    with failed, open(tmp_path / ".lock", "a") as lock:
        speedrun_folder.run_until(
            ["no_such_module"], tmp_path / "log", lock.fileno(), tmp_path, lambda: False
        )


def test_accepted_results_are_named_after_recipe_and_device(monkeypatch):
    monkeypatch.setattr(speedrun, "device_name", lambda _: "CPU Intel(R) Xeon(R) 8, 2 threads")
    path = accepted(speedrun.Command(NAME), recipes.load(NAME))
    assert path.parts[-4:] == ("bench", "results", "speedrun", f"{NAME}_cpu-intel-xeon-8.json")


def test_the_tutorials_clock_stands_still_while_stopped(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(speedrun_tutorial.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(speedrun_tutorial, "BEGAN", 90.0)
    watch = Watch()
    assert watch.seconds() == 10.0
    with watch.stopped():
        now[0] += 5
    now[0] += 1
    assert watch.seconds() == 11.0


def test_ours_stands_still_too(monkeypatch):
    monkeypatch.setattr(schedule, "BEGAN", time.monotonic() - 10)
    measuring = schedule.Schedule.__new__(schedule.Schedule)
    measuring._prepared, measuring._seconds = 2.0, 3.0
    assert measuring._since_start() == pytest.approx(5.0, abs=0.5)


def test_the_tutorial_sees_the_recipes_images(tmp_path):
    images(tmp_path, 5, (20, 20), 1)
    digits = Data(name="digits", resolution=8, channels=1)
    for given in (digits, Data(name="folder", path=tmp_path, resolution=12)):
        dataset = find(given)
        shown = Images(dataset, given)
        assert len(shown) == len(dataset)
        wanted_CHW = dataset.decode(3).transpose(2, 0, 1) / 127.5 - 1
        # PIL's resize and torch's are within 1 of 255
        assert np.abs(shown[3].numpy() - wanted_CHW).max() < 1.01 / 127.5


@pytest.mark.parametrize(("given", "width"), [(None, 32), (8, 8)])
def test_the_tutorials_own_networks_take_the_recipes_place(given, width):
    recipe = with_its_networks(recipes.load("dcgan_mnist"), given)
    assert recipe.step.latent_dim() == 100
    assert {p.network.width for p in recipe.step.players().values()} == {width}
    networks = build_networks(recipe)
    norms = [any(isinstance(m, nn.BatchNorm2d) for m in n.modules()) for n in networks.values()]
    assert norms == [True, True]


@pytest.mark.slow
def test_readmes_command_runs_small(tmp_path, weights, capsys):
    (line,) = (x for x in README.splitlines() if x.startswith("python -m bench.speedrun"))
    name = shlex.split(line)[-1]
    short = ["--kimg", "0.6", "--every-kimg", "0.3", "--seeds", "1", "--workers", "0"]
    few = ["--metrics.generated", "300", "--metrics.real", "300", "--metrics.weights", weights]
    small = toy(name, 64)[1]
    at = small.index("--metrics.every-kimg")  # which is the speedrun's own affair
    flags = [*small[:at], *small[at + 2 :], *few, "--compile", "off"]
    began = time.monotonic()
    command = [name, *short, "--target", "1e9", "--out", str(tmp_path)]
    assert main([*command, "--", *flags, "--kimg", "500"]) == 0
    wall = time.monotonic() - began
    content = json.loads((tmp_path / "results.json").read_text())
    (row,) = content["seeds"]
    assert [images for images, _, _ in row["tutorial"]["curve"]] == [320, 640]
    assert row["ours"]["images"] == 320  # it was stopped there
    assert content["runs"]["ours-seed1"]["ended"] == "reached"
    assert 0 < row["ours"]["seconds"] < wall and 0 < row["tutorial"]["seconds"] < wall
    assert content["protocol"]["generated"] == 300
    assert not (tmp_path / "ours-seed1" / "cache").exists()
    assert (tmp_path / "curves.png").exists()
    assert "ratio" in capsys.readouterr().out
