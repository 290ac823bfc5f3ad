"""Measuring while training: when, what is written of it, and which checkpoint is the best so far.

metrics.jsonl            one object per evaluation: images, figures, protocol, seconds that it
                         took, and those since the process began that were not spent on measuring
checkpoints/best.json    images, metric, value, protocol (digest) of the best checkpoint
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import BEGAN
from engine.checkpoint import read_best
from engine.metrics.evaluator import Evaluation
from engine.metrics.open import open_evaluator
from engine.session import Session
from engine.stats import forget_after

RANKED = (("fid", -1), ("kid", -1), ("elbo", 1), ("nll", -1), ("psnr", 1))
"""Figures by which checkpoints are ranked, the first that there is; -1 where lower is better."""


class Schedule:
    """A run's evaluations. Every rank calls it; rank 0 writes."""

    def __init__(self, session: Session, folder: Path, say: Callable[[str], None]) -> None:
        """Open extractor and real images. Raises ValueError naming a setting."""
        self.folder, self.improved, self._say = folder, False, say
        began = time.monotonic()
        self._evaluator = open_evaluator(session.recipe, session.ranks, say)
        best = read_best(folder / "checkpoints") if session.ranks.rank == 0 else None
        self._best = session.ranks.share(best)
        self._pending: dict | None = None
        self._seconds, self._began = 0.0, time.monotonic()
        self._prepared = self._began - began  # the classifier may be trained here, once
        if session.ranks.rank == 0:
            forget_after(folder / "metrics.jsonl", session.clock.images)

    def measure(self, session: Session) -> dict[str, float]:
        """Evaluate this moment's samplers; values for the statistics. Sets `improved` on all ranks
        where this moment is the best so far and wants a checkpoint."""
        averaged = any(player.average for player in session.players.values())
        evaluation = self._evaluator.evaluate(session.samplers(), averaged)
        self._seconds += evaluation.seconds
        images = session.clock.images
        self._rank(images, evaluation)
        if session.ranks.rank == 0:
            self._append(images, evaluation)
        values = {f"metric/{name}": value for name, value in evaluation.figures.items()}
        return values | {"time/metrics_share": self._share()}

    def _share(self) -> float:
        """Share of the wall time since it was opened."""
        return self._seconds / max(time.monotonic() - self._began, 1e-9)

    def _since_start(self) -> float:
        """Seconds since the process began, without those of measuring and of preparing it."""
        return time.monotonic() - BEGAN - self._prepared - self._seconds

    def account(self) -> str:
        """What measuring cost, in a line; empty where nothing was measured."""
        if not self._seconds:
            return ""
        return (
            f"metrics: {100 * self._share():.1f} % of the wall time "
            f"({self._prepared:.1f} s to prepare them not counted)"
        )

    @property
    def pending(self) -> dict[str, Any] | None:
        """What is to be noted with the checkpoint of this moment if it is the best one."""
        return self._pending

    def go_back(self, images: int) -> None:
        """Forget what came after so many images. Rank 0's work."""
        forget_after(self.folder / "metrics.jsonl", images)

    def close(self) -> None:
        """Let go of what the evaluator holds."""
        self._evaluator.close()

    def _rank(self, images: int, evaluation: Evaluation) -> None:
        """Compare with the best so far; a figure of another protocol does not count."""
        figures, protocol = evaluation.figures, evaluation.protocol.digest()
        metric, sign = next(((m, s) for m, s in RANKED if m in figures), (None, 0))
        self.improved, self._pending = False, None
        if metric is None or not math.isfinite(figures[metric]):
            return
        best = self._best
        known = best is not None and (best["metric"], best.get("protocol")) == (metric, protocol)
        if known and sign * figures[metric] <= sign * best["value"]:
            return
        self._best = {"images": images, "metric": metric, "value": figures[metric]}
        self._best["protocol"] = protocol
        self.improved, self._pending = True, self._best

    def _append(self, images: int, evaluation: Evaluation) -> None:
        entry = entry_of(images, evaluation, self._since_start())
        try:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:  # figures are not worth the run
            self._say(f"cannot write {self.folder / 'metrics.jsonl'} ({error}); training goes on")
        shown = ", ".join(f"{k} {v:.4g}" for k, v in evaluation.figures.items())
        best = " (the best so far)" if self.improved else ""
        self._say(f"metrics at {images:,} images{best}: {shown} ({evaluation.seconds:.1f} s)")


def entry_of(images: int, evaluation: Evaluation, since_start: float) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    return {
        "images": images,
        "figures": {k: v if math.isfinite(v) else None for k, v in evaluation.figures.items()},
        "protocol": evaluation.protocol.values(),
        "seconds": round(evaluation.seconds, 3),
        "since_start": round(since_start, 3),
    }
