"""Which rows does a run without --all take? Those that are not marked `long`."""

from collections.abc import Iterable

import pytest

LEFT_OUT = "left out of the default run: --all takes it"
long = pytest.mark.long


def params(names: Iterable, brief: Iterable) -> list:
    """Parameters of a bench, those that are not among the brief ones marked."""
    brief = list(brief)
    return [pytest.param(name, marks=() if name in brief else long) for name in names]


def taken(names: Iterable[str], brief: Iterable[str], whole: bool) -> list[str]:
    """Those of some names that this run measures; `whole`: with --all."""
    brief = list(brief)
    return [name for name in names if whole or name in brief]
