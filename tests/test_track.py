"""Trackers: what they are told, that none holds or ends a run, and real W&B on two ranks."""

import json
import os
import signal
import threading

import pytest
import torch.distributed
from accelerate import tracking
from PIL import Image

from engine import track
from engine import train as trainer
from engine.stats import Record
from engine.track import Trackers, check
from tests.forked import train
from tests.runs import differences, final_state, toy

SETTINGS = {"seed": 0, "outputs.track": ("wandb",), "data.root": None}


class Fake(tracking.GeneralTracker):
    """A tracker that keeps what it is told, and fails where it is told to."""

    name = "fake"
    requires_logging_directory = False
    fails: tuple[str, ...] = ()
    told: list = []  # noqa: RUF012

    def __init__(self, run_name, **options):
        super().__init__()
        self.project = run_name

    @property
    def tracker(self):
        return self

    @tracking.on_main_process
    def _do(self, what, *values):
        tracking.logger.debug("accelerate's own do this")
        if what in self.fails:
            raise ConnectionError(f"no route\nto {what}")
        self.told.append((what, *values))

    def start(self):
        self._do("start", self.project)

    def store_init_configuration(self, values):
        self._do("settings", values)

    def log(self, values, step=None):
        self._do("log", values, step)

    def log_images(self, values, step=None):
        self._do("images", values["samples"][0].size, step)

    def finish(self):
        self._do("finish")


@pytest.fixture
def fake(monkeypatch):
    """The fake in the place of SwanLab's class."""
    kind = type("Fake", (Fake,), {"told": []})
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "swanlab", kind)
    return kind


@pytest.fixture
def opened(fake, tmp_path):
    """Makes trackers of a run whose warnings are kept."""

    def make(names=("swanlab",)):
        trackers = Trackers(names, tmp_path, "dcgan_digits", SETTINGS, warnings.append)
        trackers.warnings = warnings
        return trackers

    warnings = []
    return make


def test_a_tracker_is_told_the_settings_values_events_and_pictures_in_their_order(
    opened, fake, tmp_path
):
    Image.new("RGB", (6, 4)).save(tmp_path / "grid.png")
    record = Record(tmp_path, 0, 8, opened())
    record.event(0, "start", "here")
    record.values(8, {"loss": 1.5, "bad": float("nan"), "worse": float("inf")})
    record.picture(8, tmp_path / "grid.png")
    record.event(8, "warning", "a")
    record.event(16, "warning", "b")
    record.close()
    record.close()
    assert fake.told == [
        ("start", "saddle"),
        ("settings", {"seed": 0, "outputs.track": "('wandb',)", "data.root": "None"}),
        ("log", {"loss": 1.5}, 8),
        ("images", (6, 4), 8),
        ("log", {"event/warning": 1}, 8),
        ("log", {"event/warning": 2}, 16),
        ("finish",),
    ]
    assert record.trackers.warnings == []


def test_after_a_rollback_the_same_trackers_go_on_and_the_curves_begin_at_the_checkpoint(
    opened, fake, tmp_path
):
    record = Record(tmp_path, 0, 8, opened())
    for images in (8, 16):
        record.values(images, {"loss": 1.0})
    record.go_back(8)
    record.event(8, "rollback", "")
    record.values(16, {"loss": 2.0})
    record.close()
    steps = [entry[2] for entry in fake.told if entry[0] == "log"]
    assert steps == [8, 16, 8, 16] and fake.told[-1] == ("finish",)
    lines = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [8, 8, 16]


@pytest.mark.parametrize("what", ["start", "settings", "log", "images", "finish"])
def test_a_tracker_that_fails_is_let_go_with_one_warning(what, opened, fake, tmp_path):
    fake.fails = (what,)
    Image.new("RGB", (6, 4)).save(tmp_path / "grid.png")
    record = Record(tmp_path, 0, 8, opened())
    for images in (8, 16, 24):
        record.values(images, {"loss": 1.0})
        record.picture(images, tmp_path / "grid.png")
    record.close()
    (warning,) = record.trackers.warnings
    assert f"swanlab is let go (ConnectionError: no route to {what})" in warning
    assert "training goes on" in warning
    assert len((tmp_path / "stats.jsonl").read_text().splitlines()) == 3


def test_one_that_fails_leaves_the_others_alone(opened, fake, monkeypatch, tmp_path):
    broken = type("Broken", (Fake,), {"fails": ("log",), "told": []})
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "aim", broken)
    trackers = opened(("aim", "swanlab"))
    for images in (8, 16):
        trackers.values(images, {"loss": 1.0})
    trackers.close()
    assert len(trackers.warnings) == 1 and "aim" in trackers.warnings[0]
    assert [e[2] for e in fake.told if e[0] == "log"] == [8, 16]


