"""How a recipe would scale to many GPUs, predicted: python -m launch.scaling [RECIPE ...]

    python -m launch.scaling dcgan_celeba --gpus 8 64 1024 --plot scaling.png

Weak scaling: every GPU has the recipe's own batch. Strong: the recipe's batch is divided. What is
computed and reduced is counted (launch/volume.py), links are H100 nodes (launch/links.py), and a
bucket of gradients is reduced as soon as the backward pass has made its last one. Assumed: data
costs nothing, all GPUs are equally fast, and reductions do not slow computation beside them.
"""

import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from engine import recipe as recipes
from engine.sharing import choose_sync_bn
from engine.whole import check_place, write_whole
from launch.links import H100, Cluster, all_gather, all_reduce
from launch.volume import Update, Work, trace

PEAK = 989.4e12  # bf16 FLOP/s without sparsity: NVIDIA H100 SXM datasheet
KERNEL = 3e-6  # assumed: no kernel of a captured graph takes less, launch included
FUSED = 2  # assumed: kernels per convolution or product, itself and what is fused between


@dataclass(frozen=True)
class Question:
    """What to predict."""

    recipes: tyro.conf.Positional[tuple[str, ...]] = ()
    """Recipes; none takes all."""
    gpus: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    """Numbers of GPUs, eight in a node."""
    share: float = 0.1
    """Share of the GPU's peak that computation reaches: an assumption. Large tuned models reach 0.3
    and more, small convolutions less: NVIDIA's ResNet-50 of MLPerf Training 3.0 (entry 3.0-2053,
    13.5 min on 8 GPUs) about 0.17 if it took 35 epochs."""
    images_per_s: float | None = None
    """Speed of one GPU at the recipe's batch, measured; in place of --share, for one recipe."""
    bucket_mb: float = 25.0
    """Gradients that DDP reduces at once, MiB."""
    sync_bn: Literal["recipe", "on", "off"] = "recipe"
    """BatchNorm synchronised or not; recipe: as the recipe would on so many ranks."""
    plot: Path | None = None
    """Write the curves as an image."""
    json: Path | None = None
    """Write all figures."""


@dataclass(frozen=True)
class Prediction:
    """One iteration on so many GPUs; `batch` images on each, efficiency against one GPU with the
    same images (weak) or all of them (strong)."""

    recipe: str
    scaling: str
    gpus: int
    batch: int
    compute_s: float
    hidden_s: float
    exposed_s: float
    images_per_s: float
    efficiency: float

    @property
    def exposed_share(self) -> float:
        """Part of the iteration in which only reductions run."""
        return self.exposed_s / (self.compute_s + self.exposed_s)


def compute_seconds(work: Work, batch: int, flops_per_s: float) -> float:
    """Computation of an iteration on one GPU; small batches meet the time of kernels as such."""
    return max(batch * work.flops_per_image / flops_per_s, work.products * FUSED * KERNEL)


def reduce_seconds(
    update: Update, cluster: Cluster, gpus: int, pace: float, cap: int
) -> tuple[float, float]:
    """(seconds that all of an update's reductions take, those after its backward pass), at `pace`
    seconds per FLOP of each image."""
    total = end = 0.0
    for bucket in update.buckets(cap):
        seconds = all_reduce(cluster, bucket.size, gpus)
        total += seconds
        end = max(end, bucket.ready * pace) + seconds  # one after the other
    exposed = max(0.0, min(end - update.backward * pace, total))
    return total, exposed if cluster.aside else total


def communication(
    work: Work, cluster: Cluster, gpus: int, compute_s: float, cap: int, images: int = 0
) -> tuple[float, float]:
    """(hidden, exposed) seconds of the mean iteration on so many images for each GPU, computing
    `compute_s` seconds. Nothing runs beside the moments of BatchNorm; the control flag travels on
    the host while the next iteration runs."""
    if gpus == 1:
        return 0.0, 0.0
    pace = compute_s / work.flops_per_image
    pairs = [reduce_seconds(u, cluster, gpus, pace, cap) for u in work.updates]
    total, exposed = (sum(values) for values in zip(*pairs, strict=True))
    moments = sum(all_gather(cluster, size, gpus) for size in work.gathers)
    moments += sum(all_reduce(cluster, size, gpus) for size in work.sums)
    own = all_gather(cluster, images * work.gathered, gpus) if work.gathered else 0.0
    return (total - exposed) / work.period, (exposed + moments) / work.period + own


def answer(question: Question, name: str) -> list[Prediction]:
    """All predictions for a recipe."""
    given = recipes.load(name)
    if question.sync_bn != "recipe":
        given = replace(given, sync_bn=question.sync_bn)
    works: dict[bool, Work] = {}
    found = []
    for scaling in ("weak", "strong"):
        for gpus in question.gpus:
            batch = given.data.batch if scaling == "weak" else given.data.batch // gpus
            if not batch or (scaling == "strong" and given.data.batch % gpus):
                continue
            whole = replace(given, data=replace(given.data, batch=batch * gpus))
            synchronised = choose_sync_bn(whole, gpus)[0]
            if synchronised not in works:
                works[synchronised] = trace(name, given, synchronised)
            found.append(_predicted(question, works[synchronised], scaling, gpus, batch))
    return found


