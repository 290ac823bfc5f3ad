"""Decode a dataset once, before any run: python -m pipelines.prepare DATASET --to packed|ffcv|zip

DATASET is a name that recipes know (celeba, horse2zebra, ...) or a folder of images, a zip or tar
shards. Sizes must be those of the recipe (`--resolution`, `--channels`, `--crop`, `--load`) for its
runs to find what is prepared here. Killed, the same command goes on where it was.
"""

import os
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipelines.beton import beton_path, missing, open_beton
from pipelines.datasets import NAMES, find
from pipelines.images import BadImage, with_remedy
from pipelines.missing import DatasetMissing, NoSplit
from pipelines.pack import CacheUnusable, lock, open_pack, pack_path, say_skipped
from pipelines.settings import Data
from pipelines.sources import Dataset
from pipelines.style_zip import refuse_another, write_zip


@dataclass(frozen=True)
class Command:
    """What to prepare; what is not explained here is as in a recipe's data settings."""

    dataset: Annotated[str, tyro.conf.Positional]
    """Name of a dataset, or a path: a folder of images, a .zip, a .tar or a folder of shards."""
    to: Literal["packed", "ffcv", "zip"] = "packed"
    """packed: for the resident pipeline. ffcv: a .beton. zip: PNGs as StyleGAN lays them out."""
    split: Literal["train", "test"] = "train"
    """Which part of the dataset."""
    out: Path | None = None
    """The .zip to write; the others go into the cache folder, where runs look for them."""
    resolution: int = 64
    """Height and width in pixels that the networks see."""
    channels: Literal[1, 3] = 3
    """1 grey, 3 RGB."""
    crop: int | None = None
    """Centre crop in source pixels before resizing; none takes the largest centred square."""
    load: int | None = None
    """Side that is stored, if a random square of the resolution is cut from it while training."""
    window: tuple[int, int] | None = None
    """Values of 16-bit grey pixels that become black and white."""
    without: tuple[int, ...] = ()
    """Classes that the runs leave out of training."""
    beton: Literal["raw", "jpeg"] = "raw"
    """Form of the .beton: pixels at the stored size, or JPEGs."""
    root: Path | None = None
    """Folder that holds the datasets; default: the variable SADDLE_DATA, else ./data."""
    path: Path | None = None
    """Folder of this very dataset, in place of its usual place under root."""
    cache: Path | None = None
    """Folder of packed caches; default: the variable SADDLE_CACHE, else ~/.cache/saddle."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that decode; default: as many as this machine lets us have cores."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do at a corrupt image: stop and name it, or skip and count it."""
    download: bool = False
    """Fetch the dataset if it is missing."""

    def data(self) -> Data:
        """The data settings of a run that these are for."""
        known = {f.name for f in fields(Data)} & {f.name for f in fields(self)}
        data = Data(**{name: getattr(self, name) for name in known})
        if self.dataset in NAMES:
            return replace(data, name=self.dataset)
        if self.path is not None:
            raise ValueError(
                f"{self.dataset!r} is no dataset (one of {', '.join(NAMES)}) that could lie in "
                f"--path {self.path}: give one of the two"
            )
        if not self.dataset or not Path(self.dataset).exists():
            raise ValueError(
                f"{self.dataset!r} is neither a dataset ({', '.join(NAMES)}) nor a folder or file"
            )
        return replace(data, name="folder", path=Path(self.dataset))


def prepare(command: Command) -> None:
    """Write what is asked for. Raises ValueError, DatasetMissing, NoSplit, BadImage, CacheUnusable
    or OSError."""
    data = command.data()
    if command.workers < 1:
        raise ValueError("--workers must be at least 1")
    if (command.to == "zip") != (command.out is not None):
        raise ValueError(
            "--to zip needs --out FILE.zip, and the others have none: --cache is their folder"
        )
    if command.out is not None and command.out.suffix != ".zip":
        raise ValueError(f"--out {command.out} must end in .zip")
    if command.to == "ffcv" and (obstacle := missing()):
        raise ValueError(obstacle)
    dataset = find(data, command.split)
    if command.to == "zip" and (dataset.second or dataset.fit.halves):
        raise ValueError(f"a zip holds single images, and {dataset.name} has two at a time")
    for domain in filter(None, (dataset, dataset.second)):
        path, skipped = _prepare(command, domain, data)
        say_skipped(skipped, print)
        count = len(domain) - (len(skipped) if command.to == "zip" else 0)
        print(f"{command.to}: {count:,} images of {domain.name} in {path}")


def _prepare(command: Command, dataset: Dataset, data: Data) -> tuple[Path, dict[int, str]]:
    """The file, and the corrupt rows with what is wrong with them."""
    if command.to == "ffcv":
        beton = open_beton(dataset, data, beton_path(dataset, data), print, True)
        return beton.path, beton.skipped
    path = pack_path(dataset, data)
    if command.to == "zip":
        refuse_another(path, command.out)  # before the work, and not after it
    pack = open_pack(dataset, data, path, print, True)
    if command.to == "zip":
        with lock(path, print):
            write_zip(dataset, pack, command.out, print)
    return command.out or path, pack.skipped


def _own_flags(text: str) -> str:
    """A message for a run's settings, with the flags that they have here."""
    return text.replace("--data.", "--").replace("data.", "--")


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code."""
    command = tyro.cli(Command, prog="python -m pipelines.prepare", args=arguments,
                       description=__doc__)  # fmt: skip
    try:
        prepare(command)
    except ValueError as error:
        print(f"error: {_own_flags(str(error))}", file=sys.stderr)
        return 2
    except (DatasetMissing, NoSplit, BadImage, CacheUnusable, OSError) as error:
        print(f"error: {_own_flags(with_remedy(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
