"""VQ-VAE on CUB-200-2011, 64x64: images as maps of 16x16 codes out of 512.

van den Oord, Vinyals and Kavukcuoglu 2017, https://arxiv.org/abs/1711.00937, section 4.1 and
appendix A.1: 256 channels, vectors of 64 numbers, commitment 0.25, decay 0.99, Adam at 2e-4, batch
128. Dead codes begin anew (Jukebox, Dhariwal et al. 2020, section 3.1), which the paper has not:
--revive-below 0 leaves it out.

    python -m engine.train vqvae_birds
    python -m engine.sample RUN_DIR --reconstruct

Measured, short and narrow (--kimg 20 --data.batch 32 --autoencoder.width 64 --autoencoder.lr 1e-3)
on a subset of 191 birds: PSNR 26.5 of 64 held-out ones, where thumbnails of as many bits have 21.0.
Not yet trained to its end.
"""

from engine.networks import vqvae
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.quantised import Quantised
from pipelines.settings import Data

ADAM = Adam(lr=2e-4, betas=(0.9, 0.999))


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="birds", resolution=64, channels=3, batch=128, flip=True),
        step=Quantised(autoencoder=PlayerSettings(vqvae.VectorQuantised(), ADAM)),
        length=Length(kimg=4000),
        outputs=Outputs(log_every=5, sample_every=100, samples=8, checkpoint_every=100),
    )
