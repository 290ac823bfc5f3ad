"""Has anything become slower? python -m bench.compare [RESULTS.json]

Compares each row's ratio to its baseline with the last accepted one on the same kind of device; of
the file, or else of the default benches, measured now. Beyond noise, a loss is named and the exit
code is 1. Noise is the spread of both ratios, at least a tenth (the row's `floor`) of the accepted
one. What cannot be compared is named, too.
"""

import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from bench.accepted import FOLDER, Results, accepted, last, read
from bench.side_by_side import Beside
from engine.verb import exit_code

ROOT = Path(__file__).parents[1]


class Slower(Exception):
    """Rows that lost, or benches that failed."""


@dataclass
class Comparison:
    """What became of the rows."""

    worse: list[str] = field(default_factory=list)
    better: list[str] = field(default_factory=list)
    same: int = 0
    apart: list[str] = field(default_factory=list)
    """Rows that could not be compared, and why."""


def noise(then: Beside, now: Beside) -> float:
    """How far two ratios may differ by chance."""
    return max(now.floor * then.ratio, math.hypot(then.spread or 0, now.spread or 0))


def compare(new: Results, past: Sequence[Results]) -> Comparison:
    """Each figure of `new` beside the newest accepted one of its kind of device."""
    found, known = Comparison(), last(past, new.kind)
    if not known:
        found.apart.append(f"all of it: no accepted result with ratios is from {new.kind}")
        return found
    for key, now in new.figures.items():
        name = " ".join(key)
        if key not in known:
            found.apart.append(f"{name}: no accepted result has this row")
            continue
        source, then = known.pop(key)
        if then.baseline != now.baseline:
            found.apart.append(f"{name}: its baseline was {then.baseline}, now {now.baseline}")
            continue
        if now.variant == now.baseline:
            continue
        lost, chance = then.ratio - now.ratio, noise(then, now)
        line = (
            f"{name}: {now.ratio:.2f}x {now.baseline}, {then.ratio:.2f}x in {source.name} "
            f"({source.where['commit']}, torch {source.where['torch']}); noise {chance:.2f}"
        )
        if lost < -chance:
            found.better.append(line)
        elif lost <= chance:
            found.same += 1
        else:  # so is a ratio that is no number
            found.worse.append(line)
    found.apart += [f"{' '.join(key)}: not measured now" for key in known]
    return found


def measure(path: Path) -> bool:
    """Run the default benches; whether all of them passed."""
    command = [sys.executable, "-m", "pytest", "bench/", "--benchmark-only"]
    return subprocess.run([*command, f"--benchmark-json={path}"], cwd=ROOT).returncode == 0


def report(found: Comparison) -> None:
    """Print it. Raises Slower."""
    for title, lines in (("worse", found.worse), ("better", found.better)):
        for line in lines:
            print(f"{title}: {line}")
    for line in found.apart:
        print(f"not compared: {line}")
    print(f"{found.same} within noise, {len(found.better)} better, {len(found.worse)} worse")
    if found.worse:
        rows = "; ".join(line.split(":")[0] for line in found.worse)
        raise Slower(f"slower than what was accepted: {rows}")


def main(arguments: list[str] | None = None, folder: Path = FOLDER) -> int:
    """The command line; exit code."""

    def act(results: Annotated[Path | None, tyro.conf.Positional] = None, /) -> None:
        if results:
            return report(compare(read(results), accepted(folder)))
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "results.json"
            whole = measure(path)
            if not path.exists() or not path.stat().st_size:
                raise Slower("the benches gave no results")
            report(compare(read(path), accepted(folder)))
        if not whole:
            raise Slower("some benches failed")
        return None

    return exit_code(
        lambda: tyro.cli(act, prog="python -m bench.compare", description=__doc__, args=arguments),
        (Slower,),
    )


if __name__ == "__main__":
    sys.exit(main())
