"""`--dry-run`: what would be trained, and how."""

import torch
from rich.console import Console

from engine import sharing
from engine.describe import Cost, show
from engine.iteration import choose_graph
from engine.recipe import total_images
from engine.resolution import resolve
from engine.run import device_name
from engine.settings import Metrics, Recipe
from engine.world import Ranks, environment
from kernels import dispatch
from pipelines.datasets import Dataset
from pipelines.open import choose


def dry_run(recipe: Recipe, name: str, device: torch.device, dataset: Dataset, cost: Cost) -> None:
    """Print the resolved recipe and how it would run."""
    ranks = Ranks(*environment(), device)
    if ranks.rank:
        return
    total = total_images(recipe, dataset.images)
    flops = cost.flops_per_image * total / ranks.world_size
    precision, compiler = resolve(recipe, ranks, flops)
    captured, why = choose_graph(recipe, device)
    units = ", ".join(cost.units) if compiler.active else "nothing"
    facts = {
        "dataset": f"{dataset.name}, {len(dataset):,} images"
        + (f" ({dataset.note})" if dataset.note else ""),
        "length": f"{total:,} images, {total // recipe.data.batch:,} steps",
        "FLOPs per image": f"{cost.flops_per_image / 1e6:,.1f} million (all updates, both passes)",
        "device": f"{device_name(device)}, {ranks.world_size} rank(s)",
        "ranks": sharing.describe(recipe, ranks.world_size),
        "precision": f"{precision.name} ({precision.reason})",
        "compile": f"{units} ({compiler.reason})",
        "graph": f"{'on' if captured else 'off'} ({why})",
        "kernels": "\n".join(": ".join(row) for row in dispatch.explain(device)),
        "pipeline": ": ".join(choose(dataset, recipe.data, device)),
        "metrics": _metrics(recipe.metrics),
    }
    if notes := recipe.step.notes():
        facts["notes"] = "\n".join(notes)
    show(Console(), name, recipe, facts, len(dataset.classes))


def _metrics(settings: Metrics) -> str:
    """When the samples are measured, in words."""
    if not settings.every_kimg:
        return "not while training (--metrics.every-kimg)"
    real = f"{settings.real:,}" if settings.real else "all"
    against = f"{settings.generated:,} generated against {real} of the {settings.split} split"
    return f"every {settings.every_kimg:g} kimg, {against}"
