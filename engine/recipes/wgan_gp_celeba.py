"""WGAN-GP on CelebA, 64x64: residual networks, LayerNorm critic, gradient penalty.

Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028, gan_64x64.py of the authors'
code: five critic updates for each of the generator, lambda 10, LayerNorm in the critic.

    python -m engine.train wgan_gp_celeba

Not yet trained to its end.
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
