"""WGAN-GP on CIFAR-10: residual networks, gradient penalty.

Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028, gan_cifar_resnet.py of the authors' code
without its labels: five critic updates for each of the generator, lambda 10, no norm in the critic.
The learning rate falls over the second half of the run, theirs over all of it; their generator's
batch of 128 is 64 here.

    python -m engine.train wgan_gp_cifar10

Measured, small and short: patches of colour without objects by eye after 64,000 images of a subset
of 4,000 at batch 32, a quarter of the width and three critic updates, on one thread of 2 shared,
busy cores of an Intel Xeon without GPU.
"""

from engine.networks import residual
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.adversarial import Adversarial
from pipelines.settings import Data

ADAM = Adam(lr=2e-4, betas=(0.0, 0.9), decay_kimg=16_000)


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="cifar10", resolution=32, channels=3, batch=64, flip=True),
        step=Adversarial(
            generator=PlayerSettings(residual.Generator(width=128, growing=False), ADAM),
            discriminator=PlayerSettings(residual.FlatCritic(), ADAM),
            loss="wasserstein",
            critic_updates=5,
            gp=10.0,
        ),
        length=Length(steps=500_000),  # 100,000 of the generator
        outputs=Outputs(log_every=10, sample_every=200, checkpoint_every=200),
    )
