"""A run that goes on: what its checkpoints must say, and the newest whole one loaded."""

from pathlib import Path
from typing import Any

from engine import checkpoint, run
from engine.display import Display
from engine.session import Session
from engine.settings import Recipe
from engine.stored import Loaded
from pipelines.datasets import Dataset


def facts(name: str, recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint says of the run."""
    return {
        "recipe": name,
        "dataset": dataset.identity(),
        "dataset_images": dataset.images,
        "classes": len(dataset.classes),
        "words": list(dataset.words) if recipe.step.reads_captions() else [],
    }


def resume(
    live: Session, folder: Path, told: dict[str, Any], dataset: Dataset, display: Display
) -> bool:
    """Load the newest whole checkpoint, if there is one."""
    newest = run.agree(live.ranks, lambda: _newest(folder / "checkpoints", display))
    if newest is None:
        return False
    loaded = Loaded(newest, live.ranks.rank)
    # checkpoints of before knew a dataset by the times of its files as well
    if loaded.index["dataset"] not in (told["dataset"], dataset.identity(times=True)):
        raise ValueError(
            f"the dataset is not the one that {folder} was trained on ({told['dataset_images']} "
            f"images now, {loaded.index['dataset_images']} then, or changed files); restore it, "
            f"or start another run with --fresh"
        )
    checkpoint.restore(live, loaded)
    text = f"resuming {folder} from {loaded.images:,} images"
    if (then := loaded.index["world_size"]) != live.ranks.world_size:
        text += f", trained on {then} rank(s) until there, now on {live.ranks.world_size}"
    display.line(text)
    return True


def _newest(checkpoints: Path, display: Display) -> Path | None:
    """The newest whole checkpoint, None where there never was one. A run whose checkpoints are all
    damaged does not begin again by itself: that would overwrite what is left of it."""
    newest = checkpoint.newest_whole(checkpoints, display.warn, set_aside=True)
    damaged = sorted(checkpoints.glob("*.damaged*")) if newest is None else []
    if damaged:
        raise run.RunError(
            f"no checkpoint in {checkpoints} is whole: put back the files of one "
            f"({damaged[-1].name} is the newest, without `.damaged`), or begin anew with --fresh"
        )
    return newest
