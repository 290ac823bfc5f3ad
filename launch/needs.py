"""Does the recipe fit: memory of host and GPU, and the disk, against what training will take?"""

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from engine.footprint import State, activation_bytes, free_memory, state_bytes
from engine.precision import choose_precision
from engine.recipe import total_images
from engine.settings import Recipe
from engine.sharing import settled
from engine.world import environment
from launch.checks import nearest
from launch.findings import FAIL, OK, WARN, Case, Finding
from pipelines.datasets import BadImage, Dataset, DatasetMissing, find
from pipelines.pack import load, pack_path, packed_bytes

TIGHT = 0.8
"""Part of what is free beyond which an estimate is no promise: allocators keep some for themselves,
libraries take workspaces."""
SPARE = 2  # checkpoints beside those kept: the best, and the one being written


def memory(case: Case) -> list[Finding]:
    """Memory of this rank's device against weights, gradients, optimizer, average, activations."""
    recipe = case.recipe
    if recipe is None:
        return []
    recipe = replace(recipe, precision=choose_precision(recipe.precision, case.device).name)
    classes = _classes(case)
    states = state_bytes(recipe, classes)
    micro = _micro_batch(recipe)
    activations = activation_bytes(recipe, classes) * micro
    need = sum(_held(s, recipe) for s in states.values()) + activations
    text = (
        f"{_size(need)} a rank: {_size(need - activations)} weights, gradients, optimizer and "
        f"average, {_size(activations)} activations of {micro} images"
    )
    findings = [_device_memory(case, need, text, recipe)]
    if case.device.type == "cuda":
        copy = sum(s.stored for s in states.values())
        text = f"{_size(copy)} for a copy of the checkpoint while it is written"
        findings.append(_compare("host memory", copy, free_memory(), text, "free some"))
    return findings


def _micro_batch(recipe: Recipe) -> int:
    """Images that a rank must have room for at a time: with --batch-per-rank auto, which takes what
    fits, a single one."""
    if recipe.batch_per_rank == "auto":
        return 1
    own = max(recipe.data.batch // environment()[2] // recipe.accumulate, 1)
    return min(recipe.batch_per_rank or own, own)


def _device_memory(case: Case, need: float, text: str, recipe: Recipe) -> Finding:
    remedy = f"a smaller --data.batch, or --accumulate {recipe.accumulate * 2} or more"
    if recipe.batch_per_rank is not None:
        remedy = "smaller networks" if recipe.batch_per_rank == "auto" else "fewer --batch-per-rank"
    if case.device.type == "cuda":
        free = torch.cuda.mem_get_info(case.device)[0]
        return _compare("GPU memory", need, free, text, remedy)
    if case.ranks_here > 1:
        text = f"{text}, {case.ranks_here} ranks here"
    return _compare("host memory", need * case.ranks_here, free_memory(), text, remedy)


def _held(state: State, recipe: Recipe) -> float:
    """Bytes of a player's state on one rank. Whatever is sharded, an update has weights and
    gradients whole at some moment; what it never gathers is the optimizer's state."""
    if settled(recipe).parallel == "ddp":
        return state.held
    return state.held - state.optimizer * (1 - 1 / environment()[2])


def disk(case: Case) -> list[Finding]:
    """The disk against checkpoints and the packed cache."""
    recipe = case.recipe
    if recipe is None or environment()[1]:
        return []
    found = _dataset(case)
    one = sum(s.stored for s in state_bytes(recipe, _classes(case)).values())
    kept = checkpoints(recipe, found.images if found else 0)
    text = f"{_size(one * kept)}: {kept} checkpoints of {_size(one)}"
    remedy = "free some, a smaller --keep, or --runs on another disk"
    findings = [_compare("disk for runs", one * kept, _free_disk(case.runs), text, remedy)]
    cached = recipe.data.pipeline in ("auto", "resident")
    if found and cached and load(pack_path(found, case.data), found) is None:
        size, folder = packed_bytes(found), case.data.cache_folder()
        text = f"{_size(size)} for the packed images"
        remedy = "free some, or --data.cache on another disk"
        findings.append(_compare("disk for cache", size, _free_disk(folder), text, remedy))
    return findings


def checkpoints(recipe: Recipe, images: int) -> int:
    """The most checkpoints that lie in a run's folder at a time."""
    outputs, epochs_known = recipe.outputs, images or recipe.length.epochs is None
    for_good = 0
    if outputs.keep_every and epochs_known:
        for_good = total_images(recipe, images) // int(outputs.keep_every * 1000)
    return outputs.keep + SPARE + for_good


def _compare(check: str, need: float, free: float, text: str, remedy: str) -> Finding:
    text = f"{text}; {_size(free)} free"
    status = FAIL if need > free else WARN if need > TIGHT * free else OK
    return Finding(check, status, text, remedy)


def _free_disk(folder: Path) -> int:
    return shutil.disk_usage(nearest(folder)).free


def _dataset(case: Case) -> Dataset | None:
    """The dataset, if it can be opened: another check says why not."""
    try:
        return find(replace(case.data, download=False))
    except (DatasetMissing, BadImage, ValueError):
        return None


def _classes(case: Case) -> int:
    found = _dataset(case)
    return len(found.classes) if found else 0


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
