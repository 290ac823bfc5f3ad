"""Paired translation: a generator that is told what to make, a discriminator that sees both.

Isola et al. 2017, "Image-to-image translation with conditional adversarial networks",
https://arxiv.org/abs/1611.07004, equations 1, 3 and 4, and section 3.3: the generator maximises
log D(x, G(x)), the discriminator's loss is halved.

    generator       -E[log D(x, G(x, z))] + l1 E[|y - G(x, z)|]
    discriminator   -1/2 (E[log D(x, y)] + E[log(1 - D(x, G(x, z)))])

Shapes: N batch, C channels, H height, W width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.algorithm import Algorithm, Networks, Values
from engine.losses import ADVERSARIES
from engine.networks.pix2pix import Settled, Translator
from engine.player import Player, frozen
from engine.settings import PlayerSettings
from engine.steps.adversarial import Loss
from engine.translation import Direction, Translation
from kernels import philox
from pipelines.batch import Batch
from pipelines.settings import PAIRED, Data

DROPOUT = 11  # noise stream


@dataclass(frozen=True)
class Paired(Algorithm):
    """A generator and a discriminator."""

    generator: PlayerSettings
    discriminator: PlayerSettings
    direction: Direction = "AtoB"
    """What is made of what: A is the left half of a pair, B the right one."""
    loss: Loss = "nonsaturating"
    """What both minimise (engine/losses.py)."""
    l1: float = 100.0
    """Weight of the mean absolute difference from the right image."""

    def check(self) -> None:
        if self.l1 < 0:
            raise ValueError(f"--l1 {self.l1} must not be negative")
        if self.loss == "wasserstein":
            raise ValueError(
                "--loss wasserstein needs a critic that is bounded, which this one is not: give "
                "nonsaturating, hinge or least-squares"
            )

    def check_data(self, data: Data) -> None:
        if data.name not in PAIRED:
            raise ValueError(
                f"data.name={data.name} has no pairs of images: give --data.name pairs and "
                f"--data.path FOLDER with both images of a pair side by side in one file"
            )

    def sides(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is given, and what is to be made of it, (N, C, H, W) each."""
        both = batch.images_NCHW, batch.pair_NCHW
        return both if self.direction == "AtoB" else both[::-1]

    def translation(self, data: Data) -> Translation:
        return Translation((self.direction,), multiple=2**self.generator.network.depth)

    def translate(self, networks: Networks, images_NCHW: Tensor, direction: Direction) -> Tensor:
        """Images of the other side, (N, C, H, W) float32 in [-1, 1]; the same for the same images.
        There is but one direction."""
        key, position_N = unmoved(len(images_NCHW), images_NCHW.device)
        return make(networks["generator"], images_NCHW, key, position_N).float()

    def translator(self, networks: Networks, data: Data, direction: Direction) -> nn.Module:
        """With the dropout of images of the data's size."""
        unet = networks["generator"]
        count = unet.draws(data.resolution, data.resolution)
        key, position_1 = unmoved(1, next(unet.parameters()).device)
        return Settled(unet, philox.uniform(key, DROPOUT, position_1, count))

    def translator_settings(self, direction: Direction) -> Translator:
        return Translator(self.generator.network)

    def remade(self, networks: Networks, batch: Batch) -> tuple[Tensor, Tensor]:
        given_NCHW, goal_NCHW = self.sides(batch)
        return self.translate(networks, given_NCHW, self.direction), goal_NCHW

    def trivial(self, batch: Batch) -> dict[str, Tensor]:
        """What is given, and the mean of all that is to be made."""
        given_NCHW, goal_NCHW = self.sides(batch)
        return {
            "identity": given_NCHW,
            "mean": goal_NCHW.mean(0, keepdim=True).expand_as(goal_NCHW),
        }

    def columns(self, networks: Networks, batch: Batch) -> tuple[Tensor, ...]:
        """What is given, what the model makes of it, what it should be."""
        made_NCHW, goal_NCHW = self.remade(networks, batch)
        return self.sides(batch)[0], made_NCHW, goal_NCHW

    def start(self, players: dict[str, Player], key: Tensor) -> Callable[[Batch], Values]:
        generator, discriminator = players["generator"], players["discriminator"]
        judge = partial(judged_update, loss=self.loss)
        fool = partial(translator_update, loss=self.loss, l1=self.l1)

        def step(batch: Batch) -> Values:
            given_NCHW, goal_NCHW = (x.contiguous() for x in self.sides(batch))  # as networks do
            made = generator.make(make, given_NCHW, key, batch.position_N)
            values = discriminator.update(judge, given_NCHW, goal_NCHW, made.tensor)
            with frozen(discriminator) as critic:
                return values | generator.update_made(made, fool, critic, given_NCHW, goal_NCHW)

        return step


def unmoved(images: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Key and places in the stream of images, (N,), by which dropout is the same each time."""
    position_N = torch.zeros(images, dtype=torch.int64, device=device)
    return philox.make_key(0, device=device), position_N


def make(generator: nn.Module, given_NCHW: Tensor, key: Tensor, position_N: Tensor) -> Tensor:
    """G(x, z), (N, C, H, W), for the dropout of these places in the stream of images."""
    count = generator.draws(*given_NCHW.shape[2:])
    return generator(given_NCHW, philox.uniform(key, DROPOUT, position_N, count))


def judged_update(
    discriminator: nn.Module,
    given_NCHW: Tensor,
    goal_NCHW: Tensor,
    fake_NCHW: Tensor,
    *,
    loss: Loss,
) -> tuple[Tensor, Values]:
    """Half the discriminator's loss, and what it thinks of right and of made images."""
    both_NCHW = torch.cat([goal_NCHW, fake_NCHW.to(goal_NCHW)])
    real, fake = discriminator(torch.cat([given_NCHW, given_NCHW]), both_NCHW).chunk(2)
    means = {
        "output_real": real.detach().float().mean(),
        "output_fake": fake.detach().float().mean(),
    }
    return 0.5 * ADVERSARIES[loss][0](real, fake), means


def translator_update(
    fake_NCHW: Tensor,
    critic: nn.Module,
    given_NCHW: Tensor,
    goal_NCHW: Tensor,
    *,
    loss: Loss,
    l1: float,
) -> tuple[Tensor, Values]:
    """The generator's loss and its parts."""
    fooling = ADVERSARIES[loss][1](critic(given_NCHW, fake_NCHW))
    distance = F.l1_loss(fake_NCHW.float(), goal_NCHW)
    return fooling + l1 * distance, {"adversarial": fooling, "l1": distance}
