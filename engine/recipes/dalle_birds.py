"""DALL-E, small, on CUB-200-2011, 64x64: captions into 16x16 codes out of 512.

Ramesh et al. 2021, "Zero-shot text-to-image generation", https://arxiv.org/abs/2102.12092: an
autoencoder learns codes, then a transformer captions and codes. Of a small size (5.0 million
parameters without the words, where the paper's has 12 billion) for a small dataset; the
autoencoder is that of vqvae_birds and not a discrete VAE.

    python -m engine.train dalle_birds
    python -m engine.sample RUN_DIR --caption "a small red bird with black wings"

Measured, short and small (the flags are in the README) on a subset of 191 birds and 64 held-out
ones of other species: 6.61 bits a code, where the codes' own frequencies have 7.67 and an untrained
model 8.01; 4.56 bits a word against 5.74. On so few images the caption gains a hundredth of a bit,
and samples are shapes in bird-like colours. Not yet trained to its end.
"""

from engine.networks import dalle, vqvae
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.text_to_codes import TextToCodes
from pipelines.settings import Data

CODES = Adam(lr=2e-4, betas=(0.9, 0.999))
ADAM = Adam(lr=3e-4, betas=(0.9, 0.96), decay_kimg=1000)


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="birds", resolution=64, channels=3, batch=64, flip=True),
        step=TextToCodes(
            autoencoder=PlayerSettings(vqvae.VectorQuantised(), CODES),
            transformer=PlayerSettings(dalle.TextAndCodes(), ADAM, clip=1.0),
            vqvae_steps=20_000,
        ),
        length=Length(steps=50_000),
        outputs=Outputs(log_every=5, sample_every=100, samples=8, checkpoint_every=100),
    )
