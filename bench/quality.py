"""Are a trained run's samples what they should be? python -m bench.quality digits RUN_DIR

digits: a support vector machine trained on the real digits, with calibrated probabilities, judges
1,000 samples of the newest checkpoint. Printed: the share that it gives more than 0.9 to one class,
that share on held-out real digits (five-fold cross-validation) as the yardstick, and the classes of
the confident samples.
"""

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.svm import SVC

from engine.checkpoint import CheckpointError
from engine.run import RunError
from engine.trained import open_run
from pipelines.datasets import find

CONFIDENT = 0.9


@dataclass(frozen=True)
class Command:
    """One judgement."""

    what: Annotated[Literal["digits"], tyro.conf.Positional]
    """What the run makes."""
    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    num: int = 1000
    """Samples to judge."""
    seed: int = 0
    """Seed of the samples."""
    ema: bool = True
    """Take the moving average of the weights where the run keeps one."""
    checkpoint: int | None = None
    """Images seen at the checkpoint to take; default: the newest whole one."""
    json: bool = False
    """Print one line of JSON instead of text."""


def judge() -> CalibratedClassifierCV:
    """The classifier: an RBF SVM whose decisions are turned into probabilities by Platt scaling.

    It stands for SVC(probability=True), which scikit-learn 1.9 deprecates for this very form.
    """
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return CalibratedClassifierCV(SVC(C=10.0), method="sigmoid", cv=folds, ensemble=False)


def confident_share(probability_NK: np.ndarray) -> float:
    """Share of rows whose largest probability is above 0.9."""
    return float((probability_NK.max(1) > CONFIDENT).mean())


def digits(command: Command) -> dict:
    """The figures of a run on the digits. Raises RunError, CheckpointError or ValueError."""
    trained = open_run(command.run_dir, command.checkpoint, command.ema)
    dataset = find(trained.recipe.data)
    if dataset.name != "digits":
        raise ValueError(f"{command.run_dir} was trained on {dataset.name}, not on digits")
    real_ND = np.stack([dataset.decode(row) for row in range(len(dataset))])
    real_ND = real_ND.reshape(len(dataset), -1) / 255.0
    label_N = dataset.labels
    parts = list(trained.samples(command.seed, command.num, 100))
    # rounded to bytes as a picture would be
    fake_ND = ((torch.cat(parts) + 1) * 127.5).round().flatten(1).numpy() / 255.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        folds = StratifiedKFold(5, shuffle=True, random_state=1)
        held_out_NK = cross_val_predict(judge(), real_ND, label_N, cv=folds, method="predict_proba")
        fake_NK = judge().fit(real_ND, label_N).predict_proba(fake_ND)
    confident_N = fake_NK.max(1) > CONFIDENT
    counts = np.bincount(fake_NK.argmax(1)[confident_N], minlength=10)
    return {
        "run": str(command.run_dir),
        "images": trained.images,
        "weights": "average" if trained.averaged else "raw",
        "samples": command.num,
        "confident": confident_share(fake_NK),
        "confident_real": confident_share(held_out_NK),
        "accuracy_real": float((held_out_NK.argmax(1) == label_N).mean()),
        "classes": int((counts > 0).sum()),
        "counts": counts.tolist(),
    }


def show(figures: dict) -> str:
    """The figures as text."""
    counts = "  ".join(f"{digit}: {n}" for digit, n in enumerate(figures["counts"]))
    return "\n".join(
        [
            f"{figures['run']} at {figures['images']:,} images, {figures['weights']} weights",
            f"samples with confidence above {CONFIDENT}: {figures['confident']:.1%} of "
            f"{figures['samples']:,}",
            f"held-out real digits: {figures['confident_real']:.1%} above {CONFIDENT}, "
            f"{figures['accuracy_real']:.1%} right",
            f"classes among the confident samples: {figures['classes']} of 10",
            f"  {counts}",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code."""
    command = tyro.cli(Command, prog="python -m bench.quality", description=__doc__, args=arguments)
    try:
        figures = digits(command)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RunError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures) if command.json else show(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
