"""How well do images and captions go together? The losses of DAMSM, and R-precision.

Xu et al. 2018, "AttnGAN: Fine-grained text to image generation with attentional generative
adversarial networks", https://arxiv.org/abs/1711.10485, equations 7 to 13. As in the authors' code,
the root 1 / gamma_2 of equation 10 is left out, and captions of an image's own class are not among
those that do not match it.

Shapes: N images, M captions, T words, R regions, D features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.networks.text import there

FEW = 1e-8  # lengths below count as this, in a cosine


@dataclass(frozen=True)
class Sharpness:
    """gamma_1 of attention over regions, gamma_2 over words, gamma_3 over captions."""

    regions: float = 4.0
    words: float = 5.0
    captions: float = 10.0


def attention(regions_NDR: Tensor, words_MTD: Tensor, lengths_M: Tensor, sharp: float) -> Tensor:
    """Of every image for every caption, what each word takes from each region, (N, M, T, R)
    (equations 7 to 9, a softmax over the caption's words and then one over regions)."""
    score_NMTR = torch.einsum("mtd,ndr->nmtr", words_MTD, regions_NDR)
    there_MT1 = there(lengths_M, words_MTD.shape[1])[:, :, None]
    over_words_NMTR = score_NMTR.masked_fill(~there_MT1, -torch.inf).softmax(2)
    return (sharp * over_words_NMTR).softmax(3)


def word_scores(
    regions_NDR: Tensor, words_MTD: Tensor, lengths_M: Tensor, sharp: Sharpness
) -> Tensor:
    """R(Q, D) of every image and every caption by their words, (N, M): the logarithm of the sum
    over words of exp(gamma_2 cos(c, e)), where c is what a word attends to (equation 10)."""
    weight_NMTR = attention(regions_NDR, words_MTD, lengths_M, sharp.regions)
    seen_NMTD = torch.einsum("nmtr,ndr->nmtd", weight_NMTR, regions_NDR)
    alike_NMT = cosine(seen_NMTD, words_MTD)
    there_MT = there(lengths_M, words_MTD.shape[1])
    return (sharp.words * alike_NMT).masked_fill(~there_MT, -torch.inf).logsumexp(2)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Of the last axis."""
    lengths = x.norm(dim=-1) * y.norm(dim=-1)
    return (x * y).sum(-1) / lengths.clamp(min=FEW)


def sentence_scores(whole_ND: Tensor, sentence_MD: Tensor) -> Tensor:
    """Cosines of every image and every caption, (N, M) (section 3.2, before equation 13)."""
    lengths_NM = whole_ND.norm(dim=1)[:, None] * sentence_MD.norm(dim=1)
    return (whole_ND @ sentence_MD.T) / lengths_NM.clamp(min=FEW)


def matching_loss(score_NN: Tensor, labels_N: Tensor | None, sharp: float) -> Tensor:
    """-E[log P(caption | image)] - E[log P(image | caption)], (), of scores whose diagonal is what
    belongs together (equations 11 and 12); labels_N: classes, whose other images do not count."""
    logits_NN = sharp * score_NN
    own_NN = torch.eye(len(score_NN), dtype=torch.bool, device=score_NN.device)
    if labels_N is not None:
        akin_NN = labels_N[:, None] == labels_N
        logits_NN = logits_NN.masked_fill(akin_NN & ~own_NN, -torch.inf)
    right_N = logits_NN.diagonal()
    return (logits_NN.logsumexp(1) - right_N).mean() + (logits_NN.logsumexp(0) - right_N).mean()


@dataclass
class Features:
    """What the encoders make of images and of the captions that belong to them, float32.

    regions_NDR, whole_ND: of images. words_NTD, sentence_ND: of captions of lengths_N words.
    labels_N: the images' classes, or None.
    """

    regions_NDR: Tensor
    whole_ND: Tensor
    words_NTD: Tensor
    sentence_ND: Tensor
    lengths_N: Tensor
    labels_N: Tensor | None


def losses(features: Features, sharp: Sharpness) -> tuple[Tensor, Tensor]:
    """The loss of words and the one of sentences, () each (equation 13 is their sum)."""
    f = features
    by_words_NN = word_scores(f.regions_NDR, f.words_NTD, f.lengths_N, sharp)
    by_sentence_NN = sentence_scores(f.whole_ND, f.sentence_ND)
    return tuple(
        matching_loss(score_NN, f.labels_N, sharp.captions)
        for score_NN in (by_words_NN, by_sentence_NN)
    )


CANDIDATES = 100
"""Captions that an image is compared with, its own among them (section 4)."""


def r_precision(whole_ND: Tensor, sentence_ND: Tensor, labels_N: Tensor | None) -> dict[str, float]:
    """The share of images whose own caption is nearer, by the cosine, than those of the following
    99 images of other classes (fewer if there are no more), and what blind choice comes to."""
    score_NN = sentence_scores(whole_ND, sentence_ND)
    count, device = len(score_NN), score_NN.device
    later_NN = torch.arange(count, device=device)[:, None] + torch.arange(1, count, device=device)
    later_NN = later_NN % count  # the others, beginning with the next
    differs_NN = torch.ones_like(later_NN, dtype=torch.bool)
    if labels_N is not None:
        differs_NN = labels_N[later_NN] != labels_N[:, None]
    differs_NN &= differs_NN.cumsum(1) < CANDIDATES
    other_NN, own_N1 = score_NN.gather(1, later_NN), score_NN.diagonal()[:, None]
    better_N = ((other_NN > own_N1) & differs_NN).any(1)
    ties_N = ((other_NN == own_N1) & differs_NN).sum(1)
    right_N = torch.where(better_N, 0.0, 1.0 / (1 + ties_N))
    return {
        "r_precision": float(right_N.double().mean()),
        "r_precision_chance": float((1.0 / (1 + differs_NN.sum(1)).double()).mean()),
    }
