"""GAN on MNIST: fully connected generator, small convolutional discriminator.

Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661

    python -m engine.train gan_mnist

Measured: readable digits at the end by eye, with more 1s and 9s than their share, in 385 s on one
thread of 2 shared cores of an AMD EPYC (Zen 5) without GPU.
"""

from engine.networks import mlp
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.adversarial import Adversarial
from pipelines.settings import Data

# With the customary 2e-4 and (0.5, 0.999) it collapsed onto four shapes within 120k images.
ADAM = Adam(lr=1e-3, betas=(0.0, 0.99), decay_kimg=150)


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="mnist", resolution=28, channels=1, batch=64),
        step=Adversarial(
            generator=PlayerSettings(mlp.Generator(latent=100), ADAM, ema_kimg=10),
            discriminator=PlayerSettings(mlp.Discriminator(), ADAM),
        ),
        length=Length(epochs=5),
        outputs=Outputs(log_every=12, sample_every=60, checkpoint_every=120),
    )
