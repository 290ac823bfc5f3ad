"""Sample from a run or an export: python -m engine.sample RUN_DIR [--num 64] [--out grid.png].

No flag says what the architecture is: networks are rebuilt from the run's recipe.json and filled
from its newest whole checkpoint. In place of RUN_DIR an export's folder may stand, or its
model.safetensors, model.onnx or model.pt2. Pictures are marked as generated and carry recipe,
checkpoint and seed as metadata.

    python -m engine.sample RUN_DIR --num 64 --seed 0 --out grid.png
    python -m engine.sample RUN_DIR --num 10000 --each images/
    python -m engine.sample RUN_DIR --interpolate --out walk.png      (and walk.gif)
    python -m engine.sample RUN_DIR --reconstruct                     (autoencoders)
    python -m engine.sample RUN_DIR --traverse                        (one row per latent)
    python -m engine.sample RUN_DIR --class 7      (--by-class: a row of each; conditional models)
    python -m engine.sample RUN_DIR --anomaly                         (anogan_mnist)
    python -m engine.sample RUN_DIR --attention                       (self-attention GANs)
    python -m engine.sample RUN_DIR --caption "a red bird"            (text to image)
    python -m engine.sample RUN_DIR --caption "a red bird" --attention      (attngan_birds)

Shapes: N images, C channels, H height, W width, L latent.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro

from engine import draw, draw_caption
from engine.checkpoint import CheckpointError
from engine.draw import Command, SampleError
from engine.exported import MAKES_ALONE, ONE_CHECKPOINT, check_flags, is_export, open_export
from engine.run import RunError
from engine.trained import Model, open_run
from engine.verb import exit_code, say, warn
from engine.whole import check_place
from pipelines.datasets import BadImage, DatasetMissing, NoSplit

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FAILURES = (SampleError, RunError, CheckpointError, BadImage, DatasetMissing, NoSplit, OSError)

Draw = Callable[[Command, Any], None]  # the second is a Model; some need a Trained
KINDS: dict[str, tuple[Draw, str]] = {
    "interpolate": (draw.walk, "walk.png"),
    "reconstruct": (draw.reconstructions, "reconstruction.png"),
    "traverse": (draw.traversal, "traversal.png"),
    "anomaly": (draw.heat_maps, "anomaly.png"),
    "attention": (draw.attention_maps, "attention.png"),
}


def choose(command: Command) -> tuple[Draw, str]:
    """What draws the picture that a command asks for, and the picture's default name.

    Raises ValueError naming a setting.
    """
    asked = [kind for kind in KINDS if getattr(command, kind)]
    if len(asked) > 1:
        raise ValueError(f"give one of --{' and --'.join(asked)}, not both")
    if command.caption is not None and asked not in ([], ["attention"]):
        raise ValueError(f"--caption is for samples: leave --{asked[0]} out")
    if (asked or command.caption is not None) and (command.label is not None or command.by_class):
        other = asked[0] if asked else "caption"
        raise ValueError(f"--class and --by-class are for samples: leave --{other} out")
    if command.label is not None and command.by_class:
        raise ValueError("give one of --class and --by-class, not both")
    if command.each and asked:
        raise ValueError(f"--each writes samples: leave either it or --{asked[0]} out")
    least = 2 if command.interpolate else 1
    for name, smallest in (("num", least), ("frames", 1), ("batch", 1), ("seed", 0)):
        value = getattr(command, name)
        if value is not None and value < smallest:
            raise ValueError(f"--{name} {value} is too small: give at least {smallest}")
    if command.caption is not None:
        if asked:
            return draw_caption.attention_maps, "attention.png"
        return draw_caption.samples, "caption.png"
    return KINDS[asked[0]] if asked else (draw.samples, "grid.png")


def check_places(command: Command) -> None:
    """Raise ValueError for a picture or folder that would overwrite something else, OSError for
    one that cannot be written."""
    if command.out and command.out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out {command.out}: the name must end in {', '.join(SUFFIXES)}")
    if command.out and command.out.is_dir():
        raise ValueError(f"--out {command.out} is a folder: name a file in it")
    if command.each and command.each.exists():
        if not command.each.is_dir():
            raise ValueError(f"--each {command.each} is a file: name a folder")
        if any(command.each.iterdir()):
            raise ValueError(f"--each {command.each} is not empty: name a new folder or empty it")
    for path in (command.out, command.each and command.each / "00000.png"):
        if path:
            check_place(path)


def open_model(command: Command) -> Model:
    """The run or the export that a command names. Raises ValueError, FAILURES."""
    if not is_export(command.run_dir):
        return open_run(command.run_dir, command.checkpoint, command.ema, command.device, warn)
    check_flags(
        command.run_dir,
        ("--reconstruct", command.reconstruct, MAKES_ALONE),
        ("--traverse", command.traverse, MAKES_ALONE),
        ("--attention", command.attention, MAKES_ALONE),
        ("--anomaly", command.anomaly, MAKES_ALONE),
        ("--caption", command.caption is not None, MAKES_ALONE),
        ("--checkpoint", command.checkpoint is not None, ONE_CHECKPOINT),
        ("--no-ema", not command.ema, ONE_CHECKPOINT),
    )
    model = open_export(command.run_dir, command.device, warn)
    model.latent_dim()  # or it says what is to be used instead
    return model


def run_command(command: Command) -> None:
    """Check, load, draw, write. Raises ValueError for a wrong command, FAILURES for the rest."""
    drawn, name = choose(command)
    if not command.out and not command.each:
        command = replace(command, out=Path(name))
    check_places(command)
    model = open_model(command)
    weights = "moving average of the weights" if model.averaged else "weights as trained"
    say(f"{model.name} at {model.images:,} images, {weights}, on {model.device.type}")
    try:
        drawn(command, model)
    except torch.OutOfMemoryError as error:
        raise SampleError(f"out of memory, give a smaller --batch ({error})") from error


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code: 2 for a wrong command, 1 for one that fails."""
    command = tyro.cli(Command, prog="python -m engine.sample", description=__doc__, args=arguments)
    return exit_code(lambda: run_command(command), FAILURES)


if __name__ == "__main__":
    sys.exit(main())
