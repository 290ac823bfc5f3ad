"""GAN-EM: expectation-maximisation with a GAN in the place of the mixture's densities.

Zhao et al. 2019, "GAN-EM: GAN based EM learning framework", https://arxiv.org/abs/1812.00335: the
generator G(z, c) is a mixture of K components, of which a uniform prior chooses one. Where the text
leaves something open it is as in the authors' code (https://github.com/zhaowt61/GAN-EM, GANEM.py),
named "code" here. The discriminator D has an output for each class, "real and of this class", and
one for "fake", each a sigmoid; the E-net E gives the responsibilities w(x) = softmax E(x).

Each iteration is one update of an M-step (section 1 of the paper for the idea, the code for the
terms), on a batch of real images x whose w is held fixed:

    D minimises  -sum_k w_k(x) log D_k(x) - 2 log(1 - D_fake(x))          weighted cross-entropy
                 -sum_k log(1 - D_k(G)) - log D_fake(G)
    G minimises  -log D_c(G) - sum_{k != c} log(1 - D_k(G)) - log(1 - D_fake(G)),  G = G(z, c)

Sums are over outputs, means over images (the code takes means over both). Before every `m_updates`
such updates comes an E-step: `e_updates` updates of E by the cross-entropy of c given G(z, c), the
optimum of which is the posterior of c under the mixture that G is (Bayes' rule, with its uniform
prior). In the first `uniform_updates` iterations w is 1/K, as in the code's first M-step.

Other than in the code: an E-step comes before the first M-step too (its w is not used); steps are a
few updates long in place of epochs, so that what one finds reaches the other soon (incremental EM:
Neal and Hinton 1998, "A view of the EM algorithm that justifies incremental, sparse, and other
variants"); Adam is not started anew with each M-step; the E-net learns from images under noise
and small affine maps, or it tells classes apart by marks of the generator that no real image has,
and what it then says of real images is chance; D has no BatchNorm but the R1 penalty on its
expected logit of being real.

Shapes: N batch, C channels, H height, W width, L latent, K classes, O = K + 1 outputs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.algorithm import Algorithm, Networks, Values
from engine.compile import second_order
from engine.metrics.clusters import clustering
from engine.networks.conditional import ByClass, Choosing
from engine.networks.norms import statistics_kept
from engine.networks.spec import Network
from engine.player import Player, frozen
from engine.settings import PlayerSettings
from kernels import philox
from kernels.dispatch import wide
from pipelines.batch import Batch

LATENTS, E_LATENTS, NOISE, WARPS = 1, 4, 5, 6  # noise streams
NOT_FAKE = 2.0  # weight of D_fake at real images, as in the authors' code


@dataclass(frozen=True)
class ExpectationMaximisation(Algorithm):
    """A generator of K classes, a discriminator that knows them, and an E-net."""

    generator: PlayerSettings
    discriminator: PlayerSettings
    encoder: PlayerSettings
    m_updates: int = 16
    """Updates of generator and discriminator (M-step) from one E-step to the next."""
    e_updates: int = 8
    """Updates of the E-net in an E-step."""
    uniform_updates: int = 512
    """Updates at first for which each image belongs to all clusters alike."""
    noise: float = 0.5
    """Standard deviation of the noise on the images that the E-net learns from."""
    warp: float = 0.08
    """Standard deviation of the six numbers by which a random affine map of those images differs
    from the identity; half an image is the unit of shifts."""
    r1: float = 0.0
    """Gamma of the R1 penalty on the discriminator's gradient at real images; 0 takes none."""
    r1_every: int = 16
    """Iterations between penalties, each then weighed so many times."""

    def check(self) -> None:
        if min(self.m_updates, self.e_updates) < 1:
            raise ValueError("--m-updates and --e-updates must be at least 1")
        if min(self.uniform_updates, self.noise, self.warp) < 0:
            raise ValueError("--uniform-updates, --noise and --warp must not be negative")
        if self.r1 < 0 or self.r1_every < 1:
            raise ValueError("--r1 must not be negative, --r1-every be at least 1")
        found = {name: player.network.clusters for name, player in self.players().items()}
        if len(set(found.values())) > 1 or self.clusters < 2:
            flags = ", ".join(f"--{name}.clusters {k}" for name, k in found.items())
            raise ValueError(f"{flags}: give all three the same number, at least 2")

    @property
    def clusters(self) -> int:
        """K, the number of clusters."""
        return self.generator.network.clusters

    def turns(self, iteration: int) -> tuple[bool, bool, bool]:
        """Whether an iteration begins with an E-step, takes responsibilities of 1/K, and takes the
        penalty."""
        punishes = self.r1 > 0 and iteration % self.r1_every == 0
        return iteration % self.m_updates == 0, iteration < self.uniform_updates, punishes

    def second_order(self) -> bool:
        return self.r1 > 0

    def period(self) -> int:
        return math.lcm(self.m_updates, self.r1_every if self.r1 else 1)

    def settles(self) -> int:
        return self.uniform_updates

    def kinds(self) -> tuple[int, ...]:
        first: dict[tuple[bool, bool, bool], int] = {}
        for iteration in range(self.settles() + self.period()):
            first.setdefault(self.turns(iteration), iteration)
        return tuple(first.values())

    def classes(self) -> int:
        return self.clusters

    def latent_dim(self) -> int:
        return self.generator.network.latent + self.clusters

    def sampler_settings(self) -> Network:
        return ByClass(self.generator.network)

    def sampler(self, networks: Networks) -> nn.Module:
        return Choosing(networks["generator"], self.generator.network.latent)

    def held_out(self, networks: Networks, batch: Batch, key: Tensor) -> Values:
        """The cluster of each image, the likeliest."""
        return {"cluster": networks["encoder"](batch.images_NCHW).argmax(dim=1)}

    def summarise(
        self, values: Values, labels_N: Tensor | None, without: tuple[int, ...] = ()
    ) -> dict[str, float]:
        """How well clusters agree with classes, where the dataset has any."""
        return {} if labels_N is None else clustering(values["cluster"].long(), labels_N)

    def start(self, players: dict[str, Player], key: Tensor) -> Callable[[Batch], Values]:
        generator, discriminator = players["generator"], players["discriminator"]
        latent = self.generator.network.latent
        make = partial(make_fakes, stream=LATENTS, latent=latent, clusters=self.clusters)
        punish = partial(penalised_update, weight=self.r1 / 2 * self.r1_every)
        fool = partial(generator_update, clusters=self.clusters)
        e_step, assign = self._e_step(players, key), self._assign(players["encoder"])

        def step(batch: Batch) -> Values:
            real_NCHW, position_N = batch.images_NCHW, batch.position_N
            e_turn, uniform, punishes = self.turns(discriminator.clock.iteration)
            values = e_step(position_N) if e_turn else {}
            share_NK = assign(real_NCHW, uniform)
            made = generator.make(make, key, position_N, position_N)
            judge = punish if punishes else discriminator_update
            values |= discriminator.update(judge, real_NCHW, made.tensor, share_NK)
            with frozen(discriminator) as critic:
                values |= generator.update_made(made, fool, critic, position_N)
            return values

        return step

    def _e_step(self, players: dict[str, Player], key: Tensor) -> Callable[[Tensor], Values]:
        """The E-net's updates at these places of the stream; gives the last one's values."""
        generator, encoder = players["generator"], players["encoder"]
        latent = self.generator.network.latent
        make = partial(make_fakes, stream=E_LATENTS, latent=latent, clusters=self.clusters)
        recognise = partial(
            encoder_update, clusters=self.clusters, noise=self.noise, warp=self.warp
        )

        def e_step(position_N: Tensor) -> Values:
            values: Values = {}
            for i in range(self.e_updates):
                place_N = position_N * self.e_updates + i
                with statistics_kept(generator.network):
                    fake_NCHW = generator.infer(make, key, position_N, place_N)
                values = encoder.update(recognise, fake_NCHW, key, position_N, place_N)
            return values

        return e_step

    def _assign(self, encoder: Player) -> Callable[[Tensor, bool], Tensor]:
        """Responsibilities of real images, (N, K)."""

        def assign(real_NCHW: Tensor, uniform: bool) -> Tensor:
            if uniform:
                return torch.full(
                    (len(real_NCHW), self.clusters), 1 / self.clusters, device=real_NCHW.device
                )
            return encoder.infer(responsibilities, real_NCHW)

        return assign


