"""What a figure was measured with; figures of different protocols do not go side by side."""

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass

HELD_OUT = (
    *("elbo", "nll", "reconstruction", "kl", "bits_per_dim", "psnr", "ssim", "lpips"),
    *("auroc", "auroc_pixels", "auroc_features", "score_normal", "score_anomaly"),
    *("accuracy", "nmi", "cycle_A", "cycle_B", "code_perplexity", "codes_in_use"),
    *("content", "style"),
    *("code_bits", "code_bits_frequencies", "code_bits_uniform"),
    *("word_bits", "word_bits_frequencies", "word_bits_uniform"),
    *("r_precision", "r_precision_chance", "r_precision_real"),
)
"""Figures of `engine.metrics.held_out`, which have images of their own."""
HELD_OUT_IMAGES = 10_000


@dataclass(frozen=True)
class Protocol:
    """How figures were measured; stored beside them."""

    def values(self) -> dict[str, str | int | bool]:
        """As it is stored."""
        return asdict(self)

    def digest(self) -> str:
        """A short name of the protocol."""
        return hashlib.sha256(json.dumps(self.values(), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class FeatureProtocol(Protocol):
    """Of figures that compare the features of images.

    extractor, extractor_digest: the ruler. real, generated: numbers of images. dataset: digest of
    the real images' content. resize: from their resolution to the extractor's. ema: whether the
    moving average of the weights was sampled from. seed: of the latents.
    """

    extractor: str
    extractor_digest: str
    dataset: str
    split: str
    resolution: str
    resize: str
    real: int
    generated: int
    ema: bool
    seed: int


@dataclass(frozen=True)
class AugmentationProtocol(Protocol):
    """Of accuracies of classifiers that learned from real images, from samples, from both.

    classifier: what was trained, in how many updates (steps) on how many images each (batch).
    dataset, split, resolution: what the real images to learn from were taken from. real,
    generated: numbers of images to learn from. test: the images on which all were tried. ema:
    whether the moving average of the weights was sampled from. seed: of the choice of real images,
    of the latents, and of the training.
    """

    classifier: str
    steps: int
    batch: int
    dataset: str
    split: str
    resolution: str
    real: int
    generated: int
    test: str
    ema: bool
    seed: int


def held_out_words(names: Collection[str]) -> str:
    """What the protocol does not say of those figures that are not of samples; else empty."""
    there = [name for name in HELD_OUT if name in names]
    there += [name for name in dict.fromkeys(names) if name.startswith(("psnr_", "ssim_"))]
    if not there:
        return ""
    return (
        f"{', '.join(there)}: of held-out images, at most {HELD_OUT_IMAGES:,} of the test split in "
        f"a fixed order"
    )


def differences(protocols: dict[str, Protocol]) -> list[str]:
    """One line for each part in which the named protocols differ."""
    rows = {name: protocol.values() for name, protocol in protocols.items()}
    first = next(iter(rows.values()))
    return [
        f"{part}: " + ", ".join(f"{name} has {row[part]}" for name, row in rows.items())
        for part in first
        if len({str(row[part]) for row in rows.values()}) > 1
    ]
