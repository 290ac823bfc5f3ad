"""Translate, enlarge or repair images by a run, or draw them in the style of another image:
python -m engine.translate RUN_DIR INPUT... --out DIR.

Inputs are image files or folders of them, of any size, grey or colour; what is transparent is laid
over white. They are padded by reflection to what the networks need, and the result is cut back;
large ones are enlarged square by square. In place of RUN_DIR an export's folder may stand, or its
model.safetensors, model.onnx or model.pt2. Each becomes DIR/NAME.png, marked as generated; with
several images or folders of them for --style, DIR/NAME-STYLE.png. What a mask shows in white is
repaired, and the rest stays as it is, also in 16-bit grey images.

    python -m engine.translate runs/cyclegan_horse2zebra/RUN horses/ --direction AtoB --out zebras/
    python -m engine.translate runs/srgan_x4/RUN photos/ --out large/
    python -m engine.translate runs/style_transfer/RUN photos/ --style picasso.jpg --out drawn/
    python -m engine.translate runs/inpaint_celeba/RUN faces/ --mask masks/ --out repaired/
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from engine import pictures, stylise
from engine.algorithm import Algorithm
from engine.checkpoint import CheckpointError
from engine.exported import ONE_CHECKPOINT, check_flags, is_export, open_export
from engine.repair import Unsuitable, check_mask, masks_of, repaired
from engine.run import RunError
from engine.tiles import check_side, in_tiles, padded, padded_side
from engine.trained import Model, Trained, open_run
from engine.translation import DIRECTIONS, Direction, Translation
from engine.verb import exit_code, say, warn
from engine.whole import check_place
from pipelines import layouts
from pipelines.images import BadImage, decode, size_of

FAILURES = (RunError, CheckpointError, BadImage, OSError)


@dataclass(frozen=True)
class Command:
    """One translation."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory, as `engine.train` names it at its end; or an export's folder or file."""
    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, or folders of them."""
    out: Path
    """Folder to write to; pictures of the same names are replaced."""
    direction: Direction | None = None
    """From which domain to which, where the model has two; default: the run's own, AtoB where it
    goes both ways."""
    mask: Path | None = None
    """For models that repair: an image of the inputs' size, white where to repair (128 of 255 or
    more, not transparent), or a folder of such with the names of the inputs."""
    tile: int | None = None
    """Side of the squares in which large images are enlarged, in pixels of the input; 0 takes each
    image whole; default 256."""
    style: tuple[Path, ...] = ()
    """For models that draw in the style of an image: that image, of any size, or several."""
    alpha: float = 1.0
    """How much of the style they take, from 0 (the content alone) to 1."""
    ema: bool = True
    """Take the moving average of the weights where the run keeps one."""
    checkpoint: int | Literal["best"] | None = None
    """Images seen at the checkpoint to take, or the best one measured; default: the newest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""


def files_of(inputs: tuple[Path, ...]) -> dict[str, Path]:
    """The image files by the names of their translations. Raises ValueError where there is none,
    or two of one name."""
    found: dict[str, Path] = {}
    for place in inputs:
        if not place.exists():
            raise ValueError(f"{place}: there is no such file or folder")
        paths = [place]
        if place.is_dir():
            paths = [place / name.decode() for name in layouts.list_images(place)]
            if not paths:
                raise ValueError(f"{place} holds no images ({' '.join(layouts.SUFFIXES)})")
        for path in paths:
            if found.setdefault(path.stem, path) != path:
                raise ValueError(
                    f"{found[path.stem]} and {path} would both become {path.stem}.png: translate "
                    f"them into different folders"
                )
    if not found:
        raise ValueError("give image files or folders to translate")
    return found


