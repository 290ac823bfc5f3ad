"""What happens between steps: logging ticks, pictures, checkpoints, and the end of a run."""

import shlex
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

from engine import BEGAN, checkpoint, watchdog
from engine.failure import NonFinite
from engine.start import Training
from engine.stats import memory_gib, synchronize
from pipelines.batch import Clock


@dataclass
class Pace:
    """Host time since a logging tick."""

    images: int
    waited: float = 0.0
    began: float = field(default_factory=time.monotonic)


def due(clock: Clock, every_kimg: float) -> bool:
    """Whether the last batch reached or passed a multiple of this many thousand images."""
    every = every_kimg * 1000
    return bool(every) and clock.images // every > (clock.images - clock.batch) // every


def first_step(t: Training) -> None:
    """Say how long it took from the process's start to the end of its first iteration."""
    synchronize(t.session.clock.device)
    seconds, t.begun = time.monotonic() - BEGAN, True
    t.display.first_step(seconds)
    if t.record:
        t.record.event(t.session.clock.images, "first step", f"{seconds:.1f} s after the start")


def measures(t: Training, last: bool) -> bool:
    """Whether the samples are measured after this iteration."""
    return t.metrics is not None and (
        last or due(t.session.clock, t.session.recipe.metrics.every_kimg)
    )


def tick(t: Training, pace: Pace, sample: bool, measure: bool = False) -> Pace:
    """Read the statistics and write them out, with pictures if `sample`, with metrics if `measure`;
    a new pace.

    Raises NonFinite on all ranks if any update since the last tick was not finite.
    """
    clock = t.session.clock
    clock.enter(watchdog.STATISTICS)
    values = t.stats.read(_counters(t))
    seconds = time.monotonic() - pace.began
    _check_finite(t, values)
    values["speed/images_per_s"] = (clock.images - pace.images) / seconds
    values["time/data_share"] = pace.waited / seconds
    values["memory/gib"] = memory_gib(clock.device)
    values["data/skipped"] = t.pipeline.skipped
    if sample or measure:
        clock.enter(watchdog.OUTPUTS)
    with t.session.gathered() if sample or measure else nullcontext():
        if measure:
            values |= t.metrics.measure(t.session)
        if t.record and t.snapshots:
            try:
                _write_out(t, values, sample)
            except OSError as error:  # pictures and curves are not worth the run
                t.display.warn(f"cannot write to {t.folder} ({error}); training goes on")
    return Pace(clock.images)


def _write_out(t: Training, values: dict[str, float], sample: bool) -> None:
    images = t.session.clock.images
    if sample:
        values |= t.snapshots.take()
    t.display.update(images, values)
    t.record.values(images, values)
    if sample:
        t.record.picture(images, t.folder / "samples" / f"{images:09}.png")
    for warning in t.monitors.warnings(images, values):
        t.display.warn(warning)
        t.record.event(images, "warning", warning)
    if sample:
        t.snapshots.write_report()


def _counters(t: Training) -> dict:
    """Device counters that are read with the statistics."""
    values = {}
    for name, player in t.session.players.items():
        values |= {
            f"{name}/lr": player.lr,
            f"{name}/bad_loss": player.bad_losses,
            f"{name}/bad_gradient": player.bad_gradients,
        }
    return values


def _check_finite(t: Training, values: dict[str, float]) -> None:
    kinds = [(name, what) for name in t.session.players for what in ("loss", "gradient")]
    bad = {(name, what): values.pop(f"{name}/bad_{what}") for name, what in kinds}
    if any(bad.values()):
        raise NonFinite(bad, t.session.clock.images)


def save(t: Training) -> None:
    """Begin a checkpoint; once it is written, the ones that are no longer kept are deleted."""
    outputs, clock = t.session.recipe.outputs, t.session.clock
    clock.enter(watchdog.SAVING)
    best = t.metrics.pending if t.metrics else None

    def tidy() -> None:
        if best:
            checkpoint.write_best(t.checkpoints, best)
        checkpoint.prune(t.checkpoints, outputs.keep)

    moment = checkpoint.capture(t.session, t.facts, due(clock, outputs.keep_every))
    t.saver.save(moment, t.checkpoints, tidy)


def finish(t: Training) -> None:
    """Say that the run is complete and where its results are."""
    t.saver.wait()
    if t.record and t.snapshots:
        t.record.event(t.session.clock.images, "finish", "")
        t.snapshots.write_report()
    t.display.line(f"finished {t.folder}: {t.session.clock.images:,} images")
    if t.metrics and (account := t.metrics.account()):
        t.display.line(account)
    t.display.line(f"look at {t.folder / 'report.html'} and {t.folder / 'samples'}")
    for what, command in t.session.recipe.step.uses().items():
        t.display.line(f"{what}: {command.replace('RUN_DIR', shlex.quote(str(t.folder)))}")


def already_finished(t: Training) -> None:
    """Say that there is nothing left to do, and how to go on."""
    images, length = t.session.clock.images, t.session.recipe.length
    flag, value = next((f, v) for f, v in vars(length).items() if v is not None)
    if t.snapshots:
        t.snapshots.write_report()
    t.display.line(f"{t.folder} is finished at {images:,} images")
    t.display.line(f"to train longer: the same command with --{flag} {2 * value:g}")
    t.display.line("to train anew beside it: the same command with --fresh")


def stopped(t: Training) -> None:
    """Say that the run was stopped and how to go on."""
    t.saver.wait()
    t.stop.leave_marker()
    if t.snapshots:
        t.snapshots.write_report()
    images = t.session.clock.images
    t.display.line(f"stopped at {images:,} of {t.total:,} images; {t.to_go_on}")
