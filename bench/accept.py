"""Accept results: python -m bench.accept RESULTS.json

Writes what matters of a file that `pytest bench/ --benchmark-only --benchmark-json FILE` wrote to
bench/results/DATE_DEVICE.json (device, versions, commit and each row's figures; nothing else of the
machine), and bench/RESULTS.md anew from all accepted files: without a file, only that.
"""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from bench.accepted import FOLDER, Results, accepted, last, read
from bench.side_by_side import Beside
from engine.verb import exit_code

TABLE = (
    "| row | variant | figure | baseline | ratio | spread | results |",
    "|---|---|---|---|---|---|---|",
)
INTRODUCTION = """# Results

Made by `python -m bench.accept` from the accepted files in `bench/results`: the newest figure of
each row. A ratio says how many times better than its baseline, measured in the same run, a variant
is (of memory and of seconds, less is better); the spread is the ratio's interquartile range over
the rounds.
"""


def slim(content: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run's results."""
    benches = content["benchmarks"]
    return {
        "machine_info": {"saddle": content["machine_info"]["saddle"]},
        "benchmarks": [{k: b.get(k) for k in ("name", "param", "extra_info")} for b in benches],
        "datetime": content["datetime"],
    }


def file_name(results: Results, folder: Path) -> Path:
    """DATE_DEVICE.json, with a number where that is there."""
    device = re.sub(r"\((r|tm)\)|\bprocessor\b", "", results.where["device"].lower())
    stem = f"{results.when[:10]}_{'-'.join(re.findall('[a-z0-9]+', device))}"
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path


def accept(path: Path, folder: Path) -> Path:
    """Keep a run's results; where. Raises ValueError for those that cannot be."""
    results = read(path)
    if not results.figures:
        raise ValueError(f"{path} has no row with a baseline: nothing to accept")
    commit = results.where["commit"]
    if not commit or commit.endswith("+"):
        raise ValueError(
            f"{path} was measured on {commit or 'no commit'}, source that nobody can check out: "
            f"commit the changes and measure again"
        )
    target = file_name(results, folder)
    target.write_text(json.dumps(slim(json.loads(path.read_text())), indent=1) + "\n")
    return target


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def line(row: str, results: Results, figure: Beside) -> str:
    """Of the table."""
    spread = "" if figure.spread is None else f"{figure.spread:.2f}"
    told = f"{number(figure.value)} {figure.unit}"
    cells = [f"`{row}`", figure.variant, told, figure.baseline, f"{figure.ratio:.2f}", spread]
    return f"| {' | '.join([*cells, results.name])} |"


def page(past: list[Results]) -> str:
    """RESULTS.md."""
    parts, told = [INTRODUCTION], [r for r in past if r.figures]
    for kind in dict.fromkeys(r.kind for r in reversed(told)):
        newest = last(told, kind)
        lines = [line(row, *found) for (row, _), found in newest.items()]
        files = {found[0].name: found[0].where for found in newest.values()}
        sources = [
            f"- `bench/results/{name}`: commit {where['commit']}, torch {where['torch']}, "
            f"Python {where['python']}"
            for name, where in files.items()
        ]
        parts.append("\n".join([f"## {kind}\n", *TABLE, *lines, "", *sources, ""]))
    if before := [f"- `bench/results/{r.name}`: {r.kind}" for r in past if not r.figures]:
        parts.append("\n".join(["## From before rows carried their baseline\n", *before, ""]))
    return "\n".join(parts)


def main(arguments: list[str] | None = None, folder: Path = FOLDER) -> int:
    """The command line; exit code."""

    def act(results: Annotated[Path | None, tyro.conf.Positional] = None, /) -> None:
        if results:
            print(f"wrote {accept(results, folder)}")
        (folder.parent / "RESULTS.md").write_text(page(accepted(folder)))
        print(f"wrote {folder.parent / 'RESULTS.md'}")

    return exit_code(
        lambda: tyro.cli(act, prog="python -m bench.accept", description=__doc__, args=arguments),
        (OSError,),
    )


if __name__ == "__main__":
    sys.exit(main())
