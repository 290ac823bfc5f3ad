"""Which way of computing is the faster one here? Measured before a run begins, where its length
repays it, and kept in RUN/probe.json: the same run goes on in the same way.

What is measured is an iteration of each kind, on a made-up batch, without an update or a word to
another rank: every way of it computes the same, up to rounding. The ways take turns.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine import session
from engine.compile import Compiler, seconds
from engine.convolutions import Call, Products, calls
from engine.convolutions import products as by_layer
from engine.describe import example_batch
from engine.precision import Precision
from engine.session import Session
from engine.settings import Recipe
from engine.stats import synchronize
from engine.world import Ranks
from kernels import dispatch
from pipelines.batch import Batch

FILE = "probe.json"
EAGER = Compiler(False, "probe")
ROUNDS = 3
WORTHWHILE_S = 600.0  # what a run takes at least
COMPILE = "compile "  # begins the name of each choice that is one function
TOGETHER = "compiled functions"
MAP = "map"  # begins the name of each choice that is one map of a convolution
PATIENCE_S = 60.0  # for one choice, at most
LEAST_S = 5.0
SHARE = 0.01  # of a run's time, for one choice
GAIN = 1.1  # what a way must be faster than the usual one: noise is not to decide
WAYS = {
    "memory_format": ("channels_last", "contiguous"),
    "convolutions": ("library", "matmul"),
    "kernels": ("auto", "fused"),
}
"""Of settings that may be left to auto, the usual one first."""
PARTS = "accumulate"


@dataclass(frozen=True)
class Choice:
    """One thing that was measured. ms: an iteration of each kind, by way, the usual one first."""

    what: str
    ms: dict[str, float]
    chosen: str

    @property
    def why(self) -> str:
        """The figures."""
        return "measured: " + ", ".join(f"{way} {ms:,.0f} ms" for way, ms in self.ms.items())

    @property
    def said(self) -> str:
        """In words, with the figures."""
        return f"{self.chosen} ({self.why})"


def choice(what: str, ms: dict[str, float], gain: float = GAIN) -> Choice:
    """The usual way, unless another is so many times faster."""
    usual, fastest = next(iter(ms)), min(ms, key=lambda way: ms[way])
    return Choice(what, ms, fastest if ms[usual] > gain * ms[fastest] else usual)


def in_turns(
    ways: dict[str, Callable[[], object]], ranks: Ranks, patience: float = PATIENCE_S
) -> dict[str, float]:
    """Milliseconds of each way: the median of rounds, after one that does not count. All of these
    ranks call it, and make as many rounds. patience: seconds after which no more are begun."""
    device, start = ranks.device, time.monotonic()
    found: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(1 + ROUNDS):
        if round_ > 1 and ranks.share(time.monotonic() - start > patience):
            break
        for way, run in ways.items():
            synchronize(device)
            began = time.monotonic()
            run()
            synchronize(device)
            found[way].append((time.monotonic() - began) * 1000)
    return {way: round(statistics.median(ms[1:]), 3) for way, ms in found.items()}


def settings(
    recipe: Recipe,
    ranks: Ranks,
    precision: Precision,
    classes: int,
    flops: float,
    say: Callable[[str], None],
) -> list[Choice]:
    """What the recipe leaves to auto, measured by this rank alone where a run of so many FLOPs is
    worth it and a network is whole on each rank. Raises ValueError for sizes that do not fit."""
    whole = ranks.world_size == 1 or recipe.parallel == "ddp"
    if recipe.probe == "off" or not whole or seconds(ranks.device, flops) < WORTHWHILE_S:
        return []
    say("probe: measuring what is left to auto (--probe off takes the usual)")
    patience = min(PATIENCE_S, max(LEAST_S, SHARE * seconds(ranks.device, flops)))
    found: list[Choice] = []
    left = [setting for setting in WAYS if getattr(recipe, setting) == "auto"]
    left += [PARTS] if recipe.batch_per_rank == "auto" else []
    for setting in left:
        try:
            settled = applied(recipe, found)
            found += _setting(setting, settled, ranks, precision, classes, patience)
        except torch.OutOfMemoryError:
            say(f"probe: no memory for two networks; the usual {setting.replace('_', ' ')}")
    return found


def _ways(setting: str, alone: Recipe) -> dict[str, Any]:
    """Its values by name, the usual one first; of micro-batches as many as fit the memory, and two
    and four times as many, which may fit a cache."""
    if setting != PARTS:
        return {way: way for way in WAYS[setting]}
    counts = [alone.accumulate * times for times in (1, 2, 4)]
    return {str(count): count for count in counts if alone.data.batch % count == 0}


def _setting(
    setting: str,
    recipe: Recipe,
    ranks: Ranks,
    precision: Precision,
    classes: int,
    patience: float,
) -> list[Choice]:
    made = partial(_session, ranks=_lone(ranks), precision=precision, classes=classes)
    alone, maps = _alone(recipe, ranks), []
    if setting == "convolutions":
        maps = _maps(made(alone), patience) if ranks.device.type == "cpu" else []
        if not products(maps):
            return maps
    lives = {
        way: made(replace(alone, **{setting: value}), products=products(maps))
        for way, value in _ways(setting, alone).items()
    }
    if not _differ(setting, lives, ranks.device):
        return []
    ways = {way: _rehearsing(live, _noise(live)) for way, live in lives.items()}
    # each of the maps was seen to be faster by more than noise: together they need not be
    gain = 1.0 if maps else GAIN
    return [*maps, choice(setting, in_turns(ways, _lone(ranks), patience), gain)]


def _maps(live: Session, patience: float) -> list[Choice]:
    """For each map of each convolution, whether it is faster as a matrix product; those that are
    called alike are measured once, the largest first. What patience does not last for is not in
    the table: it stays the library's."""
    found: list[Choice] = []
    figures: dict[Call, dict[str, dict[str, float]]] = {}
    called, start = calls(live, _noise(live)), time.monotonic()
    for place, call in sorted(called.items(), key=lambda item: item[1].flops, reverse=True):
        if call not in figures:
            if time.monotonic() - start > patience:
                break
            ways = call.ways(live.ranks.device)
            figures[call] = {m: in_turns(both, live.ranks, 0.0) for m, both in ways.items()}
        found += [choice(" ".join((MAP, *place, m)), ms) for m, ms in figures[call].items()]
    return found


