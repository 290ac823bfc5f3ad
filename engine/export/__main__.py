"""Export a trained run: python -m engine.export RUN_DIR [--out DIR].

The folder holds the model as safetensors with the source that loads it, as ONNX and as a program
of torch.export, each compared with the PyTorch model, a model card and samples. `engine.sample`
takes the folder or any of its files in place of a run directory; `engine.translate` does for a
model that makes images of images, one direction of which is exported.

    python -m engine.export RUN_DIR
    python -m engine.export RUN_DIR --direction BtoA
    python -m engine.export RUN_DIR --checkpoint best --formats safetensors --out my-model
"""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import tyro

from engine.checkpoint import CheckpointError
from engine.export.folder import check_target, write_export
from engine.export.source import ExportError
from engine.export.subject import Subject, subject_of
from engine.networks.spec import Network
from engine.run import RunError
from engine.trained import open_run
from engine.translation import Direction
from engine.verb import exit_code, say, warn

FAILURES = (ExportError, RunError, CheckpointError, OSError)
FOR_ONNX = ("onnx", "onnxruntime", "onnxscript")

Form = Literal["safetensors", "onnx", "program"]


@dataclass(frozen=True)
class Command:
    """One export."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory, as `engine.train` names it at its end."""
    out: Path | None = None
    """Folder to write; default: RUN_DIR/export. An earlier export there is replaced unless
    somebody changed it; anything else is left alone."""
    direction: Direction | None = None
    """From which domain to which, where the model has two; default: the run's own, AtoB where it
    goes both ways."""
    checkpoint: int | Literal["best"] | None = None
    """Images seen at the checkpoint to take, or the best one measured; default: the newest."""
    ema: bool = True
    """Take the moving average of the weights where the run keeps one."""
    formats: tuple[Form, ...] | None = None
    """Forms to write; default: all that the model can take, ONNX if its packages are installed."""


def choose_forms(asked: tuple[Form, ...] | None) -> list[Form]:
    """The forms to write, in one order. Raises ValueError if ONNX is asked for and not there."""
    forms: list[Form] = ["safetensors", "onnx", "program"]
    missing = [p for p in FOR_ONNX if find_spec(p) is None]
    if asked is not None and not asked:
        raise ValueError("--formats names none: give one of safetensors, onnx, program")
    chosen = [form for form in forms if asked is None or form in asked]
    if missing and "onnx" in chosen:
        lack = f"ONNX needs the packages {', '.join(missing)}: pip install 'saddle[export]'"
        if asked:
            raise ValueError(lack)
        say(f"no model.onnx: {lack}")
        chosen.remove("onnx")
    return chosen


def leave_out(
    forms: list[Form], asked: tuple[Form, ...] | None, settings: Network, name: str
) -> list[Form]:
    """The forms that the network can take. Raises ValueError if another is asked for."""
    if settings.traceable or forms == ["safetensors"]:
        return forms
    reason = f"{name} draws in a loop, which ONNX and torch.export would unroll"
    if asked:
        raise ValueError(f"{reason}: give --formats safetensors")
    say(f"safetensors alone: {reason}")
    return ["safetensors"]


def _way(subject: Subject) -> str:
    directions = subject.kind.directions if subject.kind else ()
    return f", {directions[0]}" if directions else ""


def run_command(command: Command) -> None:
    """Check, load, write. Raises ValueError for a wrong command, FAILURES for the rest."""
    forms = choose_forms(command.formats)
    target = (command.out or command.run_dir / "export").resolve()
    check_target(target)
    trained = open_run(command.run_dir, command.checkpoint, command.ema, "cpu", warn)
    subject = subject_of(trained, command.direction)
    forms = leave_out(forms, command.formats, subject.settings, trained.name)
    weights = "moving average of the weights" if trained.averaged else "weights as trained"
    say(f"{trained.name} at {trained.images:,} images, {weights}{_way(subject)}")
    write_export(trained, subject, command.run_dir, forms, target, say)
    say(f"wrote {target}: README.md says how to use it")


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code: 2 for a wrong command, 1 for one that fails."""
    command = tyro.cli(Command, prog="python -m engine.export", description=__doc__, args=arguments)
    return exit_code(lambda: run_command(command), FAILURES)


if __name__ == "__main__":
    sys.exit(main())
