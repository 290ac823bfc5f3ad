"""CycleGAN: two generators that undo each other, and a discriminator of each domain.

Zhu et al. 2017, https://arxiv.org/abs/1703.10593, section 3 and 5.2, in the order and with the
weights of the authors' cycle_gan_model.py: both generators, then both discriminators, which are
shown translated images from pools (`engine.pool`).

    generators      E[(D_B(G(a)) - 1)^2] + E[(D_A(F(b)) - 1)^2]
                    + cycle (E[|F(G(a)) - a|] + E[|G(F(b)) - b|])
                    + cycle identity (E[|G(b) - b|] + E[|F(a) - a|])
    discriminators  1/2 (E[(D_B(b) - 1)^2] + E[D_B(pool_B)^2]) and the same of A

InstanceNorm sees each image alone, so images that go through one network are put together.

Shapes: N batch, C channels, H height, W width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.algorithm import Algorithm, Networks, Values
from engine.losses import least_squares_discriminator_loss, least_squares_generator_loss
from engine.networks.cyclegan import Translator
from engine.player import Player, frozen
from engine.pool import exchanged
from engine.settings import PlayerSettings
from engine.translation import DIRECTIONS, Direction, Translation
from pipelines.batch import Batch
from pipelines.settings import UNPAIRED, Data

FLOAT = 4  # bytes
POOL_A, POOL_B = 9, 10  # noise streams


@dataclass(frozen=True)
class Cycle(Algorithm):
    """Two generators, one player, and two discriminators, another."""

    generators: PlayerSettings
    discriminators: PlayerSettings
    cycle: float = 10.0
    """Weight of the distance of an image from its translation back."""
    identity: float = 0.5
    """Weight, in units of --cycle, of the distance of an image of the other domain from its
    translation, which keeps colours; 0 takes none."""

    def check(self) -> None:
        for name in ("cycle", "identity"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} must not be negative")

    def check_data(self, data: Data) -> None:
        if data.name not in UNPAIRED:
            raise ValueError(
                f"data.name={data.name} has no two domains of images: give --data.name unpaired "
                f"and --data.path FOLDER with trainA/ and trainB/"
            )

    def translation(self, data: Data) -> Translation:
        # InstanceNorm looks at the whole image, and needs more than one place of a quarter's size
        return Translation(DIRECTIONS, multiple=4, least=8)

    def translate(self, networks: Networks, images_NCHW: Tensor, direction: Direction) -> Tensor:
        """Images of the other domain, (N, C, H, W) float32 in [-1, 1]; H and W multiples of 4."""
        return one_way(networks, direction)(images_NCHW).float()

    def translator(self, networks: Networks, data: Data, direction: Direction) -> nn.Module:
        return one_way(networks, direction)

    def translator_settings(self, direction: Direction) -> Translator:
        sizes = self.generators.network
        return Translator(sizes.width, sizes.blocks)

    def gathered(self, data: Data) -> int:
        return 2 * FLOAT * data.channels * data.resolution**2  # translated images, for the pools

    def columns(self, networks: Networks, batch: Batch) -> tuple[Tensor, ...]:
        """Images of A, translated, and back again; then those of B."""
        a_NCHW, b_NCHW = batch.images_NCHW, batch.pair_NCHW
        to_B, to_A = (partial(self.translate, networks, direction=way) for way in DIRECTIONS)
        fake_B_NCHW, fake_A_NCHW = to_B(a_NCHW), to_A(b_NCHW)
        return a_NCHW, fake_B_NCHW, to_A(fake_B_NCHW), b_NCHW, fake_A_NCHW, to_B(fake_A_NCHW)

    def held_out(self, networks: Networks, batch: Batch, key: Tensor) -> Values:
        """The mean absolute difference of each image from its translation back, (N,)."""
        a_NCHW, _, back_A_NCHW, b_NCHW, _, back_B_NCHW = self.columns(networks, batch)
        pairs = {"cycle_A": (a_NCHW, back_A_NCHW), "cycle_B": (b_NCHW, back_B_NCHW)}
        return {name: (x - y).abs().flatten(1).mean(1) for name, (x, y) in pairs.items()}

    def start(self, players: dict[str, Player], key: Tensor) -> Callable[[Batch], Values]:
        generators, critics = players["generators"], players["discriminators"]
        make = partial(translators_update, cycle=self.cycle, identity=self.identity)

        def step(batch: Batch) -> Values:
            reals = batch.images_NCHW.contiguous(), batch.pair_NCHW.contiguous()  # as networks do
            with frozen(critics) as judges:
                values = generators.update(make, judges, *reals)
            fakes = [values.pop(f"generators/{name}") for name in ("fake_A", "fake_B")]
            shown = from_pools(critics, fakes, key, batch.position_N)
            return values | critics.update(critics_update, *reals, *shown)

        return step


def one_way(networks: Networks, direction: Direction) -> nn.Module:
    """The generator that goes there."""
    generators = networks["generators"]
    return generators.to_B if direction == "AtoB" else generators.to_A


def from_pools(
    critics: Player, fakes: list[Tensor], key: Tensor, position_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Translated images of both domains to be judged, in place of these. All ranks' go through the
    pools, which are the same on all."""
    pools, ranks = critics.network, critics.shared.ranks
    alone = critics.rehearsing or ranks.world_size == 1
    count = len(position_N)
    own = slice(ranks.rank * count, (ranks.rank + 1) * count)
    every_N = position_N
    if not alone:
        all_ranks_N = torch.arange(ranks.world_size * count, device=position_N.device)
        every_N = position_N[:1] - own.start + all_ranks_N
    shown = []
    for pool, stream, fake_NCHW in zip(
        (pools.pool_A, pools.pool_B), (POOL_A, POOL_B), fakes, strict=True
    ):
        all_NCHW = fake_NCHW if alone else ranks.concatenated(fake_NCHW)
        exchanged_NCHW = exchanged(pool, pools.held, all_NCHW, key, stream, every_N)
        shown.append(exchanged_NCHW if alone else exchanged_NCHW[own])
    pools.held += len(every_N)
    return shown[0], shown[1]


