"""Repair: a generator that fills the holes of images, a discriminator that sees where they were.

Yu et al. 2019, "Free-form image inpainting with gated convolution" (DeepFill v2),
https://arxiv.org/abs/1806.03589, sections 3.3 and 3.4, with the weights of holes and of what is
known of Liu et al. 2018, "Image inpainting for irregular holes using partial convolutions",
https://arxiv.org/abs/1804.07723, equations 1 and 7:

    generator       hole E[|m (x - G)|] + valid E[|(1 - m) (x - G)|] - adversarial E[D(y, m)]
    discriminator   E[max(0, 1 - D(x, m))] + E[max(0, 1 + D(y, m))]

of images x with holes m (1 there), made images G, and repaired ones y = m G + (1 - m) x, in which
what is known stays as it is. E is over all pixels, known or not, and over all of D's outputs.

Shapes: N batch, C channels, H height, W width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import masks
from engine.algorithm import Algorithm, Networks, Values
from engine.losses import critic_generator_loss, hinge_discriminator_loss
from engine.networks.inpaint import MULTIPLE
from engine.player import Player, frozen
from engine.settings import PlayerSettings
from engine.steps.adversarial import opinions
from engine.translation import Translation
from kernels import philox
from pipelines.batch import Batch
from pipelines.settings import Data

HOLES, SHOWN = 12, 14
"""Noise streams, two each: of the holes that are trained on, and of those of held-out images."""
AT_ONCE = 32
"""Held-out images repaired at a time."""


@dataclass(frozen=True)
class Inpainting(Algorithm):
    """A generator and a discriminator."""

    generator: PlayerSettings
    discriminator: PlayerSettings
    boxes: float = 0.5
    """Share of images with a box for a hole; the others have free-form strokes."""
    hole: float = 6.0
    """Weight of the mean absolute difference in holes (Liu et al. 2018; 1 in DeepFill v2)."""
    valid: float = 1.0
    """Weight of that outside of them."""
    adversarial: float = 1.0
    """Weight of the adversarial loss."""

    def check(self) -> None:
        if not 0 <= self.boxes <= 1:
            raise ValueError(f"--boxes {self.boxes} must be from 0 to 1")
        for name in ("hole", "valid", "adversarial"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} must not be negative")

    def translation(self, data: Data) -> Translation:
        return Translation(multiple=MULTIPLE)

    def repair(self, networks: Networks, images_NCHW: Tensor, hole_N1HW: Tensor) -> Tensor:
        made_NCHW = networks["generator"](images_NCHW, hole_N1HW).float()
        return torch.where(hole_N1HW, made_NCHW, images_NCHW)

    def holes(self, batch: Batch) -> Tensor:
        """Those of held-out images, bool (N, 1, H, W): the same at every moment and in every run
        with the same share of boxes."""
        key = philox.make_key(0, device=batch.images_NCHW.device)
        size = tuple(batch.images_NCHW.shape[2:])
        return masks.draw(key, SHOWN, batch.position_N, size, self.boxes)

    def remade(self, networks: Networks, batch: Batch) -> tuple[Tensor, Tensor]:
        parts = zip(batch.images_NCHW.split(AT_ONCE), self.holes(batch).split(AT_ONCE), strict=True)
        return torch.cat([self.repair(networks, *part) for part in parts]), batch.images_NCHW

    def trivial(self, batch: Batch) -> dict[str, Tensor]:
        """mean: holes in the mean colour of what is known of their image. surroundings: filled
        smoothly from what is around them (see `spread`)."""
        images_NCHW, hole_N1HW = batch.images_NCHW, self.holes(batch)
        known_N1HW = (~hole_N1HW).float()
        count_N111 = known_N1HW.sum((2, 3), keepdim=True).clamp(min=1)
        mean_NC11 = (images_NCHW * known_N1HW).sum((2, 3), keepdim=True) / count_N111
        return {
            "mean": torch.where(hole_N1HW, mean_NC11, images_NCHW),
            "surroundings": torch.where(hole_N1HW, spread(images_NCHW, known_N1HW), images_NCHW),
        }

    def columns(self, networks: Networks, batch: Batch) -> tuple[Tensor, ...]:
        """With holes, as repaired, and as it was."""
        repaired_NCHW, images_NCHW = self.remade(networks, batch)
        return torch.where(self.holes(batch), 0.0, images_NCHW), repaired_NCHW, images_NCHW

    def start(self, players: dict[str, Player], key: Tensor) -> Callable[[Batch], Values]:
        generator, discriminator = players["generator"], players["discriminator"]
        weights = (self.hole, self.valid, self.adversarial)
        fool = partial(repairing_update, boxes=self.boxes, weights=weights)

        def step(batch: Batch) -> Values:
            real_NCHW = batch.images_NCHW
            with frozen(discriminator) as critic:
                values = generator.update(fool, critic, real_NCHW, key, batch.position_N)
            repaired = [values.pop(f"generator/{name}") for name in ("repaired", "holes")]
            return values | discriminator.update(judging_update, real_NCHW, *repaired)

        return step


def spread(images_NCHW: Tensor, known_N1HW: Tensor) -> Tensor:
    """Images filled where nothing is known (0; 1 elsewhere) by the mean of what is known around, at
    the least scale at which anything is: the pull and push of Gortler et al. 1996, "The lumigraph",
    section 3.4. (N, C, H, W)."""
    height, width = images_NCHW.shape[2:]
    if height == width == 1:
        return images_NCHW
    half = (height + 1) // 2, (width + 1) // 2
    share_N1hw = F.adaptive_avg_pool2d(known_N1HW, half)
    mean_NChw = F.adaptive_avg_pool2d(images_NCHW * known_N1HW, half) / share_N1hw.clamp(min=1e-6)
    coarse_NChw = spread(mean_NChw, (share_N1hw > 0).float())
    rest_NCHW = F.interpolate(coarse_NChw, (height, width), mode="bilinear")
    return torch.where(known_N1HW > 0, images_NCHW, rest_NCHW)


def repairing_update(
    generator: nn.Module,
    critic: nn.Module,
    real_NCHW: Tensor,
    key: Tensor,
    position_N: Tensor,
    *,
    boxes: float,
    weights: tuple[float, float, float],
) -> tuple[Tensor, Values]:
    """The generator's loss with the weights of holes, of what is known and of the adversarial loss;
    these three, and for the discriminator the repaired images and where their holes were."""
    hole_N1HW = masks.draw(key, HOLES, position_N, tuple(real_NCHW.shape[2:]), boxes)
    made_NCHW = generator(real_NCHW, hole_N1HW).float()
    repaired_NCHW = torch.where(hole_N1HW, made_NCHW, real_NCHW)
    apart_NCHW = (made_NCHW - real_NCHW).abs()
    values = {
        "l1_hole": torch.where(hole_N1HW, apart_NCHW, 0.0).mean(),
        "l1_valid": torch.where(hole_N1HW, 0.0, apart_NCHW).mean(),
        "adversarial": critic_generator_loss(critic(repaired_NCHW, hole_N1HW)),
    }
    loss = sum(weight * value for weight, value in zip(weights, values.values(), strict=True))
    return loss, values | {"repaired": repaired_NCHW, "holes": hole_N1HW}


def judging_update(
    critic: nn.Module, real_NCHW: Tensor, repaired_NCHW: Tensor, hole_N1HW: Tensor
) -> tuple[Tensor, Values]:
    """The discriminator's loss, and what it thinks of whole and of repaired images; it is told the
    same holes of both."""
    both_NCHW, holes_N1HW = torch.cat([real_NCHW, repaired_NCHW]), hole_N1HW.repeat(2, 1, 1, 1)
    real, repaired = critic(both_NCHW, holes_N1HW).chunk(2)
    return hinge_discriminator_loss(real, repaired), opinions(real, repaired, "hinge")
