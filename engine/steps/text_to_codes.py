"""Captions into images: a codebook of images first, then a transformer over words and codes.

Ramesh et al. 2021, "Zero-shot text-to-image generation" (DALL-E),
https://arxiv.org/abs/2102.12092, section 2: an autoencoder learns to make images codes (here that
of `engine.steps.quantised`, in place of their discrete VAE); then, that being left as it is, a
transformer learns the words t of an image's caption and after them its codes c by minimising

    text E[-log p(t_i | t before)] + (1 - text) E[-log p(c_j | t, c before)]

over both at once, means over their places, text 1/8 (section 2.2).

Shapes: N batch, C channels, H height, W width, L words of a caption, M codes of an image, K codes
of the codebook.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from engine.algorithm import Networks, Values
from engine.codebook import perplexity
from engine.networks.vqvae import Autoencoder
from engine.player import Player
from engine.settings import PlayerSettings
from engine.steps.quantised import Quantised
from engine.trained import Trained, open_run
from engine.verb import warn
from kernels import philox
from pipelines.batch import Batch

SHOWN = 12  # noise stream of the samples beside held-out images
END, NONE = 0, -1  # the number of a caption's end, and what stands after it


@dataclass(frozen=True, kw_only=True)
class TextToCodes(Quantised):
    """An autoencoder with a codebook, and the transformer that comes after it."""

    transformer: PlayerSettings
    vqvae_steps: int = 20_000
    """Iterations in which the autoencoder learns; in all that follow the transformer does."""
    vqvae: Path | None = None
    """Run directory of an autoencoder that was trained before (vqvae_birds), which then does not
    learn here; needed to begin and to go on, not to sample. May lie elsewhere on resume."""
    vqvae_digest: Annotated[str, tyro.conf.Suppress] = ""
    """SHA-256 of that run's newest checkpoint, which thereby is part of what defines this run."""
    text: float = 1 / 8
    """Weight of the words in the transformer's loss; the codes have the rest of 1."""
    latent: int = 256
    """Length of the latent vector: a number for each code of an image, or more."""
    temperature: float = 1.0
    """By which logits are divided when codes are drawn."""
    top: int = 0
    """Draw among so many of the likeliest codes; 0 draws among all."""

    def settled(self) -> "TextToCodes":
        if self.vqvae is None:
            return self
        return replace(self, vqvae_digest=open_vqvae(self.vqvae).checkpoint)

    def check(self) -> None:
        super().check()
        codes, sizes = self.autoencoder.network, self.transformer.network
        for name in ("codes", "halvings"):
            if getattr(codes, name) != getattr(sizes, name):
                raise ValueError(
                    f"--transformer.{name} {getattr(sizes, name)} must be the autoencoder's, "
                    f"{getattr(codes, name)}: give both"
                )
        if self.autoencoder.ema_kimg:
            raise ValueError(
                "--autoencoder.ema-kimg must be 0: the transformer learns the codes of the weights "
                "themselves"
            )
        if self.vqvae_steps < 1:
            raise ValueError("--vqvae-steps must be at least 1")
        if not 0 <= self.text < 1:
            raise ValueError(f"--text {self.text:g} must be at least 0 and below 1")
        if self.temperature <= 0 or self.top < 0:
            raise ValueError("--temperature must be above 0, and --top not negative")

    def notes(self) -> tuple[str, ...]:
        if self.vqvae:
            return (f"autoencoder: that of {self.vqvae}; the transformer learns on its codes",)
        return (
            f"autoencoder learns for {self.vqvae_steps:,} iterations, then the transformer on its "
            f"codes",
        )

    def begin(self, networks: Networks) -> None:
        if self.vqvae:
            take_autoencoder(self.vqvae, networks["autoencoder"])

    def kinds(self) -> tuple[int, ...]:
        return tuple(sorted({0, self.settles()}))

    def settles(self) -> int:
        """From when on the transformer learns; costs are told of that."""
        return 0 if self.vqvae else self.vqvae_steps

    def reduced(self) -> int:
        """Of the phase that costs are told of, in which the codebook rests."""
        return 0

    def latent_dim(self) -> int:
        return self.latent

    def captioned(
        self, networks: Networks, z_NL: Tensor, tokens_NL: Tensor, lengths_N: Tensor
    ) -> Tensor:
        """Each code is drawn by its own standard normal number of the latent vector."""
        transformer, autoencoder = networks["transformer"], networks["autoencoder"]
        u_NM = torch.special.ndtr(z_NL[:, : transformer.codes])
        how = self.temperature, self.top
        code_NM = transformer.generate(tokens_NL, lengths_N, u_NM, *how)
        return autoencoder.decode(code_NM.unflatten(1, (transformer.side, -1)))

    def columns(self, networks: Networks, batch: Batch) -> tuple[Tensor, ...]:
        """Images, what their codes give, and a sample of their captions."""
        key = philox.make_key(0, device=batch.position_N.device)
        z_NL = philox.normal(key, SHOWN, batch.position_N, self.latent)
        drawn_NCHW = self.captioned(networks, z_NL, batch.tokens_NL, batch.lengths_N)
        return batch.images_NCHW, self.reconstruct(networks, batch.images_NCHW), drawn_NCHW

    def held_out(self, networks: Networks, batch: Batch, key: Tensor) -> Values:
        """What the autoencoder's are; of each image -log p in nats of its caption, (N,), and of its
        codes given that, (N,); its words, (N, L), then the end, then nothing."""
        values = super().held_out(networks, batch, key)
        given = batch.tokens_NL, batch.lengths_N, values["code"]
        text_NL, code_NM = nll(networks["transformer"], *given)
        place_L = torch.arange(text_NL.shape[1], device=text_NL.device)
        word_NL = torch.where(place_L < batch.lengths_N[:, None], batch.tokens_NL, END)
        word_NL = torch.where(place_L > batch.lengths_N[:, None], NONE, word_NL)
        return values | {"text": text_NL.sum(1), "codes": code_NM.sum(1), "word": word_NL}

    def summarise(
        self, values: Values, labels_N: Tensor | None, without: tuple[int, ...] = ()
    ) -> dict[str, float]:
        """The autoencoder's figures; the mean bits of a code given the caption, beside those of the
        codes' own frequencies in these very images (which no model of single codes goes below) and
        those of codes that are all alike; the same of words, of which a caption's end is one."""
        figures = super().summarise(values, labels_N, without)
        word_M = values["word"].long().flatten()
        word_M = word_M[word_M != NONE]
        bit, codes = math.log(2), values["code"].shape[1]
        return figures | {
            "code_bits": float(values["codes"].mean()) / codes / bit,
            "code_bits_frequencies": math.log2(figures["code_perplexity"]),
            "code_bits_uniform": math.log2(self.autoencoder.network.codes),
            "word_bits": float(values["text"].sum()) / len(word_M) / bit,
            "word_bits_frequencies": math.log2(perplexity(torch.bincount(word_M))),
            "word_bits_uniform": math.log2(self.transformer.network.words),
        }

    def turns(self, iteration: int) -> bool:
        """Whether the transformer learns, on the codes of an autoencoder that does not any more."""
        return iteration >= self.settles()

    def start(self, players: dict[str, Player], key: Tensor) -> Callable[[Batch], Values]:
        learn_codes = super().start(players, key)
        autoencoder, transformer = players["autoencoder"], players["transformer"]
        loss = partial(words_and_codes, text=self.text)
        if self.latent < (codes := transformer.network.codes):
            raise ValueError(
                f"--latent {self.latent} is too few for the {codes} codes of an image: give a "
                f"number for each, --latent {codes}"
            )

        def step(batch: Batch) -> Values:
            if not self.turns(transformer.clock.iteration):
                return learn_codes(batch)
            code_NM = autoencoder.infer(codes_of, batch.images_NCHW)
            return transformer.update(loss, batch.tokens_NL, batch.lengths_N, code_NM)

        return step


