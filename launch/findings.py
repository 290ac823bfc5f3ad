"""What checks find, on one rank and on all: ok, warn or fail, with a remedy."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Thread

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.recipe import Command
from engine.settings import Recipe
from pipelines.settings import Data

OK, WARN, FAIL = STATUSES = ("ok", "warn", "fail")
COLOURS = {OK: "green", WARN: "yellow", FAIL: "red"}


@dataclass(frozen=True)
class Finding:
    """One line. same: what all ranks must agree on, "" for nothing; unequal: how bad if not."""

    check: str
    status: str
    text: str
    remedy: str = ""
    same: str = ""
    unequal: str = FAIL


@dataclass(frozen=True)
class Case:
    """What is examined: the machine alone, or with the command that shall run on it."""

    command: Command | None
    device: torch.device
    runs: Path = Path("runs")
    data: Data = field(default_factory=Data)
    ranks_here: int = 1  # of this host

    @property
    def recipe(self) -> Recipe | None:
        """The recipe, if one is named."""
        return self.command.recipe if self.command else None


@dataclass(frozen=True)
class Check:
    """A question with a time limit; it knows nothing of the others."""

    name: str
    find: Callable[[Case], list[Finding]]
    limit_s: float = 30.0
    slow: str = "see whether a network file system hangs"


def attempt(check: Check, case: Case) -> list[Finding]:
    """The check's findings; one failure if it goes wrong or does not end in time."""
    found: list[Finding] = []

    def work() -> None:
        try:
            found.extend(check.find(case))
        except ValueError as error:
            found.append(Finding(check.name, FAIL, str(error), "correct the setting"))
        except Exception as error:  # whatever it is, the other checks shall be seen
            line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            found.append(Finding(check.name, FAIL, line, "the check itself went wrong here"))

    thread = Thread(target=work, daemon=True)  # one that hangs is left behind
    thread.start()
    thread.join(check.limit_s)
    if thread.is_alive():
        text = f"no answer within {check.limit_s:g} s"
        return [Finding(check.name, FAIL, text, check.slow)]
    return found


def merge(reports: list[tuple[str, list[Finding]]]) -> list[Finding]:
    """One line for each check from (place, findings) of every rank, naming the ranks that deviate
    from most."""
    if len(reports) == 1:
        return reports[0][1]
    names = dict.fromkeys(f.check for _, findings in reports for f in findings)
    return [_merged(name, reports) for name in names]


def _merged(name: str, reports: list[tuple[str, list[Finding]]]) -> Finding:
    by_place = {place: f for place, findings in reports for f in findings if f.check == name}
    groups: dict[tuple[str, str], dict[str, Finding]] = {}
    for place, finding in by_place.items():
        groups.setdefault((finding.status, finding.same), {})[place] = finding
    most = max(groups.values(), key=len)  # the first, rank 0's, among equals
    first = next(iter(most.values()))
    others = [group for group in groups.values() if group is not most]
    if not others:
        return first
    worst = max(by_place.values(), key=lambda f: STATUSES.index(f.status))
    lines = [f"{_places(group)}: {next(iter(group.values())).text}" for group in others]
    merged = replace(worst, text="\n".join([first.text, *lines]), same="")
    if len({f.same for f in by_place.values() if f.status == OK}) > 1:
        status = max(worst.status, first.unequal, key=STATUSES.index)
        return replace(merged, status=status, remedy="make it the same on every rank")
    return merged


def _places(places: dict[str, Finding], shown: int = 4) -> str:
    names = list(places)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def show(findings: list[Finding], console: Console) -> None:
    """Print the table and how many warn and fail."""
    table = Table("check", "", "found", "remedy", title="doctor", title_justify="left")
    for f in findings:
        status = Text(f.status, style=COLOURS[f.status])
        table.add_row(f.check, status, Text(f.text), Text("" if f.status == OK else f.remedy))
    console.print(table)
    counts = [f"{sum(f.status == s for f in findings)} {s}" for s in STATUSES]
    console.print(", ".join(counts))


def write_json(findings: list[Finding], path: Path) -> None:
    """The same as a file. Raises OSError."""
    lines = [asdict(replace(f, remedy="" if f.status == OK else f.remedy)) for f in findings]
    for line in lines:
        del line["same"], line["unequal"]
    content = {"failed": sum(f.status == FAIL for f in findings), "findings": lines}
    path.write_text(json.dumps(content, indent=1) + "\n")
