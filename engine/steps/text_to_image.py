"""Text to image: a generator that draws what a caption says, in stages, and a judge of each.

Xu et al. 2018, "AttnGAN: Fine-grained text to image generation with attentional generative
adversarial networks", https://arxiv.org/abs/1711.10485, equations 3 to 6 and 14, with the authors'
weights, of stages i, images x, captions e and captions e' of other images:

    generator       sum_i -E[log D_i(G_i)] - E[log D_i(G_i, e)] + matching (L_words + L_sentence)
                    + KL(condition || N(0, 1))
    discriminators  sum_i 1/2 (-E[log D_i(x)] - E[log D_i(x, e)])
                    + 1/3 (-E[log(1 - D_i(G_i))] - E[log(1 - D_i(G_i, e))] - E[log(1 - D_i(x, e'))])

e' is the caption of the next image of the batch of all ranks. L_words and L_sentence are those of
DAMSM (`engine.damsm`) on the last stage's images, captions and images being those of all ranks; KL
is a mean over images and numbers. The discriminators learn first, then the generator from the same
images (`Player.make`).

The encoders of captions and images are those of a run of damsm_birds (--damsm), which stay as they
are and are kept in this run's checkpoints too. Without it they are trained alongside, on the real
images: the authors train them before.

Shapes: N batch, C channels, H height, W width, T words, D features, K condition, L latent.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from engine import damsm
from engine.algorithm import Algorithm, Networks, Values
from engine.encoders import open_damsm
from engine.everyone import FLOAT, next_of_all
from engine.losses import nonsaturating_loss, sample_and_kl
from engine.player import Player, frozen
from engine.settings import PlayerSettings
from engine.steps.matching import (
    exchanged,
    given,
    matching_losses,
    matching_of,
    seen_and_read,
)
from engine.world import Ranks
from kernels import philox
from kernels.dispatch import wide
from pipelines.batch import Batch
from pipelines.settings import Data

NOISE, HELD_OUT = 1, 5  # noise streams


@dataclass(frozen=True)
class TextToImage(Algorithm):
    """A generator, the discriminators of its stages, and encoders of captions and images."""

    generator: PlayerSettings
    discriminators: PlayerSettings
    encoders: PlayerSettings
    damsm: Path | None = None
    """Run directory of damsm_birds, whose encoders are taken as they are; none trains encoders
    alongside. May lie elsewhere on resume."""
    encoders_digest: Annotated[str, tyro.conf.Suppress] = ""
    """SHA-256 of that run's newest checkpoint, which thereby is part of what defines this run."""
    matching: float = 5.0
    """Weight of the DAMSM losses (lambda)."""

    def settled(self) -> "TextToImage":
        if self.damsm is None:
            return self
        run = open_damsm(self.damsm)
        encoders = replace(self.encoders, network=run.sizes)
        return replace(self, encoders=encoders, encoders_digest=run.digest)

    def check(self) -> None:
        if self.matching < 0:
            raise ValueError(f"--matching {self.matching} must not be negative")
        sizes = {name: player.network for name, player in self.players().items()}
        if sizes["generator"].stages != sizes["discriminators"].stages:
            raise ValueError(
                f"--generator.stages {sizes['generator'].stages} and --discriminators.stages "
                f"{sizes['discriminators'].stages} must be the same: each stage has its judge"
            )
        features = sizes["encoders"].features
        for name in ("generator", "discriminators"):
            if sizes[name].features != features:
                raise ValueError(
                    f"--{name}.features {sizes[name].features}, but the encoders make {features}: "
                    f"give --{name}.features {features}"
                )

    def begin(self, networks: Networks) -> None:
        if self.damsm is not None:
            open_damsm(self.damsm).fill(networks["encoders"])

    def check_words(self, words: tuple[str, ...]) -> None:
        if self.damsm is not None:
            open_damsm(self.damsm).check_words(words)

    def notes(self) -> tuple[str, ...]:
        if self.damsm:
            return (f"encoders: of {self.damsm}, fixed; checkpoint {self.encoders_digest[:12]}",)
        return (
            "encoders: no --damsm RUN_DIR of damsm_birds, so they are trained alongside, the image "
            "encoder a small network: not the paper's way",
        )

    def gathered(self, data: Data) -> int:
        features = self.encoders.network.features
        each = exchanged(self.encoders.network, data)
        return FLOAT * (features + each + each * (self.damsm is None))

    def talks(self) -> bool:
        return True

    def latent_dim(self) -> int:
        return self.generator.network.latent + self.generator.network.condition

    def captioned(
        self, networks: Networks, z_NL: Tensor, tokens_NL: Tensor, lengths_N: Tensor
    ) -> Tensor:
        return self._stages(networks, z_NL, tokens_NL, lengths_N)[0][-1]

    def attended(
        self, networks: Networks, z_NL: Tensor, tokens_NL: Tensor, lengths_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        images, shares = self._stages(networks, z_NL, tokens_NL, lengths_N)
        if not shares:
            raise ValueError("--attention: a generator of one stage does not attend to words")
        return images[-1], shares[-1]

    def _stages(
        self, networks: Networks, z_NL: Tensor, tokens_NL: Tensor, lengths_N: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Images of each stage, float32 (N, C, H, W) in [-1, 1], and where each word of the caption
        went in each but the first, (N, T, h, w)."""
        read = networks["encoders"].text(tokens_NL, lengths_N)
        images, _, shares = paint(networks["generator"], z_NL, *read, lengths_N)
        return [image_NCHW.float() for image_NCHW in images], shares

    def columns(self, networks: Networks, batch: Batch) -> tuple[Tensor, ...]:
        """Images, and what each stage makes of their captions."""
        z_NL = self._latents(philox.make_key(0, device=batch.position_N.device), HELD_OUT, batch)
        images, _ = self._stages(networks, z_NL, batch.tokens_NL, batch.lengths_N)
        size = batch.images_NCHW.shape[2:]
        return batch.images_NCHW, *(F.interpolate(image_NCHW, size) for image_NCHW in images)

    def held_out(self, networks: Networks, batch: Batch, key: Tensor) -> Values:
        """Features (N, D) of captions, of images made of them, and of those that they are of."""
        z_NL = self._latents(key, HELD_OUT, batch)
        made_NCHW = self.captioned(networks, z_NL, batch.tokens_NL, batch.lengths_N)
        made = seen_and_read(networks["encoders"], made_NCHW, batch)
        real = seen_and_read(networks["encoders"], batch.images_NCHW, batch)
        return {"made": made.whole_ND, "real": real.whole_ND, "sentence": made.sentence_ND}

    def summarise(
        self, values: Values, labels_N: Tensor | None, without: tuple[int, ...] = ()
    ) -> dict[str, float]:
        """R-precision of made images, of blind choice, and of the real images."""
        real = damsm.r_precision(values["real"], values["sentence"], labels_N)
        made = damsm.r_precision(values["made"], values["sentence"], labels_N)
        return made | {"r_precision_real": real["r_precision"]}

    def _latents(self, key: Tensor, stream: int, batch: Batch) -> Tensor:
        return philox.normal(key, stream, batch.position_N, self.latent_dim())

    def start(self, players: dict[str, Player], key: Tensor) -> Callable[[Batch], Values]:
        generator, critics = players["generator"], players["discriminators"]
        encoders, ranks = players["encoders"], players["generator"].shared.ranks
        if self.damsm is not None:
            encoders.network.eval()  # for good: it is never updated
        match = matching_of(ranks)
        draw = partial(painter_update, ranks=ranks, matching=self.matching)

        def step(batch: Batch) -> Values:
            reals_NCHW, *said, labels_N = given(batch)
            values, lengths_N = {}, said[1]
            if self.damsm is None:
                values = encoders.update(match, *given(batch), key, batch.position_N)
            read = encoders.infer(read_by, *said)
            z_NL = self._latents(key, NOISE, batch)
            made = generator.make(painted, z_NL, *read, lengths_N)
            captions = read[1], next_of_all(ranks, read[1])
            values |= critics.update(judges_update, reals_NCHW, *captions, *made.tensor[1:])
            with frozen(critics) as judges, at_rest(encoders) as fixed:
                told = (judges, fixed, *read, lengths_N, labels_N)
                return values | generator.update_made(made, draw, *told)

        return step


@contextmanager
def at_rest(player: Player) -> Iterator[nn.Module]:
    """The player's network as a fixed judge that looks at images as after training."""
    with frozen(player) as network:
        training = network.training
        network.eval()
        try:
            yield network
        finally:
            network.train(training)


def read_by(encoders: nn.Module, tokens_NT: Tensor, lengths_N: Tensor) -> tuple[Tensor, Tensor]:
    """Features of words and of captions, float32, nothing dropped."""
    words_NTD, sentence_ND = encoders.text(tokens_NT, lengths_N)
    return wide(words_NTD), wide(sentence_ND)


def paint(
    generator: nn.Module, z_NL: Tensor, words_NTD: Tensor, sentence_ND: Tensor, lengths_N: Tensor
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Images of each stage, the condition's divergence (N,), shares of words; z_NL: noise, of which
    the last numbers draw the condition."""
    mean_NK, log_variance_NK = generator.condition(sentence_ND)
    noise_NL, drawn_NK = z_NL.split([z_NL.shape[1] - mean_NK.shape[1], mean_NK.shape[1]], 1)
    told_NK, kl_N = sample_and_kl(wide(mean_NK), wide(log_variance_NK), drawn_NK)
    images, shares = generator(noise_NL, told_NK, words_NTD, lengths_N)
    return images, kl_N / mean_NK.shape[1], shares


def painted(
    generator: nn.Module, z_NL: Tensor, words_NTD: Tensor, sentence_ND: Tensor, lengths_N: Tensor
) -> tuple[Tensor, ...]:
    """The condition's divergence (N,), and the images of each stage."""
    images, kl_N, _ = paint(generator, z_NL, words_NTD, sentence_ND, lengths_N)
    return kl_N, *images


def painter_update(
    made: tuple[Tensor, ...],
    judges: nn.Module,
    encoders: nn.Module,
    words_NTD: Tensor,
    sentence_ND: Tensor,
    lengths_N: Tensor,
    labels_N: Tensor,
    *,
    ranks: Ranks,
    matching: float,
) -> tuple[Tensor, Values]:
    """The generator's loss and its parts, of what it `painted`."""
    (kl_N, *images), read = made, (words_NTD, sentence_ND)
    fooling = kl_N.new_zeros(())
    for judge, made_NCHW in zip(judges.of_size, images, strict=True):
        seen_NCHW = judge.features(made_NCHW)
        fooling = fooling + nonsaturating_loss(judge.alone(seen_NCHW))
        fooling = fooling + nonsaturating_loss(judge.with_caption(seen_NCHW, sentence_ND))
    found = matching_losses(encoders.image(images[-1]), read, lengths_N, labels_N, ranks)
    values = {"adversarial": fooling, **found, "kl": kl_N.mean()}
    loss = fooling + matching * (found["words"] + found["sentence"]) + values["kl"]
    return loss, values


def judges_update(
    judges: nn.Module, reals_NCHW: Tensor, sentence_ND: Tensor, wrong_ND: Tensor, *made: Tensor
) -> tuple[Tensor, Values]:
    """The discriminators' loss, and that of each; wrong_ND: of captions of other images. Real and
    made images go through one after the other, as does each with its captions."""
    values = {}
    for judge, made_NCHW in zip(judges.of_size, made, strict=True):
        side = made_NCHW.shape[2]
        real_NCHW = F.avg_pool2d(reals_NCHW, reals_NCHW.shape[2] // side)
        loss = judged(judge, real_NCHW, made_NCHW, sentence_ND, wrong_ND)
        values[f"loss_{side}"] = loss
    return sum(values.values()), values


def judged(
    judge: nn.Module, real_NCHW: Tensor, made_NCHW: Tensor, sentence_ND: Tensor, wrong_ND: Tensor
) -> Tensor:
    """The loss of one discriminator, ()."""
    real, made = judge.features(real_NCHW), judge.features(made_NCHW.to(real_NCHW))
    right = judge.alone(real), judge.with_caption(real, sentence_ND)
    wrong = (
        *(judge.alone(made), judge.with_caption(made, sentence_ND)),
        judge.with_caption(real, wrong_ND),
    )
    loss = sum(nonsaturating_loss(logit_N) for logit_N in right) / len(right)
    return loss + sum(nonsaturating_loss(-logit_N) for logit_N in wrong) / len(wrong)
