"""Experiment trackers beside TensorBoard: Weights & Biases, MLflow and others, by `--track`.

They are opened through accelerate's tracker classes, on rank 0 alone. Each works in a thread of its
own, so that a slow server does not hold the training, and is let go with one warning when it fails:
a run is never lost to a tracker. RUN/trackers.json keeps the name by which each one knows the run,
so that a resumed run goes on there.

Steps are images seen. After a resume or a rollback the images since the checkpoint are seen again;
W&B keeps what it was told of them first.
"""

import json
import logging
import math
import os
import queue
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from engine.world import environment

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "saddle"
IDENTITIES = "trackers.json"
OPEN_S, CLOSE_S = 120.0, 120.0  # patience with a server; W&B itself gives up on opening after 90 s
WAITING = 1000  # calls that may wait for a slow server; a tick is two at most
# What says to accelerate that there are several processes. It must not open a process group.
LAUNCHERS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
LAUNCHERS += ("MV2_COMM_WORLD_SIZE",)

Call = Callable[["GeneralTracker"], Any]


def check(names: tuple[str, ...]) -> None:
    """Raise ValueError for a tracker that is unknown or not installed; only rank 0 looks."""
    if not names or environment()[0]:
        return
    install = f"pip install 'saddle[track]' {' '.join(names)}"
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    except ModuleNotFoundError as error:
        raise ValueError(f"--track needs {error.name}; {install}") from None
    known = sorted(set(LOGGER_TYPE_TO_CLASS) - {"tensorboard"})
    for name in names:
        if name not in known:
            reason = "is always written" if name == "tensorboard" else "is no tracker known here"
            raise ValueError(f"--track {name}: {name} {reason}; give some of {', '.join(known)}")
    there = {str(name) for name in get_available_trackers()}
    if missing := [name for name in names if name not in there]:
        raise ValueError(
            f"--track {' '.join(missing)}: not installed; {install} (known: {', '.join(known)})"
        )


class Tracker:
    """One tracker in its own thread: calls wait in a queue and are made in their order."""

    def __init__(
        self, name: str, opening: Callable[[], "GeneralTracker"], warn: Callable[[str], None]
    ) -> None:
        self.name, self._warn = name, warn
        self._calls: queue.Queue[Call | None] = queue.Queue(WAITING)
        self._opened, self.gone = threading.Event(), False
        self._trouble: str | None = None
        self._thread = threading.Thread(
            target=self._work, args=(opening,), name=f"track-{name}", daemon=True
        )
        self._thread.start()
        if not self._opened.wait(OPEN_S):
            self._trouble = f"it did not open within {OPEN_S:.0f} s"
        self._look()

    def send(self, call: Call | None) -> None:
        """Have the thread make this call (None: finish); dropped where the tracker was let go."""
        self._look()
        if self.gone:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._trouble = f"{WAITING} calls wait for it"
            self._look()

    def close(self) -> None:
        """Let it finish, within CLOSE_S."""
        self.send(None)
        if self.gone:
            return
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._trouble = f"it did not finish within {CLOSE_S:.0f} s"
        self._look()

    def _work(self, opening: Callable[[], "GeneralTracker"]) -> None:
        try:
            tracker = opening()
            self._opened.set()
            while call := self._calls.get():
                call(tracker)
            tracker.finish()
        # Other people's packages on a network: W&B alone raises a dozen kinds. SystemExit too,
        # which some raise where nobody is logged in.
        except (Exception, SystemExit) as error:
            self._trouble = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._opened.set()

    def _look(self) -> None:
        """Say once, from the caller's thread, that the tracker is let go."""
        if self._trouble and not self.gone:
            self.gone = True
            self._warn(f"{self.name} is let go ({self._trouble}); training goes on without it")


