"""The pictures of engine.sample: its settings, and what draws each kind.

Shapes: N images, C channels, H height, W width, L latent.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from PIL import Image
from torch import Tensor, nn

from engine import anomalies, attention, latents, pictures
from engine.algorithm import Algorithm
from engine.losses import gaussian_kl
from engine.origin import Origin
from engine.originals import originals, rows_over_rows
from engine.steps.anomaly import Anomaly
from engine.steps.autoencoder import Variational
from engine.trained import Model, Trained
from engine.verb import say
from pipelines.datasets import DatasetMissing

LARGEST = 1 << 25  # pixels of a picture: float images and their copies then stay below 2 GB
SPREAD, COLUMNS = 3.0, 9  # a traversal goes from -SPREAD to SPREAD in COLUMNS pictures
KL_IMAGES = 512  # images by which latents are ranked


class SampleError(RuntimeError):
    """What was asked for cannot be made from this run, though the command is right."""


@dataclass(frozen=True)
class Data:
    """Where the run's dataset lies now, if not where it lay then (--reconstruct, --traverse,
    --anomaly)."""

    root: Path | None = None
    """Folder that holds the datasets."""
    path: Path | None = None
    """Folder of this very dataset."""


@dataclass(frozen=True)
class Command:
    """One sampling command."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory, as `engine.train` names it at its end; or an export's folder or file."""
    num: int | None = None
    """Images (64); stops of a walk (5); images to reconstruct (16); latents to traverse (10);
    images with heat maps (16, half of them anomalies)."""
    seed: int = 0
    """Seed of the latents and of the choice of dataset images; image k of a seed is always the
    same, whatever --num is."""
    out: Path | None = None
    """Picture to write (.png, .jpg, .webp); default: grid.png, walk.png, reconstruction.png,
    traversal.png, anomaly.png or caption.png here. Folders are made, a picture of that name is
    replaced."""
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
    label: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """Number of the class of all samples, for models that are given one."""
    by_class: bool = False
    """A row of samples for each class; --num (8) is the number in a row."""
    caption: str | None = None
    """For text-to-image models: what --num (8) samples are to show, in 18 words. More words, and
    those that the model has never read, are left out and named."""
    anomaly: bool = False
    """For anomaly detectors: held-out images, first normal ones and then of the classes that were
    left out of training, over their reconstructions and heat maps; their scores are printed."""
    attention: bool = False
    """For self-attention GANs: samples beside maps of where marked places look; with --caption:
    samples (4) beside maps of where each word went."""
    ema: bool = True
    """Take the moving average of the weights where the run keeps one."""
    checkpoint: int | Literal["best"] | None = None
    """Images seen at the checkpoint to take, or the best one measured; default: the newest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    batch: int = 64
    """Images made at a time."""
    data: Data = field(default_factory=Data)


def dataset_images(trained: Trained, data: Data, seed: int, count: int) -> tuple[Tensor, str]:
    """Up to `count` images (N, C, H, W) of the run's dataset, on the host, and which they are.

    Held-out ones, or training images where the dataset has no others.
    """
    try:
        return originals(trained.data_at(data), seed, count)
    except DatasetMissing as error:
        reason = str(error).split("\n")[0]
        raise SampleError(f"{reason}; --data.root or --data.path says where it is") from error


def samples(command: Command, model: Model) -> None:
    """A grid, single files, or both."""
    count, label_N = which_samples(command, model)
    made = model.samples(command.seed, count, command.batch, label_N)
    columns = count // model.classes() if command.by_class else None
    write_samples(command, model, count, made, f"{count} samples", columns)


def write_samples(
    command: Command,
    model: Model,
    count: int,
    made: Iterable[Tensor],
    what: str,
    columns: int | None = None,
) -> None:
    """A grid, single files, or both, of `count` images that come in batches (N, C, H, W)."""
    first, kept, origin = 0, [], model.origin(command.seed)
    if command.out:
        check_size(model, count, "--num")
    for images_NCHW in made:
        if command.each:
            _save_each(images_NCHW, command.each, first, origin)
        if command.out:
            kept.append(images_NCHW)
        first += len(images_NCHW)
    if command.each:
        say(f"wrote {count:,} images to {command.each}")
    if command.out:
        write(pictures.grid(torch.cat(kept), columns), command.out, what, origin)


def which_samples(command: Command, model: Model) -> tuple[int, Tensor | None]:
    """How many samples, and their classes (N,) where those are not the seed's choice.

    Raises ValueError for a class that the model does not know.
    """
    classes = model.classes()
    if command.label is None and not command.by_class:
        return command.num or 64, None
    if not classes:
        raise ValueError(
            f"--class and --by-class: {model.name} is given no classes; leave them out"
        )
    if command.by_class:
        each = command.num or 8
        return classes * each, torch.arange(classes).repeat_interleave(each)
    if not 0 <= command.label < classes:
        raise ValueError(f"--class {command.label}: {model.name} knows 0 to {classes - 1}")
    count = command.num or 64
    return count, torch.full((count,), command.label)


def check_size(model: Model, count: int, flags: str) -> None:
    """Raise ValueError if so many images are too much for one picture."""
    if (most := LARGEST // model.resolution**2) < count:
        raise ValueError(
            f"{count:,} images are too many for one picture (at most {most:,} at this resolution): "
            f"lower {flags}, or write single files with --each alone"
        )


def _save_each(images_NCHW: Tensor, folder: Path, first: int, origin: Origin) -> None:
    try:
        pictures.save_each(images_NCHW, folder, first, origin)
    except ValueError as error:  # not a number: the run is at fault, not the command
        raise SampleError(str(error)) from error


def walk(command: Command, model: Model) -> None:
    """A strip and an animation."""
    stops, origin = command.num or 5, model.origin(command.seed)
    check_size(model, stops * command.frames, "--num or --frames")
    z_NL = latents.walk(model.latents(command.seed, torch.arange(stops)), command.frames)
    images_NCHW = torch.cat(list(model.decode(z_NL, command.batch)))
    what = f"a closed walk through {stops} latents, {len(images_NCHW)} pictures"
    write(pictures.strip(images_NCHW), command.out, what, origin)
    pictures.gif(images_NCHW, command.out.with_suffix(".gif"), origin=origin)
    say(f"wrote {command.out.with_suffix('.gif')}: the same in motion")


def reconstructions(command: Command, trained: Trained) -> None:
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
    what = f"{len(made_NCHW)} {label} over their reconstructions"
    write(picture, command.out, what, trained.origin(command.seed, composite=True))


def traversal(command: Command, trained: Trained) -> None:
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
    write(pictures.grid(images_NCHW, COLUMNS), command.out, what, trained.origin(command.seed))


def heat_maps(command: Command, trained: Trained) -> None:
    """Normal images and anomalies, each over its reconstruction and its heat map."""
    step, networks = trained.recipe.step, trained.networks
    if not isinstance(step, Anomaly):
        raise ValueError(f"--anomaly is for detectors such as anogan_mnist, not {trained.name}")
    if trained.images <= (begins := step.gan_steps * trained.recipe.data.batch):
        raise SampleError(
            f"the encoder of {trained.name} learns after {begins:,} images and this is its "
            f"checkpoint at {trained.images:,}: train on"
        )
    columns = max((command.num or 16) // 2, 1)
    check_size(trained, 6 * columns, "--num")
    rows_NCHW, data = [], trained.data_at(command.data)
    groups = anomalies.normal_and_anomalous(data, command.seed, columns)
    for group in groups:
        images_NCHW = group.images_NCHW.to(trained.device)
        with torch.no_grad():
            made_NCHW = step.reconstruct(networks, images_NCHW)
            heat_N1HW = step.heat(networks, images_NCHW)
            score_N = step.scores(networks, images_NCHW)["score"]
        rows_NCHW.append(anomalies.columns_of(images_NCHW, made_NCHW, heat_N1HW).cpu())
        say(f"scores, {group.name}: " + " ".join(f"{score:.3f}" for score in score_N.tolist()))
    picture = pictures.grid(torch.cat(rows_NCHW), len(groups[0].images_NCHW))
    what = f"{' and '.join(group.name for group in groups)} over reconstructions and heat maps"
    write(picture, command.out, what, trained.origin(command.seed, composite=True))


def write(picture: Image.Image, path: Path, what: str, origin: Origin) -> None:
    """Save a picture and say what it shows."""
    replaced = " (replaced)" if path.exists() else ""
    pictures.save(picture, path, origin)
    say(f"wrote {path}{replaced}: {what}")


def attention_maps(command: Command, trained: Trained) -> None:
    """Samples beside maps of where their self-attention looks."""
    count, network = command.num or 6, trained.networks.get("generator", nn.Module())
    attention.layer_of(network)
    check_size(trained, count * attention.COLUMNS, "--num")
    z_NL = trained.latents(command.seed, torch.arange(count))
    picture_N3HW = attention.drawn(network, lambda: trained.forward(z_NL)).cpu()
    what = f"{count} samples, and what the marked places take from where"
    origin = trained.origin(command.seed, composite=True)
    write(pictures.grid(picture_N3HW, attention.COLUMNS), command.out, what, origin)
