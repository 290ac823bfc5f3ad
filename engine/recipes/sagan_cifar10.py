"""Self-attention GAN on CIFAR-10 with its classes.

Zhang et al. 2019, https://arxiv.org/abs/1805.08318: spectral normalisation in both networks, hinge
loss, learning rates of 1e-4 and 4e-4, one update of each; the authors' networks for 128x128 pixels
cut to 32. Classes go into the generator's BatchNorm and a projection.

    python -m engine.train sagan_cifar10

Measured, small and short: blots in the colours of their classes by eye after 64,000 images of a
subset of 4,000 at batch 32 and a quarter of the width, on one thread of 2 shared, busy cores of an
Intel Xeon without GPU.
"""

from engine.networks import sagan
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.adversarial import Adversarial
from pipelines.settings import Data

BETAS = (0.0, 0.9)


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="cifar10", resolution=32, channels=3, batch=64, flip=True),
        step=Adversarial(
            generator=PlayerSettings(
                sagan.Generator(classes=10),
                Adam(lr=1e-4, betas=BETAS),
                spectral_norm=True,
                ema_kimg=50,
            ),
            discriminator=PlayerSettings(
                sagan.Discriminator(classes=10), Adam(lr=4e-4, betas=BETAS), spectral_norm=True
            ),
            loss="hinge",
        ),
        length=Length(steps=100_000),
        outputs=Outputs(log_every=10, sample_every=200, samples=80, checkpoint_every=200),
    )