def read(path: Path, channels: int) -> Tensor:
    """An image (1, C, H, W), float32 in [-1, 1], of any mode (see `to_channels`). Raises
    BadImage."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadImage.of(path, error) from error
    pixels_HWC = np.array(decode(content, str(path), channels))  # PIL's cannot be written to
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None].float() / 127.5 - 1


@torch.no_grad()
def translated(
    image_NCHW: Tensor, make: stylise.Make, kind: Translation, side: int | None
) -> Tensor:
    """What `make` makes of an image, of its size times the scale, on the host; in squares of that
    side (see `in_tiles`)."""
    height, width = image_NCHW.shape[2:]
    given_NCHW = padded(image_NCHW, kind.multiple, kind.least)
    made_NCHW = in_tiles(make, given_NCHW, kind, side)
    return made_NCHW[:, :, : kind.scale * height, : kind.scale * width]


def open_model(command: Command) -> Model:
    """The run or the export that a command names. Raises ValueError, FAILURES."""
    place = command.run_dir
    if not is_export(place):
        return open_run(place, command.checkpoint, command.ema, command.device, warn)
    check_flags(
        place,
        ("--mask", command.mask is not None, "models that repair are not exported"),
        ("--style", bool(command.style), "models that take a style are not exported"),
        ("--checkpoint", command.checkpoint is not None, ONE_CHECKPOINT),
        ("--no-ema", not command.ema, ONE_CHECKPOINT),
    )
    return open_export(place, command.device, warn)


def kind_of(model: Model, command: Command, styles: dict[str, Path]) -> Translation:
    """How the model takes images, with the one direction that is commanded where it has any. Raises
    ValueError where it takes none, or not as commanded."""
    if isinstance(model, Trained):
        check_run(model, command.mask)
    kind = model.translation()
    check_side(command.tile, kind)
    whose = model.name if isinstance(model, Trained) else f"the export {command.run_dir}"
    way = kind.chosen(command.direction, whose)
    if isinstance(model, Trained):
        stylise.check_model(model, styles)
    return replace(kind, directions=(way,) if kind.directions else ())


def check_run(trained: Trained, mask: Path | None) -> None:
    """Raise ValueError where a run's model takes no images, or no mask, or needs one."""
    check_mask(trained, mask)
    if type(trained.recipe.step).translation is Algorithm.translation:
        raise ValueError(
            f"{trained.name} makes no images of images: take a run of cyclegan_horse2zebra, "
            f"pix2pix_facades, srgan_x4, inpaint_celeba or style_transfer"
        )


def check_sizes(files: dict[str, Path], kind: Translation) -> None:
    """Raise ValueError for an image that is not of the one size that an export takes."""
    for path in files.values() if kind.side else ():
        size = size_of(path)  # none: decoding will say why
        sides = {padded_side(x, kind.multiple, kind.least) for x in size or ()}
        if size and sides != {kind.side}:
            raise ValueError(
                f"{path} has {size[0]}x{size[1]} pixels, and this export takes {kind.side}x"
                f"{kind.side} alone: resize it, or give the run directory"
            )


def makers(
    model: Model, command: Command, kind: Translation, styles: dict[str, Path]
) -> dict[str, stylise.Make]:
    """What makes images of images, by the style, or alone without a name. Raises BadImage."""
    if styles:
        images = {name: read(path, model.channels) for name, path in styles.items()}
        return {name: stylise.maker(model, x, command.alpha) for name, x in images.items()}
    return {"": partial(model.translate, direction=(kind.directions or DIRECTIONS)[0])}


def how(command: Command, kind: Translation, styles: dict[str, Path]) -> str:
    """What is done, in words."""
    if command.mask:
        return f"repairing what {command.mask} shows"
    if styles:
        return f"in the style of {', '.join(styles)}"
    if kind.directions:
        return kind.directions[0]
    return f"{kind.scale} times larger"


def run_command(command: Command) -> None:
    """Check, load, translate, write. Raises ValueError for a wrong command, FAILURES otherwise."""
    files = files_of(command.inputs)
    styles = files_of(command.style) if command.style else {}
    masks = masks_of(command.mask, files) if command.mask else {}
    stylise.check_flags(styles, command.alpha)
    wanted = stylise.targets(list(files), list(styles or [""]))
    given = {path.resolve() for part in (files, styles, masks) for path in part.values()}
    for *_, name in wanted:
        place = command.out / f"{name}.png"
        if place.resolve() in given:
            raise ValueError(
                f"--out {command.out} would replace the input {place.name}: give another"
            )
        check_place(place)
    model = open_model(command)
    kind = kind_of(model, command, styles)
    check_sizes(files, kind)
    makes = makers(model, command, kind, styles)
    say(f"{model.name} at {model.images:,} images, {how(command, kind, styles)}")
    origin, left_out = model.origin(0, composite=bool(masks)), []
    for given_name, style, name in wanted:
        path = files[given_name]
        try:
            if masks:
                picture = repaired(model, path, masks[given_name])
            else:
                given_NCHW = read(path, model.channels).to(model.device)
                made_NCHW = translated(given_NCHW, makes[style], kind, command.tile)
                picture = pictures.grid(made_NCHW, pad=0, least=0)
        except (BadImage, Unsuitable) as error:
            left_out.append(str(error))
            continue
        pictures.save(picture, command.out / f"{name}.png", origin)
    if len(left_out) < len(wanted):
        say(f"wrote {len(wanted) - len(left_out):,} images to {command.out}")
    for reason in left_out[:-1]:
        warn(f"left out: {reason}")
    if left_out:
        raise BadImage(left_out[-1] if len(wanted) == 1 else f"left out: {left_out[-1]}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code: 2 for a wrong command, 1 for one that fails."""
    command = tyro.cli(
        Command, prog="python -m engine.translate", description=__doc__, args=arguments
    )
    return exit_code(lambda: run_command(command), FAILURES)


if __name__ == "__main__":
    sys.exit(main())