class Trackers:
    """All trackers of a run."""

    def __init__(
        self,
        names: tuple[str, ...],
        folder: Path,
        recipe: str,
        settings: dict[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        """settings: the flattened recipe. Says through `warn` which trackers do not open."""
        self._all: list[Tracker] = []
        self._counts: dict[str, int] = {}
        if not names:
            return
        with _one_process():
            from accelerate.state import PartialState

            PartialState(cpu=True)  # accelerate's trackers log through it
        logging.getLogger("accelerate").setLevel(logging.ERROR)
        known = _read(folder)
        for name in dict.fromkeys(names):
            opening = _Opening(name, folder, recipe, settings, known.get(name))
            self._all.append(tracker := Tracker(name, opening, warn))
            if opening.identity and not tracker.gone:
                known[name] = opening.identity
        (folder / IDENTITIES).write_text(json.dumps(known, indent=1))

    def values(self, images: int, values: dict[str, float]) -> None:
        """A tick's values. Those that are not finite are left out: not every server's JSON takes
        them, and stats.jsonl has them as null."""
        finite = {k: float(v) for k, v in values.items() if math.isfinite(v)}
        self._send(lambda tracker: tracker.log(finite, step=images))

    def event(self, images: int, event: str) -> None:
        """Count an event: a number is what every tracker takes."""
        self._counts[event] = self._counts.get(event, 0) + 1
        count = {f"event/{event}": self._counts[event]}
        self._send(lambda tracker: tracker.log(count, step=images))

    def picture(self, images: int, path: Path) -> None:
        """A sample grid, for the trackers that take images."""
        self._send(lambda tracker: _log_picture(tracker, images, path))

    def close(self) -> None:
        """Let all of them finish; once."""
        trackers, self._all = self._all, []
        for tracker in trackers:
            tracker.close()

    def _send(self, call: Call) -> None:
        for tracker in self._all:
            tracker.send(call)


class _Opening:
    """Opens one of accelerate's trackers, in the tracker's thread (MLflow's run belongs to one);
    `identity` is then the name by which it knows the run, where it can go on with one."""

    def __init__(
        self, name: str, folder: Path, recipe: str, settings: dict[str, Any], identity: str | None
    ) -> None:
        self.name, self.folder, self.recipe = name, folder, recipe
        self.settings, self.identity = settings, identity

    def __call__(self) -> "GeneralTracker":
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind, known = LOGGER_TYPE_TO_CLASS[self.name], self.identity
        place = (".",) if kind.requires_logging_directory else ()  # as aim's own default
        project = os.environ.get("WANDB_PROJECT") or PROJECT if self.name == "wandb" else PROJECT
        if self.name == "wandb":
            self.identity = known or f"{self.recipe}-{self.folder.name}-{secrets.token_hex(4)}"
        tracker = kind(project, *place, **self._options())
        tracker.start()
        if self.name == "mlflow":
            self.identity = tracker.tracker.info.run_id
        if known is None:  # MLflow refuses a setting that has changed since
            tracker.store_init_configuration(_plain(self.settings))
        return tracker

    def _options(self) -> dict[str, Any]:
        """What accelerate hands on to the package: the run's name, its group, where it goes on."""
        run, folder = self.folder.name, str(self.folder.absolute())
        if self.name == "wandb":
            import wandb

            # its own capture of the terminal fights with the live display
            quiet = wandb.Settings(console="off")
            options = {"name": run, "group": self.recipe, "id": self.identity, "resume": "allow"}
            return options | {"dir": folder, "settings": quiet}
        if self.name == "mlflow":
            tags = {"recipe": self.recipe, "folder": folder}
            return {"run_name": run, "run_id": self.identity, "tags": tags}
        if self.name == "trackio":
            return {"name": run, "group": self.recipe, "resume": "allow"}
        if self.name == "swanlab":
            return {"experiment_name": run, "logdir": f"{folder}/swanlab"}
        if self.name == "dvclive":  # by itself it would commit to the user's git repository
            resume = Path(folder, "dvclive").exists()
            return {
                "dir": f"{folder}/dvclive",
                "resume": resume,
                "save_dvc_exp": False,
                "dvcyaml": None,
            }
        if self.name == "clearml":  # by itself it would copy all that TensorBoard is given
            return {"task_name": f"{self.recipe} {run}", "auto_connect_frameworks": False}
        return {}


def _log_picture(tracker: "GeneralTracker", images: int, path: Path) -> None:
    """In the form that each of accelerate's classes takes."""
    if tracker.name == "mlflow":
        tracker.log_artifact(str(path), "samples")
    elif hasattr(tracker, "log_images"):
        with Image.open(path) as picture:
            picture.load()
        tracker.log_images({"samples": picture if tracker.name == "aim" else [picture]}, images)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Values of the kinds that every tracker takes."""
    kinds = (bool, int, float, str)
    return {k: v if isinstance(v, kinds) else str(v) for k, v in settings.items()}


def _read(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / IDENTITIES).read_text()))
    except (FileNotFoundError, ValueError):  # none yet, or torn: the trackers begin anew
        return {}


@contextmanager
def _one_process() -> Iterator[None]:
    """An environment in which accelerate sees no launcher: told of one, its state would join a
    process group, choose a device and set the number of threads, all of which are ours."""
    hidden = {n: v for n, v in os.environ.items() if n in LAUNCHERS or n.startswith("ACCELERATE_")}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
