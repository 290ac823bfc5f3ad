"""Self-attention GAN on CelebA, 64x64, without classes.

Zhang et al. 2019, https://arxiv.org/abs/1805.08318: spectral normalisation in both networks, hinge
loss, learning rates of 1e-4 and 4e-4, one update of each; the authors' networks for 128x128 pixels
cut to 64.

    python -m engine.train sagan_celeba

Measured, small and short: faces with hair, eyes and background by eye, many distorted, after 64,000
images of a subset of 8,000 at 32x32, batch 32 and a quarter of the width, in 29 minutes on one
thread of 2 shared, busy cores of an Intel Xeon without GPU.
"""

from engine.networks import sagan
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.adversarial import Adversarial
from pipelines.settings import Data

BETAS = (0.0, 0.9)


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="celeba", resolution=64, channels=3, batch=256, flip=True),
        step=Adversarial(
            generator=PlayerSettings(
                sagan.Generator(), Adam(lr=1e-4, betas=BETAS), spectral_norm=True, ema_kimg=50
            ),
            discriminator=PlayerSettings(
                sagan.Discriminator(), Adam(lr=4e-4, betas=BETAS), spectral_norm=True
            ),
            loss="hinge",
        ),
        length=Length(steps=100_000),
        outputs=Outputs(log_every=10, sample_every=200, checkpoint_every=200),
    )
