"""Rebuild the page of a run, or compare several.

python -m engine.report RUN_DIR                               rebuilds RUN_DIR/report.html
python -m engine.report RUN_A RUN_B [...] --out cmp.html      one page that compares them
"""

import argparse
import sys
from pathlib import Path

from engine.report.page import write, write_comparison
from engine.report.read import Unreadable, read_recipe


def check(run_dirs: list[Path], out: Path) -> None:
    """Raise ValueError for what is no run directory, for one named twice, and for a page that is a
    folder; Unreadable for a damaged recipe."""
    for folder in run_dirs:
        if not (folder / "recipe.json").is_file():
            raise ValueError(f"{folder} is not a run directory: it has no recipe.json")
    if len({folder.resolve() for folder in run_dirs}) < len(run_dirs):
        raise ValueError("the same run directory is named twice: name each once")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file in it")
    for folder in run_dirs:
        if problems := read_recipe(folder / "recipe.json")[1]:
            raise Unreadable(f"{folder}: {problems[0]}; put the run's own recipe.json back")


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code: 2 for a wrong command, 1 for one that fails."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path)
    parser.add_argument(
        "--out", type=Path, help="page to write (RUN_DIR/report.html; of several, comparison.html)"
    )
    command = parser.parse_args(arguments)
    run_dirs, alone = command.run_dirs, len(command.run_dirs) == 1
    out = command.out or (run_dirs[0] / "report.html" if alone else Path("comparison.html"))
    try:
        check(run_dirs, out)
        notes = write(run_dirs[0], out) if alone else write_comparison(run_dirs, out)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except Unreadable as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"error: {out} cannot be written: {error}\n")
        return 1
    for note in notes:
        sys.stderr.write(f"warning: {f'{run_dirs[0]}: ' if alone else ''}{note}\n")
    sys.stdout.write(f"{out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
