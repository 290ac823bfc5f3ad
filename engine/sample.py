"""Sample from a trained run: python -m engine.sample RUN_DIR [--num 64] [--out grid.png].

No flag says what the architecture is: networks are rebuilt from the run's recipe.json and filled
from its newest whole checkpoint.

    python -m engine.sample RUN_DIR --num 64 --seed 0 --out grid.png
    python -m engine.sample RUN_DIR --num 10000 --each images/
    python -m engine.sample RUN_DIR --interpolate --out walk.png      (and walk.gif)
    python -m engine.sample RUN_DIR --reconstruct                     (autoencoders)
    python -m engine.sample RUN_DIR --traverse                        (one row per latent)

Shapes: N images, C channels, H height, W width, L latent.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, TextIO

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from engine import pictures
from engine.checkpoint import CheckpointError
from engine.losses import gaussian_kl
from engine.run import RunError
from engine.settings import Algorithm
from engine.steps.autoencoder import Variational
from engine.trained import Trained, open_run
from pipelines.datasets import BadImage, DatasetMissing, NoSplit, decode_some, find
from pipelines.order import Order

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LARGEST = 1 << 25  # pixels of a picture: float images and their copies then stay below 2 GB
SPREAD, COLUMNS = 3.0, 9  # a traversal goes from -SPREAD to SPREAD in COLUMNS pictures
KL_IMAGES = 512  # images by which latents are ranked


class SampleError(RuntimeError):
    """What was asked for cannot be made from this run, though the command is right."""


FAILURES = (SampleError, RunError, CheckpointError, BadImage, DatasetMissing, OSError)


@dataclass(frozen=True)
class Data:
    """Where the run's dataset lies now, if not where it lay then (--reconstruct, --traverse)."""

    root: Path | None = None
    """Folder that holds the datasets."""
    path: Path | None = None
    """Folder of this very dataset."""


