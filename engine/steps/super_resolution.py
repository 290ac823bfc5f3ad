"""Super-resolution: images enlarged to be near the originals, then to look as those do.

Ledig et al. 2017, "Photo-realistic single image super-resolution using a generative adversarial
network" (SRGAN), https://arxiv.org/abs/1609.04802. For so many iterations the generator G alone
learns by the mean squared error of pixels (SRResNet, equation 4); then G and the discriminator D
take turns:

    G    perceptual E[(phi(x) - phi(G(y)))^2] + pixels E[(x - G(y))^2] + adversarial E[-log D(G(y))]
    D    -E[log D(x)] - E[log(1 - D(G(y)))]

of images x and their smaller twins y (equations 2 to 6). phi are the features of VGG19 after
conv5_4 and its ReLU where --vgg gives the weights. Without them phi are D's own before its dense
layers, as of Larsen et al. 2016 (https://arxiv.org/abs/1512.09300, equation 8), and, since those
begin as random ones and change, the pixels count on: that is another loss than the paper's.

Shapes: N batch, C channels, H height, W width, F features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.algorithm import Algorithm, Networks, Values
from engine.losses import discriminator_loss, nonsaturating_loss
from engine.networks.spec import Network
from engine.networks.srgan import doublings
from engine.networks.vgg import LEAST, read_vgg
from engine.player import Player, frozen
from engine.settings import PlayerSettings
from engine.steps.adversarial import opinions
from engine.translation import Direction, Translation
from pipelines.batch import Batch
from pipelines.settings import Data

SHOWN = 16
"""Held-out images enlarged at a time."""


@dataclass(frozen=True)
class SuperResolution(Algorithm):
    """A generator that enlarges, and a discriminator that comes in later."""

    generator: PlayerSettings
    discriminator: PlayerSettings
    pretrain_steps: int = 1_000_000
    """Iterations in which the generator learns by pixels alone; in all that follow both learn."""
    vgg: Path | None = None
    """VGG19's weights for the perceptual loss: torchvision's file (.pth), or .safetensors; none
    takes the discriminator's features."""
    perceptual: float = 0.006
    """Weight of the mean squared difference of features."""
    pixels: float | None = None
    """Weight of that of pixels beside it; none takes 0 with --vgg and 1 without."""
    adversarial: float = 1e-3
    """Weight of the adversarial loss."""

    def check(self) -> None:
        for name in ("pretrain_steps", "perceptual", "pixels", "adversarial"):
            if (getattr(self, name) or 0) < 0:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {getattr(self, name)} must not be negative")

    def check_data(self, data: Data) -> None:
        if data.scale is None:
            raise ValueError("super-resolution learns from pairs: give --data.scale 4")
        doublings(data.scale)
        if self.vgg and data.resolution < LEAST:
            raise ValueError(
                f"--data.resolution {data.resolution} is too small for --vgg: give at least {LEAST}"
            )

    def kinds(self) -> tuple[int, ...]:
        return tuple(sorted({0, self.pretrain_steps}))

    def settles(self) -> int:
        """From when on both learn; costs are told of that, the dearer phase."""
        return self.pretrain_steps

    def pixel_weight(self) -> float:
        """What `pixels` comes to."""
        return self.pixels if self.pixels is not None else float(self.vgg is None)

    def notes(self) -> tuple[str, ...]:
        begins = f"perceptual loss (from iteration {self.pretrain_steps:,} on)"
        if self.vgg:
            return (f"{begins}: VGG19, {self.vgg}",)
        return (
            f"{begins}: no --vgg FILE, so the discriminator's own features in place of VGG19's, "
            f"and pixels with weight {self.pixel_weight():g}: not the paper's loss",
        )

    def translation(self, data: Data) -> Translation:
        return Translation(scale=data.scale, reach=self.generator.network.reach(data.scale))

    def translate(self, networks: Networks, images_NCHW: Tensor, direction: Direction) -> Tensor:
        """The larger images, float32, for [-1, 1]; there is one direction alone."""
        return networks["generator"](images_NCHW).float()

    def translator(self, networks: Networks, data: Data, direction: Direction) -> nn.Module:
        return networks["generator"]

    def translator_settings(self, direction: Direction) -> Network:
        return self.generator.network

    def remade(self, networks: Networks, batch: Batch) -> tuple[Tensor, Tensor]:
        generator = networks["generator"]
        made = [generator(part_NCHW).float() for part_NCHW in batch.pair_NCHW.split(SHOWN)]
        return torch.cat(made), batch.images_NCHW

    def trivial(self, batch: Batch) -> dict[str, Tensor]:
        return {"bicubic": bicubic(batch.pair_NCHW, batch.images_NCHW.shape[2:])}

    def columns(self, networks: Networks, batch: Batch) -> tuple[Tensor, ...]:
        """Bicubic, made, and as it should be."""
        return self.trivial(batch)["bicubic"], *self.remade(networks, batch)

    def turns(self, iteration: int) -> bool:
        """Whether pretraining is over."""
        return iteration >= self.pretrain_steps

    def start(self, players: dict[str, Player], key: Tensor) -> Callable[[Batch], Values]:
        generator, discriminator = players["generator"], players["discriminator"]
        vgg = read_vgg(self.vgg, generator.clock.device) if self.vgg else None
        weights = (self.perceptual, self.pixel_weight(), self.adversarial)
        fool = partial(perceptual_update, weights=weights)

        def step(batch: Batch) -> Values:
            small_NCHW, real_NCHW = batch.pair_NCHW, batch.images_NCHW
            if not self.turns(generator.clock.iteration):
                return generator.update(pixels_update, small_NCHW, real_NCHW)
            with frozen(discriminator) as critic:
                values = generator.update(fool, critic, vgg, small_NCHW, real_NCHW)
            made_NCHW = values.pop("generator/made")
            return values | discriminator.update(critic_update, real_NCHW, made_NCHW)

        return step


