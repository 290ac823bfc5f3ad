"""Statistics: summed on the device, read once per logging tick, written to stats.jsonl, TensorBoard
and the trackers of `--track`. The only place of the loop where values come to the host."""

import json
import logging
import math
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.algorithm import Values
from engine.track import Trackers
from engine.world import Ranks


class Stats:
    """Running means of what a step reports."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Values) -> None:
        """Take in one iteration's values (0-d device tensors); no synchronisation. Iterations may
        report different ones: a lazy penalty is there only when it was computed."""
        self.count(self.sum(values))

    def sum(self, values: Values) -> list[str]:
        """The device's part of `add`, which a graph may hold; the names for `count`."""
        current = {name: v.detach().float() for name, v in values.items()}
        for name in current.keys() - self._sums.keys():
            self._sums[name] = torch.zeros_like(current[name])
        torch._foreach_add_([self._sums[name] for name in current], list(current.values()))
        return list(current)

    def count(self, names: list[str]) -> None:
        """The host's part of `add`."""
        for name in names:
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self, extra: Values | None = None) -> dict[str, float]:
        """Means over iterations and ranks since the last reading, and `extra` (means over ranks);
        synchronises once."""
        if not self._counts:
            return {}
        means = {name: self._sums[name] / count for name, count in self._counts.items()}
        means |= {name: v.detach().float() for name, v in (extra or {}).items()}
        values = self.ranks.mean(torch.stack(list(means.values()))).tolist()
        for total in self._sums.values():
            total.zero_()
        self._counts.clear()
        return dict(zip(means, values, strict=True))


TRACKED = ("warning", "nan", "rollback")  # events that trackers hear of


class Record:
    """stats.jsonl and TensorBoard events of a run, written by rank 0, and what trackers are told;
    `trackers` are closed with it."""

    def __init__(
        self, folder: Path, images: int, batch: int, trackers: Trackers | None = None
    ) -> None:
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        self.folder, self.path, self.batch = folder, folder / "stats.jsonl", batch
        self.trackers = trackers
        self._go_on_from(images)

    def _go_on_from(self, images: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.seconds = forget_after(self.path, images)
        self._began = time.monotonic() - self.seconds
        self.board = SummaryWriter(self.folder / "tensorboard", purge_step=images + 1)

    def go_back(self, images: int) -> None:
        """Forget what came after so many images; trackers are told anew."""
        self.board.close()
        self._go_on_from(images)

    def values(self, images: int, values: dict[str, float]) -> None:
        """Append one tick's values."""
        clean = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._append({"images": images, "step": images // self.batch, "values": clean})
        for name, value in values.items():
            self.board.add_scalar(name, value, images)
        if self.trackers:
            self.trackers.values(images, values)

    def picture(self, images: int, path: Path) -> None:
        """Show trackers a sample grid that was written."""
        if self.trackers:
            self.trackers.picture(images, path)

    def event(self, images: int, event: str, text: str) -> None:
        """Append something that happened: start, resume, first step, warning, nan, rollback,
        finish."""
        self._append({"images": images, "event": event, "text": text})
        if self.trackers and event in TRACKED:
            self.trackers.event(images, event)

    def _append(self, entry: dict[str, Any]) -> None:
        entry["seconds"] = round(time.monotonic() - self._began, 3)
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        """Write out what TensorBoard and trackers hold back."""
        self.board.close()
        if self.trackers:
            self.trackers.close()


def forget_after(path: Path, images: int) -> float:
    """Drop entries past the place from which a run goes on, and a torn last line; gives the
    seconds trained until there."""
    if not path.exists():
        return 0.0
    kept, seconds = [], 0.0
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["images"] <= images:
            kept.append(line)
            seconds = max(seconds, entry.get("seconds", 0.0))
    scratch = path.with_name(f".{path.name}")
    scratch.write_text("".join(f"{line}\n" for line in kept))
    os.replace(scratch, path)
    return seconds


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