@dataclass(frozen=True)
class Command:
    """One sampling command."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory, as `engine.train` names it at its end."""
    num: int | None = None
    """Images (64); stops of a walk (5); images to reconstruct (16); latents to traverse (10)."""
    seed: int = 0
    """Seed of the latents and of the choice of dataset images; image k of a seed is always the
    same, whatever --num is."""
    out: Path | None = None
    """Picture to write (.png, .jpg, .webp); default: grid.png, walk.png, reconstruction.png or
    traversal.png here. Folders are made, a picture of that name is replaced."""
    each: Path | None = None
    """Write every image by itself, 00000.png and on, into this new or empty folder."""
    interpolate: bool = False
    """A closed walk through the latent space: a strip, and an animation (.gif) beside it."""
    frames: int = 8
    """Pictures from one stop of the walk to the next."""
    reconstruct: bool = False
    """For autoencoders: rows of held-out images, each over its reconstruction."""
    traverse: bool = False
    """One latent per row, from -3 to 3; an autoencoder's most active latents (by KL) first."""
    ema: bool = True
    """Take the moving average of the weights where the run keeps one."""
    checkpoint: int | None = None
    """Images seen at the checkpoint to take; default: the newest whole one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    batch: int = 64
    """Images made at a time."""
    data: Data = field(default_factory=Data)


def walk(z_NL: Tensor, frames: int) -> Tensor:
    """Latents (N * frames, L) of a closed walk along great arcs from each latent to the next.

    White 2016, "Sampling generative networks", section 2.1: the straight line between Gaussian
    latents leaves the shell on which nearly all of them lie.
    """
    ends_NL = z_NL.roll(-1, 0)
    cosine_N = torch.nn.functional.cosine_similarity(z_NL, ends_NL)
    angle_N11 = cosine_N.clamp(-1 + 1e-6, 1 - 1e-6).acos().view(-1, 1, 1)
    share_1F1 = torch.arange(frames, device=z_NL.device).view(1, -1, 1) / frames
    start = torch.sin((1 - share_1F1) * angle_N11) * z_NL[:, None]
    end = torch.sin(share_1F1 * angle_N11) * ends_NL[:, None]
    return ((start + end) / angle_N11.sin()).flatten(0, 1)


def dataset_images(trained: Trained, data: Data, seed: int, count: int) -> tuple[Tensor, str]:
    """Up to `count` images (N, C, H, W) of the run's dataset, on the host, and which they are.

    Held-out ones, or training images where the dataset has no others.
    """
    place = {k: v for k, v in vars(data).items() if v is not None}
    settings, label = replace(trained.recipe.data, **place), "held-out images"
    try:
        try:
            dataset = find(settings, "test")
        except NoSplit as reason:
            dataset, label = find(settings), f"training images ({reason})"
    except DatasetMissing as error:
        reason = str(error).split("\n")[0]
        raise SampleError(f"{reason}; --data.root or --data.path says where it is") from error
    rows_N = Order(len(dataset), seed).rows(np.arange(len(dataset))).tolist()
    skip = settings.on_error == "skip"
    images_NCHW = torch.from_numpy(decode_some(dataset, rows_N, count, skip))
    return images_NCHW.float() / 127.5 - 1, label


def rows_over_rows(above_NCHW: Tensor, below_NCHW: Tensor, columns: int) -> Tensor:
    """A row of the first, under it the same row of the second, and so on; black fills the end."""
    fill = above_NCHW.new_full((-len(above_NCHW) % columns, *above_NCHW.shape[1:]), -1)
    pairs = [torch.cat([x, fill]).unflatten(0, (-1, columns)) for x in (above_NCHW, below_NCHW)]
    return torch.stack(pairs, 1).flatten(0, 2)


def draw_samples(command: Command, trained: Trained) -> None:
    """A grid, single files, or both."""
    count, first, kept = command.num or 64, 0, []
    if command.out:
        check_size(trained, count, "--num")
    for images_NCHW in trained.samples(command.seed, count, command.batch):
        if command.each:
            _save_each(images_NCHW, command.each, first)
        if command.out:
            kept.append(images_NCHW)
        first += len(images_NCHW)
    if command.each:
        _say(f"wrote {count:,} images to {command.each}")
    if command.out:
        _write(pictures.grid(torch.cat(kept)), command.out, f"{count} samples")


def check_size(trained: Trained, count: int, flags: str) -> None:
    """Raise ValueError if so many images are too much for one picture."""
    if (most := LARGEST // trained.recipe.data.resolution**2) < count:
        raise ValueError(
            f"{count:,} images are too many for one picture (at most {most:,} at this resolution): "
            f"lower {flags}, or write single files with --each alone"
        )


def _save_each(images_NCHW: Tensor, folder: Path, first: int) -> None:
    try:
        pictures.save_each(images_NCHW, folder, first)
    except ValueError as error:  # not a number: the run is at fault, not the command
        raise SampleError(str(error)) from error


def draw_walk(command: Command, trained: Trained) -> None:
    """A strip and an animation."""
    stops = command.num or 5
    check_size(trained, stops * command.frames, "--num or --frames")
    z_NL = walk(trained.latents(command.seed, torch.arange(stops)), command.frames)
    images_NCHW = torch.cat(list(trained.decode(z_NL, command.batch)))
    what = f"a closed walk through {stops} latents, {len(images_NCHW)} pictures"
    _write(pictures.strip(images_NCHW), command.out, what)
    pictures.gif(images_NCHW, command.out.with_suffix(".gif"))
    _say(f"wrote {command.out.with_suffix('.gif')}: the same in motion")


def draw_reconstructions(command: Command, trained: Trained) -> None:
    """Originals over reconstructions."""
    count, step = command.num or 16, trained.recipe.step
    if type(step).reconstruct is Algorithm.reconstruct:
        raise ValueError(f"--reconstruct is for autoencoders such as vae_mnist, not {trained.name}")
    check_size(trained, 2 * count, "--num")
    originals_NCHW, label = dataset_images(trained, command.data, command.seed, count)
    with torch.no_grad():
        parts = [
            step.reconstruct(trained.networks, part_NCHW.to(trained.device)).cpu()
            for part_NCHW in originals_NCHW.split(command.batch)
        ]
    made_NCHW = torch.cat(parts)
    columns = min(len(made_NCHW), max(8, round((2 * len(made_NCHW)) ** 0.5)))
    picture = pictures.grid(rows_over_rows(originals_NCHW, made_NCHW, columns), columns)
    _write(picture, command.out, f"{len(made_NCHW)} {label} over their reconstructions")


def draw_traversal(command: Command, trained: Trained) -> None:
    """One latent per row, the others fixed: at the code of a dataset image, or at a sample's."""
    z_L = trained.latents(command.seed, torch.arange(1))[0]
    count, order, label = min(command.num or 10, len(z_L)), range(len(z_L)), ""
    if isinstance(trained.recipe.step, Variational):
        images_NCHW, label = dataset_images(trained, command.data, command.seed, KL_IMAGES)
        with torch.no_grad():
            encode = trained.networks["autoencoder"].encode
            mean_NL, log_variance_NL = encode(images_NCHW.to(trained.device))
        z_L = mean_NL[0]
        kl_L = gaussian_kl(mean_NL.T, log_variance_NL.T) / len(mean_NL)  # the sum is over images
        order = kl_L.argsort(descending=True).tolist()
        label = f", most active first on {len(images_NCHW)} {label}: "
        label += ", ".join(f"{i} ({kl_L[i]:.2f} nats)" for i in order[:count])
    z_NL = z_L.repeat(count * COLUMNS, 1)
    for row, latent in enumerate(order[:count]):
        values = torch.linspace(-SPREAD, SPREAD, COLUMNS, device=z_L.device)
        z_NL[row * COLUMNS : (row + 1) * COLUMNS, latent] = values
    images_NCHW = torch.cat(list(trained.decode(z_NL, command.batch)))
    what = f"{count} of {len(z_L)} latents from {-SPREAD:g} to {SPREAD:g}{label}"
    _write(pictures.grid(images_NCHW, COLUMNS), command.out, what)


