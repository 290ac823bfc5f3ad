"""What has been measured before? The accepted results in bench/results, and their figures."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.side_by_side import Beside

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Results:
    """The figures of one run of benches, by row and variant."""

    name: str
    """Of their file."""
    when: str
    where: dict[str, str]
    """Device, versions and commit."""
    figures: dict[tuple[str, str], Beside]

    @property
    def kind(self) -> str:
        """Which kind of device it was."""
        return f"{self.where['device']}, {self.where['bf16']}"


def read(path: Path) -> Results:
    """The results in a file that pytest-benchmark or bench.accept wrote. Raises ValueError."""
    try:
        content = json.loads(path.read_text())
        where, when = content["machine_info"]["saddle"], content["datetime"]
        missing = {"device", "bf16", "torch", "commit"} - where.keys()
        if missing:
            raise KeyError(min(missing))
        found = {
            (bench["name"], figure["variant"]): Beside(**figure)
            for bench in content["benchmarks"]
            for figure in bench["extra_info"].get("compared", ())
        }
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no results of benches ({error!r}): "
            f"pytest bench/ --benchmark-only --benchmark-json FILE writes them"
        ) from None
    return Results(path.name, when, where, found)


def accepted(folder: Path = FOLDER) -> list[Results]:
    """All accepted results, the oldest first."""
    return sorted((read(path) for path in folder.glob("*.json")), key=lambda r: r.when)


def last(past: Iterable[Results], kind: str) -> dict[tuple[str, str], tuple[Results, Beside]]:
    """The newest accepted figure of each row and variant on a kind of device."""
    found = {}
    for results in past:
        if results.kind == kind:
            found |= {key: (results, figure) for key, figure in results.figures.items()}
    return found
