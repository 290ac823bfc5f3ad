"""WGAN-GP on CelebA, 64x64: residual networks, LayerNorm critic, gradient penalty.

Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028, gan_64x64.py of the authors'
code: five critic updates for each of the generator, lambda 10, LayerNorm in the critic.

    python -m engine.train wgan_gp_celeba

Measured, small and short: blurred faces by eye, after 64,000 images of a subset of 8,000 at 32x32,
batch 32, an eighth to a quarter of the width, three critic updates and 4e-4, on one thread of 2
shared, busy cores of an Intel Xeon without GPU.
"""

from engine.networks import residual
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.adversarial import Adversarial
from pipelines.settings import Data

ADAM = Adam(lr=1e-4, betas=(0.0, 0.9))


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="celeba", resolution=64, channels=3, batch=64, flip=True),
        step=Adversarial(
            generator=PlayerSettings(residual.Generator(), ADAM),
            discriminator=PlayerSettings(residual.Critic(), ADAM),
            loss="wasserstein",
            critic_updates=5,
            gp=10.0,
        ),
        length=Length(steps=1_000_000),  # 200,000 of the generator
        outputs=Outputs(log_every=5, sample_every=100, checkpoint_every=100),
    )
