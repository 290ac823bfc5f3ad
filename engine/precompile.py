"""Compilation before the first step, by a rehearsal that is undone."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine import probe
from engine.artifact import ArtifactError, load_artifact
from engine.compile import Compiler, graphs, rehearse
from engine.display import Display
from engine.session import Session
from pipelines.batch import Batch
from pipelines.open import Pipeline


def precompile(
    live: Session,
    pipeline: Pipeline,
    compiler: Compiler,
    artifact: Path | None,
    found: list[probe.Choice],
    display: Display,
) -> list[probe.Choice]:
    """Compile all but what was found to be faster eager; a run that begins measures that, and gives
    what it found. An artifact is taken from first."""
    if not compiler.active:
        if artifact:
            display.warn(f"--compile-artifact: nothing is compiled ({compiler.reason})")
        return []
    if artifact:
        take_artifact(artifact, live.ranks.device, display)
    compiler.kept_eager = probe.kept_eager(found)
    pipeline.ready(live.clock)
    batch = pipeline.batch(live.clock)
    compile_all(live, batch, display.line)
    known = any(c.what.startswith(probe.COMPILE) for c in found)
    begins = live.clock.images == 0 and not known  # also after a kill while it compiled
    left = compiler.active and (live.recipe.compile, live.recipe.probe) == ("auto", "auto")
    if not begins or not left:
        return []
    choices = probe.compilation(live, compiler, batch)
    for made in choices:
        display.line(f"{made.what}: {made.said}")
    return choices


def take_artifact(path: Path, device: torch.device, display: Display) -> None:
    """Have what is compiled found in a file of `launch.doctor --warm`."""
    try:
        load_artifact(path, device)
    except OSError as error:
        display.warn(f"--compile-artifact {path}: {error.strerror}; compiling instead")
    except ArtifactError as error:
        display.warn(f"--compile-artifact {path} {error}; compiling instead")


def compile_all(live: Session, batch: Batch, say: Callable[[str], None]) -> None:
    """Compile by a rehearsal on this batch, and say how long it took."""
    began = time.monotonic()
    with live.rehearsing():
        rehearse(
            lambda: live.rehearse(batch),
            next(iter(live.players.values())).compiler,
            live.ranks,
            say,
            together=any(player.shared.sharded for player in live.players.values()),
        )
    new, cached = (sum(n) for n in zip(*live.ranks.gather(graphs()), strict=True))
    seconds = time.monotonic() - began
    say(f"compiled in {seconds:.0f} s: {new} graphs new, {cached} from the cache")
