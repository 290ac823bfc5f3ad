"""How does `engine.translate --mask` repair image files? By what their masks show, pixel by pixel.

What a mask leaves black stays exactly as it was, to the last bit: 16-bit grey images stay such with
a model of one channel. The network sees 8-bit values as it was trained on, and 16-bit ones by the
run's `--data.window`, not rounded.

Shapes: H height, W width, C channels.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.algorithm import Algorithm
from engine.run import RunError
from engine.tiles import padded
from engine.trained import Trained
from pipelines import layouts
from pipelines.images import BadImage, decode, sixteen_bits, size_of

WHITE = 128
"""Of 0 to 255: from where on a pixel of a mask counts as white."""
SIXTEEN = 65535


class Unsuitable(ValueError):
    """An image that the model cannot repair as it is."""


def check_mask(trained: Trained, mask: Path | None) -> None:
    """Raise ValueError where the model repairs by a mask and none is given, or the other way
    round."""
    masked = type(trained.recipe.step).repair is not Algorithm.repair
    if masked and mask is None:
        raise ValueError(
            f"{trained.name} repairs what a mask shows: give --mask MASK, an image that is white "
            f"there, or a folder of such images with the names of the inputs"
        )
    if mask is not None and not masked:
        raise ValueError(
            f"--mask is for models that repair images, such as inpaint_celeba: leave it out for "
            f"{trained.name}"
        )


def masks_of(mask: Path, files: dict[str, Path]) -> dict[str, Path]:
    """The mask of each image: the one file, or that of its name in the folder. Raises ValueError
    for one that is missing or does not fit, BadImage for one that cannot be read."""
    if not mask.exists():
        raise ValueError(f"--mask {mask}: there is no such file or folder")
    found = _by_name(mask) if mask.is_dir() else dict.fromkeys(files, mask)
    for name, path in files.items():
        if name not in found:
            raise ValueError(f"--mask {mask} has none for {path}: put {name}.png there")
    chosen = {name: found[name] for name in files}
    for place in dict.fromkeys(chosen.values()):
        hole_HW = read_hole(place)
        for path in (files[name] for name, one in chosen.items() if one == place):
            size = size_of(path)  # none: decoding will say why
            if size and size != hole_HW.shape[::-1]:
                (wide, high), (height, width) = size, hole_HW.shape
                raise ValueError(
                    f"the mask {place} has {width}x{height} pixels and {path} has {wide}x{high}: "
                    f"give a mask of the image's size"
                )
    return chosen


def _by_name(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in (folder / name.decode() for name in layouts.list_images(folder)):
        if found.setdefault(path.stem, path) != path:
            raise ValueError(f"{found[path.stem]} and {path} are masks of one name: leave one out")
    return found


def read_hole(path: Path) -> np.ndarray:
    """Where a mask is white and not transparent, bool (H, W). Raises BadImage, and ValueError where
    that is nowhere or everywhere."""
    content = _content(path)
    grey_HW = decode(content, str(path), 1)[..., 0]
    with Image.open(io.BytesIO(content)) as image:
        if image.has_transparency_data:
            grey_HW = np.minimum(grey_HW, np.asarray(image.convert("RGBA").getchannel("A")))
    hole_HW = grey_HW >= WHITE
    if hole_HW.all():
        raise ValueError(f"the mask {path} is white all over: leave black what is to stay")
    if not hole_HW.any():
        raise ValueError(
            f"the mask {path} is black all over (its largest value is {int(grey_HW.max())} of 255, "
            f"white is {WHITE} or more): make white what is to be repaired"
        )
    return hole_HW


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadImage.of(path, error) from error


@dataclass(frozen=True)
class Picture:
    """An image's own values, and which of them are black and white to a network."""

    pixels_HWC: np.ndarray
    """uint8, or uint16 with one channel."""
    black: int
    white: int

    @classmethod
    def read(cls, path: Path, channels: int, window: tuple[int, int] | None) -> "Picture":
        """Of a file of any mode. Raises BadImage, and Unsuitable for 16 bits and a colour model."""
        content = _content(path)
        pixels_HWC = decode(content, str(path), channels)  # also says what is wrong with it
        if not sixteen_bits(content):
            return cls(pixels_HWC, 0, 255)
        if channels != 1:
            raise Unsuitable(
                f"{path} has 16-bit pixels, of which a model of colour images would leave 8: take "
                f"a run of --data.channels 1"
            )
        with Image.open(io.BytesIO(content)) as image:
            values_HW = np.asarray(image).astype(np.int64)
        if values_HW.min() < 0 or values_HW.max() > SIXTEEN:
            raise BadImage.of(path, f"it has values outside of 0 to {SIXTEEN}, which 16 bits hold")
        return cls(values_HW[..., None].astype(np.uint16), *(window or (0, SIXTEEN)))

    def images(self) -> Tensor:
        """float32 (1, C, H, W) in [-1, 1]."""
        share_HWC = (self.pixels_HWC.astype(np.float64) - self.black) / (self.white - self.black)
        images_HWC = torch.from_numpy((2 * share_HWC - 1).clip(-1, 1)).float()
        return images_HWC.permute(2, 0, 1)[None].contiguous()

    def filled(self, hole_HW: np.ndarray, made_HWC: np.ndarray) -> Image.Image:
        """With other values, in [-1, 1], in the hole."""
        values_HWC = self.black + (made_HWC.astype(np.float64) + 1) / 2 * (self.white - self.black)
        kind = self.pixels_HWC.dtype
        values_HWC = values_HWC.round().clip(0, np.iinfo(kind).max).astype(kind)
        pixels_HWC = np.where(hole_HW[..., None], values_HWC, self.pixels_HWC)
        return Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[2] == 1 else pixels_HWC)


@torch.no_grad()
def repaired(trained: Trained, path: Path, mask: Path) -> Image.Image:
    """The image of a file with what the mask shows repaired: 16-bit grey, 8-bit grey or RGB. Raises
    what reading it does, and RunError where the network makes no numbers."""
    data, step = trained.recipe.data, trained.recipe.step
    picture, hole_HW = Picture.read(path, trained.channels, data.window), read_hole(mask)
    height, width = hole_HW.shape
    both = picture.images(), torch.from_numpy(hole_HW)[None, None].float()
    multiple = step.translation(data).multiple
    given_NCHW = padded(torch.cat(both, 1).to(trained.device), multiple)
    made_NCHW = step.repair(trained.networks, given_NCHW[:, :-1], given_NCHW[:, -1:] > 0)
    made_HWC = made_NCHW[0, :, :height, :width].permute(1, 2, 0).cpu().numpy()
    if not np.isfinite(made_HWC).all():
        raise RunError(
            f"{path}: the repaired image has values that are not a number; the network diverged: "
            f"take an earlier --checkpoint"
        )
    return picture.filled(hole_HW, made_HWC)