def _write(picture: Image.Image, path: Path, what: str) -> None:
    replaced = " (replaced)" if path.exists() else ""
    pictures.save(picture, path)
    _say(f"wrote {path}{replaced}: {what}")


def _warn(text: str) -> None:
    _say(f"warning: {text}", sys.stderr)


def _say(text: str, to: TextIO | None = None) -> None:
    print(text, file=to or sys.stdout, flush=True)


Draw = Callable[[Command, Trained], None]
KINDS: dict[str, tuple[Draw, str]] = {
    "interpolate": (draw_walk, "walk.png"),
    "reconstruct": (draw_reconstructions, "reconstruction.png"),
    "traverse": (draw_traversal, "traversal.png"),
}


def choose(command: Command) -> tuple[Draw, str]:
    """What draws the picture that a command asks for, and the picture's default name.

    Raises ValueError naming a setting.
    """
    asked = [kind for kind in KINDS if getattr(command, kind)]
    if len(asked) > 1:
        raise ValueError(f"give one of --{' and --'.join(asked)}, not both")
    if command.each and asked:
        raise ValueError(f"--each writes samples: leave either it or --{asked[0]} out")
    least = 2 if command.interpolate else 1
    for name, smallest in (("num", least), ("frames", 1), ("batch", 1), ("seed", 0)):
        value = getattr(command, name)
        if value is not None and value < smallest:
            raise ValueError(f"--{name} {value} is too small: give at least {smallest}")
    return KINDS[asked[0]] if asked else (draw_samples, "grid.png")


def check_places(command: Command) -> None:
    """Raise ValueError for a picture or folder that would overwrite something else."""
    if command.out and command.out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out {command.out}: the name must end in {', '.join(SUFFIXES)}")
    if command.out and command.out.is_dir():
        raise ValueError(f"--out {command.out} is a folder: name a file in it")
    if command.each and command.each.exists():
        if not command.each.is_dir():
            raise ValueError(f"--each {command.each} is a file: name a folder")
        if any(command.each.iterdir()):
            raise ValueError(f"--each {command.each} is not empty: name a new folder or empty it")


def run_command(command: Command) -> None:
    """Check, load, draw, write. Raises ValueError for a wrong command, FAILURES for the rest."""
    draw, name = choose(command)
    if not command.out and not command.each:
        command = replace(command, out=Path(name))
    check_places(command)
    trained = open_run(command.run_dir, command.checkpoint, command.ema, command.device, _warn)
    weights = "moving average of the weights" if trained.averaged else "weights as trained"
    _say(f"{trained.name} at {trained.images:,} images, {weights}, on {trained.device.type}")
    draw(command, trained)


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code: 2 for a wrong command, 1 for one that fails."""
    command = tyro.cli(Command, prog="python -m engine.sample", description=__doc__, args=arguments)
    try:
        run_command(command)
        return 0
    except ValueError as error:
        _say(f"error: {error}", sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        _say(f"error: out of memory, give a smaller --batch ({error})", sys.stderr)
    except FAILURES as error:
        _say(f"error: {error}", sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