def _predicted(question: Question, work: Work, scaling: str, gpus: int, batch: int) -> Prediction:
    rate = question.share * PEAK
    if question.images_per_s:
        rate = question.images_per_s * work.flops_per_image
    compute = compute_seconds(work, batch, rate)
    cap = int(question.bucket_mb * 2**20)
    hidden, exposed = communication(work, H100, gpus, compute, cap, batch)
    speed = gpus * batch / (compute + exposed)
    alone = work.batch / compute_seconds(work, work.batch, rate)
    return Prediction(
        work.name, scaling, gpus, batch, compute, hidden, exposed, speed, speed / alone / gpus
    )


def show(console: Console, question: Question, found: Sequence[Prediction]) -> None:
    """Print a table of the predictions for each recipe."""
    for name in dict.fromkeys(p.recipe for p in found):
        console.print(_table(name, [p for p in found if p.recipe == name]))
        asked = {p.gpus for p in found if p.scaling == "strong" and p.recipe == name}
        if missing := [str(gpus) for gpus in question.gpus if gpus not in asked]:
            batch = recipes.load(name).data.batch
            console.print(
                f"strong scaling: the batch of {batch} does not divide over {', '.join(missing)} "
                "GPUs\n"
            )
    console.print(basis(question))


def _table(name: str, found: Sequence[Prediction]) -> Table:
    table = Table(title=f"{name}, predicted on {H100.name}", title_justify="left", box=box.SIMPLE)
    times, rest = (
        ("compute\nms", "hidden\nms", "exposed\nms"),
        ("exposed", "images/s", "efficiency"),
    )
    for i, column in enumerate(("scaling", "GPUs", "batch\neach", *times, *rest)):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for before, p in zip((None, *found), found, strict=False):
        new = before is None or before.scaling != p.scaling
        if new and before:
            table.add_section()
        seconds = (f"{1e3 * s:.3f}" for s in (p.compute_s, p.hidden_s, p.exposed_s))
        shares = f"{p.exposed_share:.1%}", f"{p.images_per_s:,.0f}", f"{p.efficiency:.1%}"
        row = (p.scaling if new else "", str(p.gpus), str(p.batch))
        table.add_row(*row, *seconds, *shares)
    return table


def basis(question: Question) -> str:
    """What the predictions stand on."""
    speed = f"{question.share:g} of the peak of {PEAK / 1e12:,.0f} TFLOP/s (assumed, --share)"
    if question.images_per_s:
        speed = f"{question.images_per_s:,.0f} images/s on one GPU (given)"
    return (
        f"No measurement: computation at {speed}; {H100.near / 1e9:.0f} GB/s by NVLink and "
        f"{H100.far / 1e9:.0f} by InfiniBand each way per GPU; buckets of {question.bucket_mb:g} "
        f"MiB. Sources and assumptions: launch/links.py, launch/scaling.py."
    )


def plot(path: Path, question: Question, found: Sequence[Prediction]) -> None:
    """Draw efficiency over the number of GPUs."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError("--plot needs matplotlib: pip install 'saddle[plot]'") from error
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, scaling in zip(figure.subplots(1, 2, sharey=True), ("weak", "strong"), strict=True):
        for name in dict.fromkeys(p.recipe for p in found):
            points = [p for p in found if (p.recipe, p.scaling) == (name, scaling)]
            gpus, efficiency = [p.gpus for p in points], [p.efficiency for p in points]
            axes.plot(gpus, efficiency, marker="o", markersize=3, label=name)
        axes.set(title=f"{scaling} scaling", xlabel="GPUs", xscale="log", ylim=(0, 1.05))
        axes.set_xticks(question.gpus, [str(n) for n in question.gpus], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("predicted efficiency")
    figure.axes[0].legend(fontsize=8)
    figure.supxlabel(basis(question), fontsize=6)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format=path.suffix.removeprefix(".") or "png")
    write_whole(path, picture.getvalue())


def check(question: Question) -> tuple[str, ...]:
    """The recipes asked for; raises ValueError naming a flag."""
    names = question.recipes or tuple(recipes.names())
    if question.images_per_s is not None and len(names) != 1:
        raise ValueError("--images-per-s is the speed of one recipe: name one")
    for flag in ("share", "images_per_s", "bucket_mb"):
        value = getattr(question, flag)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{flag.replace('_', '-')} {value} must be positive")
    if question.share > 1:
        raise ValueError(f"--share {question.share} must be at most 1")
    if not question.gpus or min(question.gpus) < 1:
        raise ValueError("--gpus are numbers from 1 on: give at least one")
    for path in (question.plot, question.json):
        if path:
            check_place(path)
    return names


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code."""
    question = tyro.cli(
        Question, prog="python -m launch.scaling", description=__doc__, args=arguments
    )
    try:
        found = [p for name in check(question) for p in answer(question, name)]
        show(Console(width=None if sys.stdout.isatty() else 120), question, found)
        if question.plot:
            plot(question.plot, question, found)
        if question.json:
            rows = [asdict(p) | {"exposed_share": p.exposed_share} for p in found]
            content = {"basis": basis(question), "predictions": rows}
            write_whole(question.json, f"{json.dumps(content, indent=1)}\n".encode())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
