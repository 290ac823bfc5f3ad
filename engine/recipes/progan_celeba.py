"""Progressive GAN on CelebA, 64x64: grown from 4x4, resolution by resolution, with WGAN-GP.

Karras et al. 2018, https://arxiv.org/abs/1710.10196: networks of table 2 up to 64x64, 600 thousand
images at each resolution after 600 thousand in which it is faded in, batches of 128 128 128 64 32,
Adam begun anew at each. The half-life of the generator's average is that of the authors' .999 per
update of 32 images.

    python -m engine.train progan_celeba

Trained shortly and narrow, to 32x32 (96,000 images, README): coarse faces. Not yet to its end.
"""

from engine.networks import progan
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.progressive import Progressive
from pipelines.settings import Data

ADAM = Adam(lr=1e-3, betas=(0.0, 0.99))


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="celeba", resolution=64, channels=3, batch=128, flip=True),
        step=Progressive(
            generator=PlayerSettings(progan.Generator(), ADAM, ema_kimg=22),
            discriminator=PlayerSettings(progan.Discriminator(), ADAM),
            stable_steps=4688,  # 600 thousand images
            fade_steps=4688,
            updates=(1, 1, 1, 2, 4),
        ),
        length=Length(kimg=12_000),
        outputs=Outputs(log_every=10, sample_every=100, checkpoint_every=100),
    )