def labels(position_N: Tensor, clusters: int) -> Tensor:
    """The class to make an image of at each place of the stream, int64 (N,): all in turn, so that a
    batch has the same number of each."""
    return position_N % clusters


def make_fakes(
    generator: nn.Module,
    key: Tensor,
    position_N: Tensor,
    place_N: Tensor,
    *,
    stream: int,
    latent: int,
    clusters: int,
) -> Tensor:
    """G(z, c), (N, C, H, W): c by the places in the stream of images, z by those in its own."""
    return generator(philox.normal(key, stream, place_N, latent), labels(position_N, clusters))


def responsibilities(encoder: nn.Module, images_NCHW: Tensor) -> Tensor:
    """w, float32 (N, K): each image's share in each cluster."""
    return encoder(images_NCHW).float().softmax(dim=1)


def real_loss(logits_NO: Tensor, share_NK: Tensor) -> Tensor:
    """-sum_k w_k log D_k(x) - 2 log(1 - D_fake(x)), float32 ()."""
    class_NK, fake_N = logits_NO[:, :-1].float(), logits_NO[:, -1].float()
    return ((share_NK * F.softplus(-class_NK)).sum(dim=1) + NOT_FAKE * F.softplus(fake_N)).mean()


def fake_loss(logits_NO: Tensor) -> Tensor:
    """-sum_k log(1 - D_k(G)) - log D_fake(G), float32 ()."""
    class_NK, fake_N = logits_NO[:, :-1].float(), logits_NO[:, -1].float()
    return (F.softplus(class_NK).sum(dim=1) + F.softplus(-fake_N)).mean()