def translators_update(
    generators: nn.Module,
    critics: nn.Module,
    real_A_NCHW: Tensor,
    real_B_NCHW: Tensor,
    *,
    cycle: float,
    identity: float,
) -> tuple[Tensor, Values]:
    """The generators' loss, its parts, and the translated images for the discriminators."""
    count, whole = len(real_A_NCHW), identity > 0
    to_B = generators.to_B(torch.cat([real_A_NCHW, real_B_NCHW]) if whole else real_A_NCHW)
    to_A = generators.to_A(torch.cat([real_B_NCHW, real_A_NCHW]) if whole else real_B_NCHW)
    fake_B_NCHW, fake_A_NCHW = to_B[:count], to_A[:count]
    fooling = 2 * least_squares_generator_loss(critics.of_B(fake_B_NCHW))
    fooling = fooling + 2 * least_squares_generator_loss(critics.of_A(fake_A_NCHW))
    back = distance(generators.to_A(fake_B_NCHW), real_A_NCHW)
    back = back + distance(generators.to_B(fake_A_NCHW), real_B_NCHW)
    loss, values = fooling + cycle * back, {"adversarial": fooling, "cycle": back}
    if whole:
        values["identity"] = distance(to_B[count:], real_B_NCHW)
        values["identity"] = values["identity"] + distance(to_A[count:], real_A_NCHW)
        loss = loss + cycle * identity * values["identity"]
    return loss, values | {"fake_A": fake_A_NCHW, "fake_B": fake_B_NCHW}


def distance(made_NCHW: Tensor, wanted_NCHW: Tensor) -> Tensor:
    """E[|made - wanted|], float32 ()."""
    return F.l1_loss(made_NCHW.float(), wanted_NCHW)


def critics_update(
    critics: nn.Module,
    real_A_NCHW: Tensor,
    real_B_NCHW: Tensor,
    shown_A_NCHW: Tensor,
    shown_B_NCHW: Tensor,
) -> tuple[Tensor, Values]:
    """The discriminators' loss, and that of each."""
    values = {}
    for name, critic, real_NCHW, shown_NCHW in (
        ("loss_A", critics.of_A, real_A_NCHW, shown_A_NCHW),
        ("loss_B", critics.of_B, real_B_NCHW, shown_B_NCHW),
    ):
        real_N1HW, shown_N1HW = critic(torch.cat([real_NCHW, shown_NCHW.to(real_NCHW)])).chunk(2)
        values[name] = least_squares_discriminator_loss(real_N1HW, shown_N1HW)
    return values["loss_A"] + values["loss_B"], values