def test_a_server_that_does_not_answer_holds_nothing(opened, fake, monkeypatch):
    monkeypatch.setattr(track, "OPEN_S", 0.1)
    monkeypatch.setattr(track, "CLOSE_S", 0.1)
    monkeypatch.setattr(track, "WAITING", 3)
    silent = threading.Event()
    fake.start = lambda self: silent.wait(30)
    at_once = opened()
    assert "did not open" in at_once.warnings.pop()
    at_once.values(8, {"loss": 1.0})
    at_once.close()

    del fake.start
    fake.log = lambda self, values, step: silent.wait(30)
    later = opened()
    for images in range(0, 80, 8):
        later.values(images, {"loss": 1.0})
    assert "3 calls wait" in later.warnings.pop()
    last = opened()
    last.values(8, {"loss": 1.0})
    last.close()
    assert "did not finish" in last.warnings.pop()
    silent.set()


def test_accelerate_neither_joins_a_process_group_nor_changes_the_environment(opened, monkeypatch):
    from accelerate.state import PartialState

    PartialState._reset_state()
    for name, value in (("LOCAL_RANK", "0"), ("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    before, threads = dict(os.environ), torch.get_num_threads()
    opened().close()
    assert os.environ == before and torch.get_num_threads() == threads
    assert not torch.distributed.is_initialized()
    assert PartialState().num_processes == 1 and PartialState().device.type == "cpu"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("nosuch",), "nosuch is no tracker known here; give some of aim, clearml"),
        (("tensorboard",), "tensorboard is always written"),
        (("wandb", "mlflow"), "--track mlflow: not installed; pip install 'saddle[track]' wandb"),
    ],
)
def test_what_cannot_be_tracked_with_is_refused_by_name(names, said, monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", ["wandb"])
    with pytest.raises(ValueError, match="--track") as refusal:
        check(names)
    assert said in str(refusal.value)
    check(("wandb",))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check(names)  # rank 0 speaks for all


def test_without_accelerate_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "accelerate.tracking", None)
    with pytest.raises(ValueError, match=r"pip install 'saddle\[track\]' wandb"):
        check(("wandb",))
    check(())


def test_an_unknown_tracker_ends_the_command_before_anything_else(tmp_path):
    said = train("dcgan_digits", "--track", "nosuch", "--runs", str(tmp_path), code=2)
    assert said.startswith("error: --track nosuch") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_outlives_its_tracker(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "_available_trackers", ["swanlab"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    fake.fails = ("log",)
    flags = toy("dcgan_digits")[1]
    flags += ["--steps", "3", "--log-every", "0.008", "--compile", "off", "--samples", "4"]
    where = ["--runs", str(tmp_path), "--run", "a", "--track", "swanlab", "--device", "cpu"]
    assert trainer.main(["dcgan_digits", *flags, *where]) == 0
    assert capsys.readouterr().out.count("swanlab is let go") == 1
    lines = (tmp_path / "dcgan_digits/a/stats.jsonl").read_text().splitlines()
    assert sum('"values"' in line for line in lines) == 3


@pytest.mark.slow
def test_wandb_on_two_ranks_resumed_and_the_run_is_the_same_without_it(tmp_path):
    """Real W&B, offline: rank 0 alone opens it, once per command, under one identity."""
    flags = [*toy("dcgan_digits")[1], "--compile", "off", "--samples", "4", "--device", "cpu"]
    flags += ["--log-every", "0.008", "--sample-every", "0.016", "--runs", str(tmp_path)]
    tracked = [*flags, "--run-name", "tracked", "--track", "wandb"]
    home = {"WANDB_MODE": "offline", "WANDB_PROJECT": "mine", "WANDB_CONFIG_DIR": str(tmp_path)}
    said = train("dcgan_digits", *tracked, "--steps", "2", ranks=2, **home)
    assert said.count("Tracking run with wandb") == 1 and "let go" not in said
    folder = tmp_path / "dcgan_digits/tracked"
    identity = json.loads((folder / "trackers.json").read_text())["wandb"]
    train("dcgan_digits", *tracked, "--steps", "4", ranks=2, **home)
    assert json.loads((folder / "trackers.json").read_text()) == {"wandb": identity}
    first, second = sorted(folder.glob(f"wandb/offline-run-*-{identity}/run-{identity}.wandb"))
    told = first.read_bytes() + second.read_bytes()
    assert first.read_bytes().count(b"generator/loss") and b"mine" in told
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    losses = [line["values"]["generator/loss"] for line in lines if "values" in line]
    assert len(losses) == 4 and all(json.dumps(loss).encode() in told for loss in losses)
    assert [p.name.split("_")[1] for p in second.parent.glob("files/media/images/*")] == ["32"]
    train("dcgan_digits", *flags, "--run-name", "plain", "--steps", "4", ranks=2)
    assert not differences(final_state(folder), final_state(tmp_path / "dcgan_digits/plain"))
    assert not (tmp_path / "dcgan_digits/plain/trackers.json").exists()