def fooling_loss(logits_NO: Tensor, label_N: Tensor) -> Tensor:
    """-log D_c(G) - sum_{o != c} log(1 - D_o(G)) over all outputs, float32 ()."""
    goal_NO = F.one_hot(label_N, logits_NO.shape[1]).float()
    loss_NO = F.binary_cross_entropy_with_logits(logits_NO.float(), goal_NO, reduction="none")
    return loss_NO.sum(dim=1).mean()


def discriminator_update(
    discriminator: nn.Module, real_NCHW: Tensor, fake_NCHW: Tensor, share_NK: Tensor
) -> tuple[Tensor, Values]:
    """The discriminator's loss, its mean opinions 1 - D_fake of real and of generated images, and
    the mean of the largest responsibilities."""
    real_NO, fake_NO = discriminator(torch.cat([real_NCHW, fake_NCHW.to(real_NCHW)])).chunk(2)
    values = {"real": _mean_opinion(real_NO), "fake": _mean_opinion(fake_NO)}
    values["confidence"] = share_NK.max(dim=1).values.mean()
    return real_loss(real_NO, share_NK) + fake_loss(fake_NO), values


@second_order
def penalised_update(
    discriminator: nn.Module,
    real_NCHW: Tensor,
    fake_NCHW: Tensor,
    share_NK: Tensor,
    *,
    weight: float,
) -> tuple[Tensor, Values]:
    """`discriminator_update` with so much of the R1 penalty, which is reported too."""
    loss, values = discriminator_update(discriminator, real_NCHW, fake_NCHW, share_NK)
    r1 = expected_r1(discriminator, real_NCHW, share_NK)
    return loss + weight * r1, values | {"r1": r1.detach()}


def expected_r1(critic: nn.Module, images_NCHW: Tensor, share_NK: Tensor) -> Tensor:
    """E[||grad (sum_k w_k d_k(x) - d_fake(x))||^2], (), d being logits: R1 (Mescheder, Geiger and
    Nowozin 2018, equation 9) without its gamma / 2, of the logit of being real."""

    def expected(x_NCHW: Tensor) -> Tensor:
        logits_NO = wide(critic(x_NCHW))
        return (share_NK * logits_NO[:, :-1]).sum() - logits_NO[:, -1].sum()

    gradient_NCHW = wide(torch.func.grad(expected)(images_NCHW.detach()))
    return gradient_NCHW.square().sum((1, 2, 3)).mean()


def generator_update(
    fake_NCHW: Tensor, critic: nn.Module, position_N: Tensor, *, clusters: int
) -> tuple[Tensor, Values]:
    """The generator's loss, for the fakes that the discriminator has just judged."""
    return fooling_loss(critic(fake_NCHW), labels(position_N, clusters)), {}


def encoder_update(
    encoder: nn.Module,
    fake_NCHW: Tensor,
    key: Tensor,
    position_N: Tensor,
    place_N: Tensor,
    *,
    clusters: int,
    noise: float,
    warp: float,
) -> tuple[Tensor, Values]:
    """-E[log E_c(G(z, c))], float32, and the share of classes recognised."""
    label_N = labels(position_N, clusters)
    noise_NP = philox.normal(key, NOISE, place_N, fake_NCHW[0].numel())
    seen_NCHW = warped(fake_NCHW, warp * philox.normal(key, WARPS, place_N, 6))
    logits_NK = encoder(seen_NCHW + noise * noise_NP.view_as(fake_NCHW)).float()
    recognised = (logits_NK.detach().argmax(dim=1) == label_N).float().mean()
    return F.cross_entropy(logits_NK, label_N), {"recognised": recognised}


def warped(images_NCHW: Tensor, change_N6: Tensor) -> Tensor:
    """Images under the affine maps that differ so much from the identity, (N, C, H, W); what comes
    from outside is as dark as the border."""
    map_N23 = change_N6.view(-1, 2, 3) + torch.eye(2, 3, device=change_N6.device)
    grid_NHW2 = F.affine_grid(map_N23, list(images_NCHW.shape), align_corners=False)
    return F.grid_sample(images_NCHW.float(), grid_NHW2, padding_mode="border", align_corners=False)


def _mean_opinion(logits_NO: Tensor) -> Tensor:
    return logits_NO.detach()[:, -1].float().neg().sigmoid().mean()
