"""Anomaly detection: a GAN of normal images, then an encoder into its latent space (f-AnoGAN).

Schlegl et al. 2019, "f-AnoGAN: Fast unsupervised anomaly detection with generative adversarial
networks": first a WGAN-GP (Gulrajani et al. 2017, algorithm 1) learns from images without any
anomaly, then the encoder E is trained onto its generator G and critic, which stay as they are. What
G(E(x)) does not show of an image x is what no normal image has.

Shapes: N batch, C channels, H height, W width, L latent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from engine.algorithm import Algorithm, Networks, Values
from engine.compile import second_order
from engine.losses import critic_generator_loss, wasserstein_critic_loss
from engine.metrics.auroc import auroc
from engine.networks.spec import Network
from engine.penalties import gradient_penalty
from engine.player import Player, frozen
from engine.settings import PlayerSettings
from kernels import philox
from pipelines.batch import Batch
from pipelines.settings import Data

LATENTS, MIXTURE = 1, 4  # noise streams


@dataclass(frozen=True)
class Anomaly(Algorithm):
    """A generator and a critic, and the encoder that comes after them."""

    generator: PlayerSettings
    critic: PlayerSettings
    encoder: PlayerSettings
    gan_steps: int = 10_000
    """Iterations in which generator and critic learn; in all that follow the encoder does."""
    critic_updates: int = 5
    """Updates of the critic, one an iteration, for one of the generator."""
    penalty: float = 10.0
    """Weight of the critic's gradient penalty (lambda)."""
    kappa: float = 1.0
    """Weight of the difference in the critic's features, in the encoder's loss and the score."""

    def check(self) -> None:
        if self.gan_steps < 1 or self.critic_updates < 1:
            raise ValueError("--gan-steps and --critic-updates must be at least 1")
        if self.penalty < 0 or self.kappa < 0:
            raise ValueError("--penalty and --kappa must not be negative")
        if self.encoder.network.latent != self.generator.network.latent:
            raise ValueError(
                f"--encoder.latent {self.encoder.network.latent} must be the generator's, "
                f"{self.generator.network.latent}: give both"
            )
        for name in ("generator", "critic"):
            if getattr(self, name).ema_kimg:
                raise ValueError(
                    f"--{name}.ema-kimg must be 0: the encoder learns onto the weights themselves"
                )

    def check_data(self, data: Data) -> None:
        if not data.without:
            raise ValueError(
                "--data.without names the class to be found, which training must not see: give "
                "one or more, as --data.without 8"
            )

    def second_order(self) -> bool:
        return True

    def period(self) -> int:
        """Of the first phase, the dearer one: costs are told of it."""
        return self.critic_updates

    def kinds(self) -> tuple[int, ...]:
        return (*super().kinds(), self.gan_steps)

    def latent_dim(self) -> int:
        return self.generator.network.latent

    def sampler_settings(self) -> Network:
        return self.generator.network

    def sampler(self, networks: Networks) -> nn.Module:
        return networks["generator"]

    def reconstruct(self, networks: Networks, images_NCHW: Tensor) -> Tensor:
        return self.decode(networks, networks["encoder"](images_NCHW))

    def scores(self, networks: Networks, images_NCHW: Tensor) -> Values:
        """The anomaly score of each image and its two parts, (N,) each."""
        pixels_N, features_N, _ = differences(**networks, images_NCHW=images_NCHW)
        score_N = pixels_N + self.kappa * features_N
        return {"score": score_N, "pixels": pixels_N, "features": features_N}

    def heat(self, networks: Networks, images_NCHW: Tensor) -> Tensor:
        """|x - G(E(x))| of each pixel, the mean over channels, (N, 1, H, W) in [0, 2]: where in an
        image the anomaly is."""
        made_NCHW = self.reconstruct(networks, images_NCHW)
        return (images_NCHW - made_NCHW).abs().mean(1, keepdim=True)

    def held_out(self, networks: Networks, batch: Batch, key: Tensor) -> Values:
        return self.scores(networks, batch.images_NCHW)

    def summarise(
        self, values: Values, labels_N: Tensor | None, without: tuple[int, ...] = ()
    ) -> dict[str, float]:
        """How well the classes that were left out are told from the others, where there are both:
        a mean over all would say little."""
        if labels_N is None:
            return {}
        unseen_N = torch.isin(labels_N, torch.tensor(without))
        if unseen_N.all() or not unseen_N.any():
            return {}
        score_N = values["score"]
        figures = {
            f"auroc_{name}": auroc(values[name], unseen_N) for name in ("pixels", "features")
        }
        return {
            "auroc": auroc(score_N, unseen_N),
            **figures,
            "score_normal": float(score_N[~unseen_N].mean()),
            "score_anomaly": float(score_N[unseen_N].mean()),
        }

    def turns(self, iteration: int) -> tuple[bool, bool]:
        """Whether the encoder learns, all else being trained, and whether the generator does."""
        encodes = iteration >= self.gan_steps
        return encodes, not encodes and iteration % self.critic_updates == 0

    def start(self, players: dict[str, Player], key: Tensor) -> Callable[[Batch], Values]:
        make = partial(make_fakes, latent=self.latent_dim())
        judge = partial(critic_update, penalty=self.penalty)
        fit = partial(encoder_update, kappa=self.kappa)
        generator, critic, encoder = (players[n] for n in ("generator", "critic", "encoder"))

        def adversarial(batch: Batch, learns: bool) -> Values:
            made = generator.make(make, key, batch.position_N, hold=learns)
            values = critic.update(judge, batch.images_NCHW, made.tensor, key, batch.position_N)
            if learns:
                with frozen(critic) as fixed:
                    values |= generator.update_made(made, generator_update, fixed)
            return values

        def step(batch: Batch) -> Values:
            encodes, learns = self.turns(encoder.clock.iteration)
            if not encodes:
                return adversarial(batch, learns)
            with frozen(generator) as maker, frozen(critic) as judge_of_both:
                return encoder.update(fit, maker, judge_of_both, batch.images_NCHW)

        return step


