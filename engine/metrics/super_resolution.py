"""How well does a model enlarge the images of benchmark sets? PSNR and SSIM beside bicubic.

The protocol that Ledig et al. 2017 (section 3.1) and most papers share: the original is cut to a
multiple of the scale and made smaller by antialiased bicubic, as for training; enlarged, rounded to
256 levels and compared on luminance (Y of ITU-R BT.601 in 16 to 235, of peak 255, not rounded)
without a border of `scale` pixels. Figures are means over a set's images.

Shapes: N images, C channels, H height, W width.
"""

import hashlib
import math
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.algorithm import Algorithm, Networks
from engine.metrics.evaluator import Evaluation
from engine.metrics.images import quantised
from engine.metrics.pairs import PSNR_CAP, SSIM_WINDOW
from engine.metrics.protocol import Protocol
from engine.settings import Recipe
from engine.steps.super_resolution import bicubic
from engine.tiles import in_tiles
from engine.world import Ranks
from pipelines import layouts
from pipelines.finish import smaller
from pipelines.images import BadImage, decode

LUMINANCE = (65.481 / 255, 128.553 / 255, 24.966 / 255)
"""Of R, G, B in 0 to 255 (ITU-R BT.601), above 16."""
METHOD = "Y of BT.601, border of scale pixels cut, smaller by antialiased bicubic"


@dataclass(frozen=True)
class BenchmarkProtocol(Protocol):
    """Of figures of enlarged images. sets: each with its number of images and a digest of them."""

    sets: str
    scale: int
    method: str
    ema: bool


class BenchmarkEvaluator:
    """Measures the networks of a recipe on folders of images."""

    def __init__(self, recipe: Recipe, folders: tuple[Path, ...], ranks: Ranks) -> None:
        """List the images. Raises ValueError for folders without any, or of one name, and for a
        recipe that does not enlarge."""
        self.recipe, self._device = recipe, ranks.device
        step = recipe.step
        able = type(step).translation is not Algorithm.translation
        self._kind = step.translation(recipe.data) if able else None
        if not self._kind or self._kind.scale == 1:
            raise ValueError("--sr is for runs that enlarge images, such as srgan_x4: leave it out")
        self._sets = listed(folders)

    def protocol(self, averaged: bool) -> BenchmarkProtocol:
        """What its figures are measured with."""
        sets = [
            f"{name} {len(paths)} images {_digest(paths)}" for name, paths in self._sets.items()
        ]
        return BenchmarkProtocol("; ".join(sets), self._kind.scale, METHOD, averaged)

    @torch.no_grad()
    def evaluate(self, networks: Networks, averaged: bool) -> Evaluation:
        """Measure these networks, in eval mode. averaged: whether they are moving averages, for
        the protocol. Raises BadImage."""
        began, values = time.monotonic(), {}
        for name, paths in self._sets.items():
            sums: Counter[str] = Counter()
            for path in paths:
                sums.update(self._figures(networks, path))
            values |= {f"{name} {figure}": total / len(paths) for figure, total in sums.items()}
        return Evaluation(values, self.protocol(averaged), time.monotonic() - began)

    def _figures(self, networks: Networks, path: Path) -> dict[str, float]:
        """Of one image: of the model and of bicubic."""
        goal_NCHW = original(path, self.recipe.data.channels, self._kind.scale).to(self._device)
        small_NCHW = smaller(goal_NCHW, self._kind.scale)
        make = partial(self.recipe.step.translate, networks, direction="AtoB")
        made = {
            "": in_tiles(make, small_NCHW, self._kind, None),
            "_bicubic": bicubic(small_NCHW, goal_NCHW.shape[2:]),
        }
        found = {}
        for suffix, images_NCHW in made.items():
            near = nearness(quantised(images_NCHW.cpu()), quantised(goal_NCHW), self._kind.scale)
            found |= {f"{figure}{suffix}": value for figure, value in near.items()}
        return found

    def close(self) -> None:
        """Nothing is held."""


def listed(folders: tuple[Path, ...]) -> dict[str, list[Path]]:
    """The images of each folder by its name. Raises ValueError."""
    sets: dict[str, list[Path]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--sr {folder}: there is no such folder")
        name = folder.resolve().name
        if name in sets:
            raise ValueError(f"--sr names two folders {name}: measure them one by one")
        sets[name] = [folder / found.decode() for found in layouts.list_images(folder)]
        if not sets[name]:
            raise ValueError(f"--sr {folder} holds no images ({' '.join(layouts.SUFFIXES)})")
    return sets


def original(path: Path, channels: int, scale: int) -> Tensor:
    """An image (1, C, H, W) in [-1, 1], cut to a multiple of the scale at the right and below.
    Raises BadImage where it is none, or too small to be measured."""
    try:
        pixels_HWC = decode(path.read_bytes(), str(path), channels)
    except OSError as error:
        raise BadImage.of(path, error) from error
    height, width = (side - side % scale for side in pixels_HWC.shape[:2])
    least = SSIM_WINDOW + 2 * scale
    if min(height, width) < least:
        text = f"{width}x{height} pixels are too few to enlarge {scale} times and measure: "
        raise BadImage.of(path, text + f"at least {least} a side")
    images_NHWC = torch.from_numpy(pixels_HWC[:height, :width].copy())[None]
    return images_NHWC.permute(0, 3, 1, 2).float() / 127.5 - 1


def luminance(images_NCHW: Tensor) -> Tensor:
    """Y (N, 1, H, W), float64 in 16 to 235, of uint8 images; grey ones are equal in R, G and B."""
    weights_311 = torch.tensor(LUMINANCE, dtype=torch.float64).view(3, 1, 1)
    shown_N3HW = images_NCHW.cpu().double().expand(-1, 3, -1, -1)
    return 16 + (shown_N3HW * weights_311).sum(1, keepdim=True)


def nearness(made_NCHW: Tensor, goal_NCHW: Tensor, border: int) -> dict[str, float]:
    """PSNR in dB and SSIM of a uint8 image on luminance, without a border of so many pixels."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    inner = (..., slice(border, -border), slice(border, -border))
    made, goal = (luminance(images)[inner] for images in (made_NCHW, goal_NCHW))
    error = float((made - goal).square().mean())
    psnr = min(10 * math.log10(255**2 / error), PSNR_CAP) if error else PSNR_CAP
    return {"psnr_y": psnr, "ssim_y": float(ssim(made, goal, data_range=255.0))}


def _digest(paths: list[Path]) -> str:
    """Of the files' content."""
    parts = hashlib.sha256()
    for path in paths:
        parts.update(hashlib.sha256(path.read_bytes()).digest())
    return parts.hexdigest()[:12]