def products(choices: list[Choice]) -> Products | None:
    """The maps that were found faster as matrix products; None where none was measured."""
    maps = [c for c in choices if c.what.startswith(f"{MAP} ")]
    faster = [tuple(c.what.split()[1:]) for c in maps if c.chosen == "matmul"]
    return by_layer(faster) if maps else None


def applied(recipe: Recipe, found: list[Choice]) -> Recipe:
    """The recipe with what was found in place of auto."""
    settled = {c.what: c.chosen for c in found if getattr(recipe, c.what, "") == "auto"}
    parts = next((int(c.chosen) for c in found if c.what == PARTS), recipe.accumulate)
    return replace(recipe, accumulate=parts, **settled)


def _alone(recipe: Recipe, ranks: Ranks) -> Recipe:
    """One rank's share of it."""
    data = replace(recipe.data, batch=recipe.data.batch // ranks.world_size)
    return replace(recipe, data=data, sync_bn="off")


def _session(recipe: Recipe, ranks: Ranks, precision: Precision, **given: Any) -> Session:
    return session.start(recipe, ranks, precision, EAGER, recipe.data.batch, **given)


def _lone(ranks: Ranks) -> Ranks:
    """This rank, as if there were no other."""
    return Ranks(0, ranks.local_rank, 1, ranks.device)


def _differ(setting: str, lives: dict[str, Session], device: torch.device) -> bool:
    """Whether there is anything that the setting changes."""
    if setting != "memory_format":
        return len(lives) > 1 and (device.type == "cuda" or setting != "kernels")
    players = next(iter(lives.values())).players.values()
    weights = [p for player in players for p in player.network.parameters() if p.ndim == 4]
    return any(
        p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in weights
    )


def _noise(live: Session) -> Batch:
    """A batch that shows noise."""
    batch = example_batch(live.recipe, live.clock.batch, live.clock.device)
    noise = torch.Generator().manual_seed(0)
    for images_NCHW in (batch.images_NCHW, batch.pair_NCHW):
        if images_NCHW is not None:
            images_NCHW.copy_(torch.rand(images_NCHW.shape, generator=noise) * 2 - 1)
    return batch


def _rehearsing(live: Session, batch: Batch) -> Callable[[], None]:
    def run() -> None:
        with dispatch.using(live.recipe.kernels), live.rehearsing():
            live.rehearse(batch)

    return run


def compilation(live: Session, compiler: Compiler, batch: Batch) -> list[Choice]:
    """For each function that was compiled, whether it is faster so, the others being compiled; then
    whether what was chosen is faster than all of them as they are written. What is not compiled
    runs eager from here on. All ranks measure, rank 0's figures count."""

    def with_eager(names: set[str]) -> Callable[[], None]:
        def run() -> None:
            compiler.kept_eager = names
            _rehearsing(live, batch)()

        return run

    def measured(ways: dict[str, Callable[[], None]]) -> dict[str, float]:
        return live.ranks.share(in_turns(ways, live.ranks))

    names = set(compiler.units.values())
    ms = measured({"": with_eager(set()), **{n: with_eager({n}) for n in sorted(names)}})
    pairs = {n: {"compiled": ms[""], "eager": ms[n]} for n in sorted(names)}
    found = [choice(f"{COMPILE}{n}", both) for n, both in pairs.items()]
    if (chosen := kept_eager(found)) != names:
        both = {"compiled": with_eager(chosen), "eager": with_eager(names)}
        found.append(choice(TOGETHER, measured(both), gain=1.0))
    compiler.kept_eager = kept_eager(found)
    return found


def kept_eager(choices: list[Choice]) -> set[str]:
    """Names of the functions that are faster so."""
    functions = [c for c in choices if c.what.startswith(COMPILE)]
    all_ = any(c.what == TOGETHER and c.chosen == "eager" for c in choices)
    return {c.what.removeprefix(COMPILE) for c in functions if all_ or c.chosen == "eager"}


def write(folder: Path, choices: list[Choice]) -> None:
    """RUN/probe.json, whole or not at all."""
    scratch = folder / f".{FILE}"
    scratch.write_text(json.dumps([asdict(c) for c in choices], indent=1))
    os.replace(scratch, folder / FILE)


def read(folder: Path) -> list[Choice]:
    """What was measured when the run began; nothing where nothing was. Raises ValueError if the
    file is damaged."""
    try:
        return [Choice(**entry) for entry in json.loads((folder / FILE).read_text())]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError):
        raise ValueError(f"{folder / FILE} is damaged") from None
