"""Where do a few iterations' wall time and their operations' time go? Read from a trace.

Work is what the device computes: on a GPU its kernels, on a CPU the operations themselves. Every
moment is one of: work; communication that no work hides; waiting for data; a gap in the step, in
which the host has not yet launched what comes next; the host's own business between steps.
Pictures, measuring and checkpoints, which are rare, are left out.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType

from engine.profiling.intervals import Spans, common, holds, length, union, without
from engine.profiling.tally import Cost, Key
from engine.watchdog import DATA, OUTPUTS, SAVING, STATISTICS

PREFIX = "saddle: "
"""Of the ranges that a trace has for what a clock's `doing` was."""
END = "end"
COMPILED = "## Call CompiledFxGraph"
NOT_WORK = ("autograd::", "torch::", "profiler::", "c10d::")

Event = Any  # torch.autograd.profiler_util.FunctionEvent


@dataclass(frozen=True)
class Shares:
    """Of the wall time, together 1."""

    compute: float
    communication: float
    gaps: float
    data: float
    host: float


@dataclass(frozen=True)
class Row:
    """An operation of one shape, or a kernel."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    calls: float
    """Per iteration."""
    seconds: float
    """Per iteration."""
    cost: Cost | None
    """Of one call, if it is known."""


@dataclass(frozen=True)
class Found:
    """What a trace tells."""

    iterations: int
    seconds: float
    """Wall time of an iteration."""
    shares: Shares
    rows: list[Row]
    """Longest first."""


def read(events: list[Event], costs: dict[Key, Cost], gpu: bool) -> Found:
    """What the events (microseconds) of whole iterations tell."""
    phases = _phases(events)
    rare = union(phases.pop(OUTPUTS, []) + phases.pop(SAVING, []) + phases.pop(END, []))
    iterations = len(phases[DATA])
    data, between = union(phases.pop(DATA)), union(phases.pop(STATISTICS, []))
    step = union([span for spans in phases.values() for span in spans])
    whole = without(union([*data, *between, *step]), rare)
    shares = _shares(whole, data, step, _work(events, gpu), union(_talk(events)), gpu)
    rows = _rows(events, costs, gpu, whole, iterations)
    return Found(iterations, length(whole) / 1e6 / iterations, shares, rows)


def _phases(events: list[Event]) -> dict[str, Spans]:
    found = defaultdict(list)
    for event in events:
        if event.name.startswith(PREFIX) and event.device_type == DeviceType.CPU:
            found[event.name.removeprefix(PREFIX)].append(_span(event))
    return found


def _shares(whole: Spans, data: Spans, step: Spans, work: Spans, talk: Spans, gpu: bool) -> Shares:
    if not gpu:  # the host itself works
        work, talk = without(work, data), without(talk, data)
    work = common(work, whole)
    talk = without(common(talk, whole), work)
    idle = without(without(whole, work), talk)
    waiting, gaps = common(idle, data), common(idle, step)
    parts = [length(part) for part in (work, talk, gaps, waiting)]
    total = length(whole)
    return Shares(*(part / total for part in parts), (total - sum(parts)) / total)


def _span(event: Event) -> tuple[float, float]:
    return event.time_range.start, event.time_range.end


def _work(events: list[Event], gpu: bool) -> Spans:
    if gpu:
        return union([_span(e) for e in events if _kernel(e) and not _talks(e)])
    return union([_span(e) for e in events if _operation(e)])


def _talk(events: list[Event]) -> Spans:
    return [_span(e) for e in events if _talks(e)]


def _talks(event: Event) -> bool:
    """Whether ranks exchange something: a kernel of NCCL, or gloo's own thread at work."""
    return event.name.startswith("gloo:") or ("nccl" in event.name and _kernel(event))


def _kernel(event: Event) -> bool:
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation


def _operation(event: Event) -> bool:
    """Whether the host computes: an operation, or a compiled graph."""
    if event.is_user_annotation or event.device_type != DeviceType.CPU:
        return False
    named = "::" in event.name and not event.name.startswith(NOT_WORK)
    return named or event.name.startswith(COMPILED)


def _rows(
    events: list[Event], costs: dict[Key, Cost], gpu: bool, whole: Spans, iterations: int
) -> list[Row]:
    """Each operation of known cost with all below it; what is left by its own name."""
    calls, seconds = defaultdict(int), defaultdict(float)
    for event in events:
        if event.device_type != DeviceType.CPU or not holds(whole, event.time_range.start):
            continue
        key = _key(event)
        if any(_key(parent) in costs for parent in _parents(event)):
            continue
        if key in costs:
            taken = event.device_time_total if gpu else event.cpu_time_total
        elif gpu:
            key, taken = _left(event)
        elif event.name.startswith(COMPILED):
            key = ("fused loops of compiled functions", ())
            known = [child for child in _below(event) if _key(child) in costs]
            taken = event.cpu_time_total - sum(child.cpu_time_total for child in known)
        else:
            continue
        if taken:
            calls[key] += 1
            seconds[key] += taken / 1e6
    rows = [
        Row(*key, calls[key] / iterations, taken / iterations, costs.get(key))
        for key, taken in seconds.items()
    ]
    return sorted(rows, key=lambda row: -row.seconds)


def _left(event: Event) -> tuple[Key, float]:
    """The kernels that an operation of unknown cost launched by itself."""
    names = sorted({kernel.name for kernel in event.kernels})
    return (", ".join(names)[:80], ()), sum(kernel.duration for kernel in event.kernels)


def _key(event: Event) -> Key:
    return event.name, tuple(_shapes(event.input_shapes or []))


def _shapes(shapes: Iterable[Any]) -> Iterable[tuple[int, ...]]:
    """Of all tensors with axes, also of those in lists."""
    for shape in shapes:
        if shape and isinstance(shape[0], list | tuple):
            yield from _shapes(shape)
        elif shape:
            yield tuple(shape)


def _parents(event: Event) -> Iterable[Event]:
    while event := event.cpu_parent:
        yield event


def _below(event: Event) -> Iterable[Event]:
    for child in event.cpu_children:
        yield child
        yield from _below(child)
