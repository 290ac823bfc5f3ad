"""Write figures of benches into README: python -m bench.table RESULTS.json

Those of bench_step, bench_pipelines and bench_recipes. Each table stands between two marks and is
generated whole, with the machine that it is from; one of which the default run leaves rows out is
renewed by a run with --all.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from bench.accepted import read
from engine.verb import exit_code

README = Path(__file__).parents[1] / "README.md"
TITLES = {
    "tutorial": "`ImageFolder`, PIL, `DataLoader`",
    "torchvision": "`torchvision`",
    "dali": "`dali`, on the CPU",
    "ffcv-jpeg": "`ffcv`, `--data.beton jpeg`",
    "ffcv": "`ffcv`",
    "resident": "`resident`",
}
HEAD = ("| | first epoch | later epochs | ratio | memory | disk |", "|---|---|---|---|---|---|")


def facts_of(content: dict, bench: str) -> dict[str, dict]:
    """extra_info of a bench's rows, by parameter."""
    rows = (b for b in content["benchmarks"] if b["name"].split("[")[0] == bench)
    return {str(b["param"]): b["extra_info"] for b in rows}


def pipelines(content: dict, name: str) -> str:
    """The pipelines' table and the lines below it."""
    fed = facts_of(content, "bench_feeding")
    lines = [*HEAD]
    for key, title in TITLES.items():
        f = fed[key]
        lines.append(
            f"| {title} | {f['first_epoch_images_per_cpu_s']:,.0f} | {f['images_per_cpu_s']:,.0f} "
            f"| {f['ratio_to_tutorial']:.1f} | {f['memory_mib']:,.0f} MiB "
            f"| {f['disk_mib']:,.0f} MiB |"
        )
    ready = facts_of(content, "bench_preparation")["None"]
    share = ", ".join(
        f"{facts['share_of_synthetic']:.3f} with `{kind}`"
        for kind, facts in facts_of(content, "bench_training").items()
    )
    where = content["machine_info"]["saddle"]
    lines += [
        "",
        f"Images per CPU-second; {where['device'].strip()}, torch {where['torch']}, from "
        f"`bench/results/{name}`. Packing: {ready['images_per_s']:,.0f} images/s, "
        f"{ready['share_of_pure_decoding']:.2f} of what all cores decode. `dcgan_celeba` trained "
        f"on it keeps, of its images/s on data that costs nothing: {share}.",
    ]
    return "\n".join(lines)


RECIPES_HEAD = (
    "| recipe | sizes | plain | `--compile off` | ratio | compiled | ratio |",
    "|---|---|---|---|---|---|---|",
)


def _rate(images_per_s: float) -> str:
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.1f}"


def recipes(content: dict, name: str) -> str:
    """The recipes' table and the lines below it."""
    lines = [*RECIPES_HEAD]
    for key, f in facts_of(content, "bench_recipe").items():
        size = f"batch {f['batch']}"
        if f["widths_divided_by"] > 1:
            size += f", widths / {f['widths_divided_by']}"
        cells = [f"`{key}`", size, _rate(f["plain_images_per_s"])]
        for variant in ("eager", "compiled"):
            known = f"{variant}_ratio" in f
            cells.append(_rate(f[f"{variant}_images_per_s"]) if known else "")
            cells.append(f"{f[f'{variant}_ratio']:.2f}" if known else "")
        lines.append(f"| {' | '.join(cells)} |")
    (means,) = facts_of(content, "bench_mean").values()
    figures = {k: v for k, v in means.items() if isinstance(v, float)}  # not where it is from
    said = ", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in figures.items())
    where = content["machine_info"]["saddle"]
    lines += [
        "",
        f"Images/s; {where['device'].strip()}, torch {where['torch']}, from "
        f"`bench/results/{name}`. Ratios: {said}.",
    ]
    return "\n".join(lines)


STEPS = {"tutorial": "PyTorch tutorial", "eager": "Saddle, `--compile off`"}
STEPS |= {"compiled": "Saddle, compiled", "captured": "Saddle, `--graph on`"}
STEP_HEAD = ("| | images/s | ratio | peak tensor memory |", "|---|---|---|---|")


def steps(content: dict, name: str) -> str:
    """The table of DCGAN-64's step and the lines below it."""
    speed, memory = facts_of(content, "bench_iteration"), facts_of(content, "bench_peak_memory")
    lines = [*STEP_HEAD]
    for key, f in speed.items():
        peak = f"{memory[key]['peak_mib']:,.0f} MiB" if key in memory else ""
        lines.append(
            f"| {STEPS[key]} | {f['images_per_s']:,.0f} | {f['ratio_to_tutorial']:.2f} | {peak} |"
        )
    where = content["machine_info"]["saddle"]
    said = f"{where['device'].strip()} ({where['bf16']}), torch {where['torch']}, from "
    lines += ["", f"{said}`bench/results/{name}`."]
    if loop := facts_of(content, "bench_loop_overhead"):
        (facts,) = loop.values()
        lines[-1] += f" {facts['share_outside_the_step']:.1%} of the loop's time is spent outside "
        lines[-1] += "the step."
    return "\n".join(lines)


TABLES = {
    "bench_iteration": ("step", steps, True),
    "bench_feeding": ("pipelines", pipelines, False),
    "bench_recipe": ("recipes", recipes, False),
}
"""By a bench of the results that it is made from: what the marks call it, what makes it, and
whether the default run has all of its rows."""


def between(begin: str, end: str) -> list[str]:
    """The lines that stand in README between two marks."""
    return README.read_text().split(begin)[1].split(end)[0].strip().splitlines()


def write_between(begin: str, end: str, made: str) -> None:
    """Replace what stands in README between two marks."""
    before, rest = README.read_text().split(begin)
    README.write_text(f"{before}{begin}\n{made}\n{end}{rest.split(end)[1]}")


def renew(results: Annotated[Path, tyro.conf.Positional], /) -> None:
    """Renew the tables that the results are for. Raises ValueError for what are none."""
    read(results)
    content = json.loads(results.read_text())
    whole = content["machine_info"]["saddle"].get("all", True)  # before there was --all, it was
    for bench, (title, make, brief) in TABLES.items():
        if not facts_of(content, bench):
            continue
        if not (whole or brief):
            print(f"the table of {title} stays as it is: it needs the rows of --all")
        else:
            begin = f"<!-- {title}: generated by bench/table.py -->"
            write_between(begin, f"<!-- end of {title} -->", make(content, results.name))


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code."""

    def act() -> None:
        tyro.cli(renew, prog="python -m bench.table", description=__doc__, args=arguments)

    return exit_code(act, ())


if __name__ == "__main__":
    sys.exit(main())