@cache
def open_vqvae(run: Path) -> Trained:
    """A run with an autoencoder at its newest whole checkpoint. Raises ValueError naming the flag
    where it is no such run, and what opening a run raises."""
    remedy = "python -m engine.train vqvae_birds trains one, and without --vqvae this run does"
    try:
        trained = open_run(run, device="cpu", warn=warn)
    except ValueError as error:
        raise ValueError(f"--vqvae {run}: {error}; {remedy}") from error
    if not isinstance(trained.networks.get("autoencoder"), Autoencoder):
        raise ValueError(f"--vqvae {run}: {trained.name} has no codebook; {remedy}")
    return trained


def take_autoencoder(run: Path, network: nn.Module) -> None:
    """Give the network the weights of a run (see `open_vqvae`). Raises ValueError where they are of
    other sizes."""
    trained = open_vqvae(run)
    found = trained.networks["autoencoder"]
    if shapes(found) != shapes(network):
        sizes = trained.recipe.step.autoencoder.network
        raise ValueError(
            f"--vqvae {run} is another autoencoder, {sizes} for {trained.channels} channels: give "
            f"these sizes as --autoencoder.* and --transformer.*, and --data.channels"
        )
    network.load_state_dict(found.state_dict())


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    """Of what the network keeps, by name."""
    return {path: value.shape for path, value in network.state_dict().items()}


def codes_of(autoencoder: nn.Module, images_NCHW: Tensor) -> Tensor:
    """The codes of images in raster order, int64 (N, M)."""
    return autoencoder.encode(images_NCHW).flatten(1)


def nll(
    transformer: nn.Module, tokens_NL: Tensor, lengths_N: Tensor, code_NM: Tensor
) -> tuple[Tensor, Tensor]:
    """-log p of each place of the caption, paddings too, (N, L), and of each code, (N, M), given
    all before it, float32 in nats."""
    text_NLV, code_NMK = transformer(tokens_NL, lengths_N, code_NM)
    padded_NL = transformer.padded(tokens_NL, lengths_N)
    pairs = (text_NLV, padded_NL), (code_NMK, code_NM)
    text_NL, nll_NM = (
        F.cross_entropy(logits.float().movedim(-1, 1), goal, reduction="none")
        for logits, goal in pairs
    )
    return text_NL, nll_NM


def words_and_codes(
    transformer: nn.Module,
    tokens_NL: Tensor,
    lengths_N: Tensor,
    code_NM: Tensor,
    *,
    text: float,
) -> tuple[Tensor, Values]:
    """The transformer's loss, and the mean bits of a place of the caption and of a code."""
    text_NL, nll_NM = nll(transformer, tokens_NL, lengths_N, code_NM)
    loss = text * text_NL.mean() + (1 - text) * nll_NM.mean()
    bit = math.log(2)
    return loss, {"text_bits": text_NL.mean() / bit, "code_bits": nll_NM.mean() / bit}
