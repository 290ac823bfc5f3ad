"""AttnGAN: birds of 256 pixels from their captions, in three stages with attention to words.

Xu et al. 2018, https://arxiv.org/abs/1711.10485, section 4, settings as in the authors' code for
birds: batch 20, Adam 2e-4, 600 epochs, moving average 0.999 an iteration, lambda 5, images cut
about the birds, resized to 304 and cut to 256. The encoders come from a run of damsm_birds.

    python -m engine.train attngan_birds
    python -m engine.train attngan_birds --damsm RUN_DIR
    python -m engine.sample RUN_DIR --caption "a small bird with a red head"
    python -m engine.sample RUN_DIR --caption "a small bird with a red head" --attention

Not yet trained to its end.
"""

from engine.networks import attngan, damsm
from engine.recipes.damsm_birds import ADAM as ENCODERS
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.text_to_image import TextToImage
from pipelines.settings import Data

ADAM = Adam(lr=2e-4, betas=(0.5, 0.999))
HALF_LIFE = 693 * 20 / 1000  # of a moving average of 0.999 an iteration, in thousands of images


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="birds", resolution=256, channels=3, batch=20, load=304, flip=True),
        step=TextToImage(
            generator=PlayerSettings(attngan.Generator(), ADAM, ema_kimg=HALF_LIFE),
            discriminators=PlayerSettings(attngan.Discriminators(), ADAM),
            encoders=PlayerSettings(damsm.Encoders(), ENCODERS, clip=0.25),
        ),
        length=Length(epochs=600),
        outputs=Outputs(samples=8, sample_every=100, checkpoint_every=100),
    )