def bicubic(images_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """The images enlarged to (height, width), in [-1, 1]. torch's kernel with antialias is that of
    MATLAB and PIL (a = -1/2), without it is OpenCV's (a = -3/4); for enlarging both take 4x4."""
    large_NCHW = F.interpolate(images_NCHW, size, mode="bicubic", antialias=True)
    return large_NCHW.clamp(-1, 1)


def pixels_update(
    generator: nn.Module, small_NCHW: Tensor, real_NCHW: Tensor
) -> tuple[Tensor, Values]:
    """The mean squared error of pixels (Ledig et al. 2017, equation 4)."""
    loss = F.mse_loss(generator(small_NCHW).float(), real_NCHW)
    return loss, {"pixels": loss}


def perceptual_update(
    generator: nn.Module,
    critic: nn.Module,
    vgg: nn.Module | None,
    small_NCHW: Tensor,
    real_NCHW: Tensor,
    *,
    weights: tuple[float, float, float],
) -> tuple[Tensor, Values]:
    """The generator's loss with the weights of features, pixels and the adversarial loss; these
    three, and the images for the discriminator. Means are over channels too."""
    made_NCHW = generator(small_NCHW)
    seen_NCHW = critic.features(made_NCHW)
    if vgg is None:
        apart = critic.features(real_NCHW), seen_NCHW
    else:
        apart = vgg(real_NCHW), vgg(made_NCHW)
    values = {
        "features": F.mse_loss(*(features.float() for features in apart)),
        "pixels": F.mse_loss(made_NCHW.float(), real_NCHW),
        "adversarial": nonsaturating_loss(critic.dense(seen_NCHW)),
    }
    loss = sum(weight * value for weight, value in zip(weights, values.values(), strict=True))
    return loss, values | {"made": made_NCHW}


def critic_update(critic: nn.Module, real_NCHW: Tensor, made_NCHW: Tensor) -> tuple[Tensor, Values]:
    """The discriminator's loss (Ledig et al. 2017, equation 2), and what it thinks of originals and
    of enlarged images, which go through it one after the other."""
    real_N, made_N = critic(real_NCHW), critic(made_NCHW.to(real_NCHW))
    return discriminator_loss(real_N, made_N), opinions(real_N, made_N, "nonsaturating")
