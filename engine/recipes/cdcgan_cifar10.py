"""Class-conditional DCGAN on CIFAR-10: BatchNorm by class, projection discriminator, hinge loss.

Radford et al. 2016, https://arxiv.org/abs/1511.06434, for the stages; Miyato and Koyama 2018,
https://arxiv.org/abs/1802.05637, for the projection with spectral normalisation and the hinge loss.

    python -m engine.train cdcgan_cifar10
    python -m engine.sample RUN_DIR --class 7

Measured, short of its full length and at half its width: after 300,000 images of a subset of 4,000,
with --augment translation cutout, rows have the colours and grounds of their classes (sky and sea,
grass) by eye and no objects. On one thread of 2 shared, busy cores of an Intel Xeon without GPU.
"""

from engine.networks import cgan
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.adversarial import Adversarial
from pipelines.settings import Data

ADAM = Adam(lr=2e-4, betas=(0.5, 0.999))


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="cifar10", resolution=32, channels=3, batch=128, flip=True),
        step=Adversarial(
            generator=PlayerSettings(cgan.ConvolutionalGenerator(), ADAM, ema_kimg=50),
            discriminator=PlayerSettings(cgan.ProjectionDiscriminator(), ADAM, spectral_norm=True),
            loss="hinge",
        ),
        length=Length(steps=100_000),
        outputs=Outputs(log_every=10, sample_every=200, samples=80, checkpoint_every=200),
    )