def make_fakes(generator: nn.Module, key: Tensor, position_N: Tensor, *, latent: int) -> Tensor:
    """G(z), (N, C, H, W), for the latents of these places in the stream of images."""
    return generator(philox.normal(key, LATENTS, position_N, latent))


@second_order
def critic_update(
    critic: nn.Module,
    real_NCHW: Tensor,
    fake_NCHW: Tensor,
    key: Tensor,
    position_N: Tensor,
    *,
    penalty: float,
) -> tuple[Tensor, Values]:
    """E[D(G(z))] - E[D(x)] + lambda E[(||grad D|| - 1)^2] (Gulrajani et al. 2017, equation 3), and
    its parts: the critic's estimate of the Wasserstein distance, and the penalty."""
    both_N = critic(torch.cat([real_NCHW, fake_NCHW.to(real_NCHW)]))
    loss = wasserstein_critic_loss(*both_N.chunk(2))
    alpha_N = philox.uniform(key, MIXTURE, position_N, 1)[:, 0]
    punished = gradient_penalty(critic, real_NCHW, fake_NCHW, alpha_N)
    values = {"distance": -loss.detach(), "penalty": punished.detach()}
    return loss + penalty * punished, values


def generator_update(fake_NCHW: Tensor, critic: nn.Module) -> tuple[Tensor, Values]:
    """-E[D(G(z))] (Gulrajani et al. 2017, algorithm 1), for the fakes just judged."""
    return critic_generator_loss(critic(fake_NCHW)), {}


def differences(
    generator: nn.Module, critic: nn.Module, encoder: nn.Module, images_NCHW: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(1/n) ||x - G(E(x))||^2 over n pixels and (1/n_d) ||f(x) - f(G(E(x)))||^2 over n_d features
    f of the critic, the input of its last layer; (N,) each: the two parts of the izi_f loss and of
    the anomaly score (Schlegl et al. 2019, and their code). And the latents E(x), (N, L)."""
    z_NL = encoder(images_NCHW)
    made_NCHW = generator(z_NL)
    pixels_N = (images_NCHW - made_NCHW).float().square().flatten(1).mean(1)
    apart_NF = critic.features(images_NCHW) - critic.features(made_NCHW)
    return pixels_N, apart_NF.float().square().mean(1), z_NL


def encoder_update(
    encoder: nn.Module,
    generator: nn.Module,
    critic: nn.Module,
    images_NCHW: Tensor,
    *,
    kappa: float,
) -> tuple[Tensor, Values]:
    """The izi_f loss, its two parts, and the mean square of the latents, 1 for those that the
    generator learned from."""
    pixels_N, features_N, z_NL = differences(generator, critic, encoder, images_NCHW)
    pixels, features = pixels_N.mean(), features_N.mean()
    spread = z_NL.detach().float().square().mean()
    values = {"pixels": pixels.detach(), "features": features.detach(), "latent_square": spread}
    return pixels + kappa * features, values
