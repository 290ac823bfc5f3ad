"""DCGAN on CIFAR-10, 32x32.

Radford, Metz and Chintala 2016, https://arxiv.org/abs/1511.06434, section 5.1 for the dataset;
batch 128 and 100,000 iterations as in the public run that reports FID 42.7.

    python -m engine.train dcgan_cifar10

Measured, short of its full length: D(x) 0.87 and D(G(z)) 0.12 after 48,000 images of a subset of
4,000, at 1,093 images/s on two cores of an AMD EPYC (Zen 5) without GPU.
"""

from engine.networks import dcgan
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.adversarial import Adversarial
from pipelines.settings import Data

ADAM = Adam(lr=2e-4, betas=(0.5, 0.999))  # paper, section 4


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="cifar10", resolution=32, channels=3, batch=128, flip=True),
        step=Adversarial(
            generator=PlayerSettings(dcgan.Generator(width=64), ADAM, ema_kimg=50),
            discriminator=PlayerSettings(dcgan.Discriminator(width=64), ADAM),
        ),
        length=Length(steps=100_000),
        outputs=Outputs(log_every=10, sample_every=200, checkpoint_every=200),
    )
