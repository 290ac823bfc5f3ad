"""What the playground's buttons do with a model: grids, walks and reconstructions, as files.

Every input is checked here, whoever sends it: a request need not come from the page.

Shapes: N images, C channels, H height, W width, L latent.
"""

import math
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from engine import pictures
from engine.latents import arcs
from engine.trained import Model
from pipelines.images import Fit, pixels_of

BATCH = 16  # images of one forward
LARGEST = 1 << 25  # pixels of a picture or an upload: float copies then stay below 2 GB
SEEDS = 2**32  # seeds are below; a browser's numbers are exact up to 2**53
NO_TRUNCATION = 4.0
STOPS = 9  # pictures in the strip of a walk
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
KEPT = 100  # newest files below the server's temporary folder; the rest is deleted


class Refused(ValueError):
    """An input that the page must not send; the message is for who sent it."""


@dataclass(frozen=True)
class Made:
    """One result: pictures and what is said of them. A name stands for one content only, because
    browsers keep what they have seen under it."""

    files: list[Path]
    text: str


class Studio:
    """What the page's buttons do with a model; its files lie in `folder`."""

    def __init__(self, model: Model, folder: Path, limit: int, upload_bytes: int) -> None:
        self.model, self.folder, self.upload_bytes = model, folder, upload_bytes
        self.limit = max(2, min(limit, LARGEST // model.resolution**2))
        self._one_at_a_time = threading.Lock()

    def latents(self, seed: Any, count: int, truncation: Any = NO_TRUNCATION) -> Tensor:
        """The first latents (count, L) of a seed, truncated."""
        seed = whole(seed, "seed", 0, SEEDS - 1)
        bound = number(truncation, "truncation", 0.1, NO_TRUNCATION)
        return truncate(self.model.latents(seed, torch.arange(count)), bound)

    def samples(self, seed: Any, count: Any, truncation: Any) -> Made:
        """A grid of a seed's first images."""
        count = whole(count, "number of images", 1, self.limit)
        images_NCHW = self._decode(self.latents(seed, count, truncation))
        name = f"{self.model.name}-seed{int(seed)}-{count}"
        if truncation < NO_TRUNCATION:
            name += f"-truncation{float(truncation)!r}"
        path = self._save(pictures.grid(images_NCHW), name, int(seed))
        return Made([path], self._account(images_NCHW))

    def walk(self, first: Any, second: Any, frames: Any) -> Made:
        """From a seed's first image to another's along the great arc, and back; GIF and strip."""
        frames = whole(frames, "number of pictures", 2, self.limit)
        start_1L, end_1L = (self.latents(seed, 1) for seed in (first, second))
        images_NCHW = self._decode(arcs(start_1L, end_1L, torch.linspace(0, 1, frames)))
        name = f"{self.model.name}-walk-seed{int(first)}-seed{int(second)}-{frames}"
        motion = self.folder / f"{name}.gif"
        there_and_back = torch.cat([images_NCHW, images_NCHW[1:-1].flip(0)])
        pictures.gif(there_and_back, motion, least=384, origin=self.model.origin(int(first)))
        stops = torch.linspace(0, frames - 1, min(frames, STOPS)).round().long()
        strip = self._save(pictures.strip(images_NCHW[stops], least=900), name, int(first))
        return Made([motion, strip], self._account(images_NCHW))

    def reconstruct(self, upload: Any) -> Made:
        """An uploaded image, and beside it what the model makes of it."""
        if not upload:
            raise Refused("choose an image first")
        original_1CHW = self._read(Path(upload))
        made_1CHW = self._forward(self.model.reconstruct, original_1CHW)
        picture = pictures.grid(torch.cat([original_1CHW, made_1CHW]), 2)
        origin = self.model.origin(0, composite=True)
        path = self.folder / f"{self.model.name}-reconstruction-{secrets.token_hex(4)}.png"
        pictures.save(picture, path, origin)
        error = (made_1CHW - original_1CHW).square().mean().sqrt() / 2
        text = f"left as the model sees it, right its reconstruction (RMS error {error:.3f})"
        return Made([path], f"{text}{broken(made_1CHW)}")

    def try_out(self) -> None:
        """Decode one latent. Raises ValueError if the model makes no images of latents."""
        next(self.model.decode(self.latents(0, 1), 1))

    def try_reconstructing(self) -> None:
        """Reconstruct one grey image. Raises ValueError if the model does not reconstruct."""
        side = self.model.resolution
        self._forward(self.model.reconstruct, torch.zeros(1, self.model.channels, side, side))

    def _decode(self, z_NL: Tensor) -> Tensor:
        with self._one_at_a_time:
            return torch.cat(list(self.model.decode(z_NL, BATCH)))

    def _forward(self, function: Callable[[Tensor], Tensor], images_NCHW: Tensor) -> Tensor:
        with self._one_at_a_time, torch.no_grad():
            return function(images_NCHW.to(self.model.device)).float().cpu()

    def _read(self, path: Path) -> Tensor:
        """An image file as the model takes it, (1, C, H, W) in [-1, 1]; bytes and pixels are looked
        at before anything is decoded."""
        if path.stat().st_size > self.upload_bytes:
            raise Refused(f"the file is larger than {self.upload_bytes / 2**20:g} MB")
        fit = Fit(self.model.resolution, self.model.channels)
        most = f"at most {LARGEST / 1e6:.0f} million are taken"
        try:
            with Image.open(path, formats=FORMATS) as image:
                if (pixels := image.width * image.height) > LARGEST:
                    raise Refused(f"the image has {pixels / 1e6:,.0f} million pixels; {most}")
                image.load()
                turned = ImageOps.exif_transpose(image)
                stored_HWC = fit.resized(pixels_of(turned, fit.channels), "the image")
        except Refused:
            raise
        except Image.DecompressionBombError as error:  # PIL's own limit, above this one
            raise Refused(f"the image has too many pixels; {most}") from error
        # PIL's readers raise whatever a broken file makes them stumble over (see pipelines.images)
        except Exception as error:
            kinds = ", ".join(FORMATS)
            raise Refused(f"this cannot be read as an image ({kinds} can)") from error
        return torch.from_numpy(fit.shown(stored_HWC[None])).float() / 127.5 - 1

    def _save(self, picture: Image.Image, name: str, seed: int) -> Path:
        path = self.folder / f"{name}.png"
        pictures.save(picture, path, self.model.origin(seed))
        return path

    def _account(self, images_NCHW: Tensor) -> str:
        side = self.model.resolution
        return f"{len(images_NCHW)} images of {side} × {side} pixels{broken(images_NCHW)}"


def truncate(z_NL: Tensor, bound: float) -> Tensor:
    """Standard normal latents (N, L) as if those beyond +-bound were drawn again (Brock et al.
    2019, "Large scale GAN training", section 3.1, the truncation trick); NO_TRUNCATION leaves all.

    The distribution function of one normal and the inverse of the other map each value to a
    truncated one, so that a seed's images change smoothly with the bound.
    """
    if bound >= NO_TRUNCATION:
        return z_NL
    least = torch.special.ndtr(torch.tensor(-bound, dtype=torch.float64, device=z_NL.device))
    share_NL = least + torch.special.ndtr(z_NL.double()) * (1 - 2 * least)
    return torch.special.ndtri(share_NL).clamp(-bound, bound).to(z_NL.dtype)


def broken(images_NCHW: Tensor) -> str:
    """A remark on images that hold values that are not a number."""
    count = int(images_NCHW.isnan().flatten(1).any(dim=1).sum())
    if not count:
        return ""
    return (
        f"; {count} hold values that are not a number (painted magenta): "
        "the network diverged, take an earlier checkpoint"
    )


def number(value: Any, name: str, least: float, most: float) -> float:
    """A finite number within its bounds, or Refused."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Refused(f"{name}: give a number from {least:,.10g} to {most:,.10g}")
    if not least <= value <= most:
        raise Refused(f"{name}: {value:,.10g} is not from {least:,.10g} to {most:,.10g}")
    return float(value)


def whole(value: Any, name: str, least: int, most: int) -> int:
    """A whole number within its bounds, or Refused."""
    if number(value, name, least, most) != int(value):
        raise Refused(f"{name}: {value:g} is not a whole number")
    return int(value)


def prune(folder: Path, kept: int = KEPT) -> None:
    """Delete all but the newest files below a folder."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    for old in sorted(files, key=lambda p: p.stat().st_mtime, reverse=True)[kept:]:
        old.unlink(missing_ok=True)
