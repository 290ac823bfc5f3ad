"""Conditional GAN on MNIST, 32x32: fully connected, least-squares loss.

Mirza and Osindero 2014, https://arxiv.org/abs/1411.1784, in the sizes and with the least-squares
loss of its most used public code (PyTorch-GAN, cgan.py), without that code's dropout.

    python -m engine.train cgan_mnist
    python -m engine.sample RUN_DIR --by-class

Measured, short of its full length: by eye every row is its digit, with ragged strokes and a few
spoilt ones, after 150,000 images, in 117 s on one thread of 2 shared cores of an Intel Xeon
without GPU, --compile off.
"""

from engine.networks import cgan
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.adversarial import Adversarial
from pipelines.settings import Data

ADAM = Adam(lr=2e-4, betas=(0.5, 0.999))


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="mnist", resolution=32, channels=1, batch=64),
        step=Adversarial(
            generator=PlayerSettings(cgan.Generator(), ADAM, ema_kimg=10),
            discriminator=PlayerSettings(cgan.Discriminator(), ADAM),
            loss="least-squares",
        ),
        length=Length(epochs=200),
        outputs=Outputs(log_every=12, sample_every=60, samples=80, checkpoint_every=120),
    )
