"""Wasserstein GAN on CelebA, 64x64, with weight clipping.

Arjovsky, Chintala and Bottou 2017, https://arxiv.org/abs/1701.07875, algorithm 1, with the numbers
of critic updates of the authors' code: weights clipped to 0.01, RMSprop, DCGAN's networks.
Watch discriminator/distance, the critic's estimate of the Wasserstein distance.

    python -m engine.train wgan_celeba

Measured, small and short: rough faces of many kinds by eye after 500,000 images of a subset of
8,000 at 32x32 and half the width, the distance fallen from 0.3 to 0.07, on one thread of 2 shared,
busy cores of an Intel Xeon without GPU.
"""

from engine.networks import dcgan
from engine.settings import Length, Outputs, PlayerSettings, Recipe, RMSprop
from engine.steps.adversarial import Adversarial
from pipelines.settings import Data

RMSPROP = RMSprop(lr=5e-5)


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="celeba", resolution=64, channels=3, batch=64, flip=True),
        step=Adversarial(
            generator=PlayerSettings(dcgan.Generator(), RMSPROP),
            discriminator=PlayerSettings(dcgan.Discriminator(), RMSPROP),
            loss="wasserstein",
            critic_updates=5,
            critic_warmup=True,
            clip_weights=0.01,
        ),
        length=Length(epochs=25),
        outputs=Outputs(log_every=5, sample_every=100, checkpoint_every=100),
    )
