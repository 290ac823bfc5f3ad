"""Bring a recipe's prepared data to this node: python -m launch.stage FOLDER RECIPE [overrides]

FOLDER is on the node's own disk and is then the SADDLE_CACHE of runs there. What is not yet
prepared is, once, in the shared cache, where the next job finds it; other nodes wait for that. What
the disk has no room for is linked instead of copied. slurm/train.sh calls this on every node.
"""

import os
import shutil
import socket
import sys
from pathlib import Path

import torch

from engine import recipe as recipes
from pipelines.beton import beton_path, open_beton
from pipelines.datasets import find
from pipelines.images import BadImage, with_remedy
from pipelines.missing import DatasetMissing
from pipelines.open import choose
from pipelines.pack import CacheUnusable, open_pack, pack_path
from pipelines.settings import Data
from pipelines.sources import Dataset

SPARE = 0.1
"""Part of the node's free disk that stays free."""


def stage(data: Data, folder: Path) -> list[str]:
    """Put the packed cache or .beton of a run, and what its metrics keep, into `folder`; a line for
    each file. Raises ValueError, DatasetMissing, BadImage, CacheUnusable or OSError."""
    if data.cache is not None:
        raise ValueError("--data.cache would be used in place of the node's folder; leave it out")
    files = [path for kind in ("classifier", "features") for path in _kept(data, kind)]
    dataset = find(data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline, _ = choose(dataset, data, device)
    for domain in filter(None, (dataset, dataset.second)):
        files += _prepared(pipeline, domain, data)
    folder.mkdir(parents=True, exist_ok=True)
    return [_bring(path, folder / path.name) for path in files]


def _kept(data: Data, kind: str) -> list[Path]:
    return sorted(data.cache_folder().glob(f"{kind}-{data.name}-*.safetensors"))


def _prepared(pipeline: str, dataset: Dataset, data: Data) -> list[Path]:
    """The files that a pipeline reads, made if they were not there; the one that counts last."""
    if pipeline == "resident":
        path = open_pack(dataset, data, pack_path(dataset, data), print, False).path
    elif pipeline == "ffcv":
        path = open_beton(dataset, data, beton_path(dataset, data), print, False).path
    else:
        return []
    return [path, path.with_suffix(".json")]


def _bring(path: Path, to: Path) -> str:
    """Copy a file, or link to it where there is no room; never half a file under its name."""
    size, free = path.stat().st_size, shutil.disk_usage(to.parent).free
    scratch = to.with_name(
        f"{to.name}.{socket.gethostname()}.{os.getpid()}"
    )  # FOLDER may be shared
    if size > (1 - SPARE) * free:
        scratch.symlink_to(path.absolute())
        how = f"linked, for of {size / 1e6:,.0f} MB only {free / 1e6:,.0f} MB are free"
    else:
        shutil.copyfile(path, scratch)
        how = f"copied, {size / 1e6:,.1f} MB"
    os.replace(scratch, to)
    return f"{path} {how}, to {to}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) < 2:
        print(__doc__)
        return 2
    folder, name, *overrides = arguments
    try:
        for line in stage(recipes.parse(name, overrides).recipe.data, Path(folder)):
            print(line, flush=True)
    except (ValueError, DatasetMissing, BadImage, CacheUnusable, OSError) as error:
        print(f"error: {with_remedy(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
