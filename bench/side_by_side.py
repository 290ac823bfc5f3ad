"""How is a figure of a bench told? Beside its baseline's, measured in the same run and in turns.

Every row's extra_info has `compared`: for each variant its baseline, unit, value, ratio and spread.
A ratio says how many times better than the baseline a variant is, above 1 being better whatever the
unit; it is the median of the rounds' ratios, and the spread is their interquartile range.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from engine.stats import synchronize


@dataclass(frozen=True)
class Beside:
    """A figure beside its baseline's."""

    baseline: str
    variant: str
    unit: str
    value: float
    ratio: float
    """How many times better than the baseline."""
    spread: float | None
    """Of the ratio; None where it was measured once."""
    floor: float = 0.1
    """A smaller part of the ratio than this is taken for noise, whatever the spread."""


@dataclass(frozen=True)
class Turns:
    """What each variant cost (seconds, bytes) in each round; the variants took turns."""

    baseline: str
    costs: dict[str, list[float]]

    def median(self, variant: str) -> float:
        """Its cost."""
        return statistics.median(self.costs[variant])

    def ratios(self, variant: str) -> list[float]:
        """Of each round."""
        both = zip(self.costs[self.baseline], self.costs[variant], strict=True)
        return [base / cost for base, cost in both]

    def ratio(self, variant: str) -> float:
        """How many times less it costs than the baseline."""
        return statistics.median(self.ratios(variant))

    def beside(self, variant: str, value: float, unit: str) -> Beside:
        """The variant's figure, told as `value`."""
        spread = interquartile(self.ratios(variant))
        return Beside(self.baseline, variant, unit, value, self.ratio(variant), spread)


def interquartile(values: Sequence[float]) -> float | None:
    """The range of the middle half of some values; None of a single one."""
    if len(values) < 2:
        return None
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, to the end of what it has queued."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def take_turns(
    baseline: str,
    variants: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[Callable[[], object]], float],
    warm_up: int = 1,
) -> Turns:
    """Call every variant in each round, so that whatever else the machine does falls on all.

    clock: the cost of one call. The first `warm_up` rounds do not count."""
    costs: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(warm_up + rounds):
        for name, run in variants.items():
            costs[name].append(clock(run))
    return Turns(baseline, {name: c[warm_up:] for name, c in costs.items()})


def note(benchmark, *figures: Beside) -> None:
    """Write figures into a row."""
    benchmark.extra_info["compared"] = [asdict(f) for f in figures]
