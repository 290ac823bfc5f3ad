"""The folder of an export: put together under a temporary name, then renamed, so that it is there
whole or not at all.

    model.safetensors  model.onnx  model.pt2     the forms
    config.json                                  what they are, their inputs and outputs
    network/                                     the source that rebuilds the first of them
    README.md  samples.png                       the model card; samples where it makes some
"""

import copy
import json
import os
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import pictures, recipe, run
from engine.export import card, source
from engine.export.source import ExportError
from engine.export.subject import Subject, ends
from engine.export.write import describe, write_form
from engine.exported import CONFIG, FILES, changed_files, file_digest, read_config
from engine.networks.spectral import folded
from engine.trained import Trained

PACKAGES = ("torch", "safetensors", "numpy", "onnx", "onnxruntime", "onnxscript")
SAMPLES, SEED = 64, 0  # the model card's grid: those that `engine.sample` makes by default


def check_target(folder: Path) -> None:
    """Raise ValueError unless the place is free or holds an export that nobody changed."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    config = read_config(folder) if folder.is_dir() else None
    if config is None:
        raise ValueError(f"{folder} is there and is no export: give another --out")
    if changed := changed_files(folder, config):
        names = ", ".join(changed[:5])
        raise ValueError(
            f"{folder} is an export that was changed since ({names}): move it away or give "
            f"another --out"
        )


def write_export(
    trained: Trained,
    subject: Subject,
    run_dir: Path,
    forms: list[str],
    target: Path,
    say: Callable[[str], None],
) -> None:
    """Write these forms of a run's model as the folder `target`. Raises ExportError."""
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        scratch.mkdir()
        _fill(trained, subject, run_dir, forms, scratch, say)
        _move_into_place(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fill(
    trained: Trained,
    subject: Subject,
    run_dir: Path,
    forms: list[str],
    folder: Path,
    say: Callable[[str], None],
) -> None:
    module = portable(subject.module)
    config = configuration(trained, subject, run_dir)
    differences = {}
    for form in forms:
        differences[form] = write_form(form, module, config, folder)
        size = (folder / FILES[form]).stat().st_size / 1e6
        say(f"{FILES[form]}: {size:.1f} MB, differs by at most {differences[form]:.1g}")
    if "safetensors" in forms:
        (folder / "network").mkdir()
        for name, text in source.bundle(source.modules(config["network"])).items():
            (folder / "network" / name).write_text(text)
    if subject.kind is None:
        images_NCHW = torch.cat(list(trained.samples(SEED, SAMPLES, SAMPLES)))
        picture = pictures.grid(images_NCHW)
        pictures.save(picture, folder / "samples.png", trained.origin(SEED))
    (folder / "README.md").write_text(card.write(trained, run_dir, config, differences))
    files = {str(p.relative_to(folder)): file_digest(p) for p in folder.rglob("*") if p.is_file()}
    whole = config | {"largest_difference": differences, "files": dict(sorted(files.items()))}
    (folder / CONFIG).write_text(json.dumps(whole, indent=1))


def _move_into_place(scratch: Path, target: Path) -> None:
    old = scratch.with_suffix(".old")
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(scratch, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def portable(module: nn.Module) -> nn.Module:
    """A copy of what makes a run's images: on the CPU, in eval mode, with contiguous weights.

    Raises ExportError for a network that diverged.
    """
    module = folded(copy.deepcopy(module).cpu())
    module = module.to(memory_format=torch.contiguous_format).requires_grad_(False)
    if not all(t.isfinite().all() for t in module.state_dict().values()):
        raise ExportError("the network holds values that are not numbers: take another checkpoint")
    return module


def configuration(trained: Trained, subject: Subject, run_dir: Path) -> dict[str, Any]:
    """What every form of an export says of itself. Raises ExportError."""
    _, _, stored = run.read_recipe(run_dir)
    network = describe(subject.settings)
    bundle = source.bundle(source.modules(network))
    network |= {"source_sha256": source.digest(bundle)}
    return {
        "saddle_export": 1,
        "network": network,
        **ends(trained, subject.kind),
        "recipe": {
            "name": trained.name,
            "source_sha256": stored["digest"],
            "settings": recipe.identity(trained.recipe),
        },
        "checkpoint": {
            "images": trained.images,
            "sha256": trained.checkpoint,
            "ema": trained.averaged,
        },
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "saddle": run.commit() or "unknown"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
