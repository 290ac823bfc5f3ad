"""Wasserstein GAN on MNIST, 32x32, with weight clipping.

Arjovsky, Chintala and Bottou 2017, https://arxiv.org/abs/1701.07875, algorithm 1, with the numbers
of critic updates of the authors' code: weights clipped to 0.01, RMSprop, DCGAN's networks at half
their width.
Watch discriminator/distance, the critic's estimate of the Wasserstein distance.

    python -m engine.train wgan_mnist

Not yet trained to its end.
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
