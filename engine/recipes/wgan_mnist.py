"""Wasserstein GAN on MNIST, 32x32, with weight clipping.

Arjovsky, Chintala and Bottou 2017, https://arxiv.org/abs/1701.07875, algorithm 1, with the numbers
of critic updates of the authors' code: weights clipped to 0.01, RMSprop, DCGAN's networks at half
their width.
Watch discriminator/distance, the critic's estimate of the Wasserstein distance.

    python -m engine.train wgan_mnist

Measured, short of its full length: after 500,000 images, which are 1,063 updates of the generator,
samples have the strokes of digits by eye and few are readable; the distance has fallen from 0.30
to 0.12. On one thread of 2 shared, busy cores of an Intel Xeon without GPU, --compile off.
"""

from engine.networks import dcgan
from engine.settings import Length, Outputs, PlayerSettings, Recipe, RMSprop
from engine.steps.adversarial import Adversarial
from pipelines.settings import Data

RMSPROP = RMSprop(lr=5e-5)


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="mnist", resolution=32, channels=1, batch=64),
        step=Adversarial(
            generator=PlayerSettings(dcgan.Generator(width=32), RMSPROP),
            discriminator=PlayerSettings(dcgan.Discriminator(width=32), RMSPROP),
            loss="wasserstein",
            critic_updates=5,
            critic_warmup=True,
            clip_weights=0.01,
        ),
        length=Length(epochs=25),
        outputs=Outputs(log_every=12, sample_every=60, checkpoint_every=120),
    )
