"""pix2pix on the CMP facades, 256x256: photographs from label maps.

Isola, Zhu, Zhou and Efros 2017, https://arxiv.org/abs/1611.07004, with the settings of the authors'
code: U-Net-256 with dropout, conditional 70x70 PatchGAN, 100 times the absolute difference, batch
1, images of 286 pixels cut to 256 and mirrored, 2e-4 that falls to 0 over the second half.

    python -m engine.train pix2pix_facades
    python -m engine.train pix2pix_facades --direction AtoB
    python -m engine.train pix2pix_facades --data.name pairs --data.path FOLDER
    python -m engine.translate RUN_DIR --direction BtoA INPUT... --out DIR

Not yet trained to its end.
"""

from engine.networks import pix2pix
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.paired import Paired
from pipelines.settings import Data

ADAM = Adam(lr=2e-4, betas=(0.5, 0.999), decay_kimg=1e6)  # at most half of the run


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="facades", resolution=256, channels=3, batch=1, load=286, flip=True),
        step=Paired(
            generator=PlayerSettings(pix2pix.Generator(), ADAM),
            discriminator=PlayerSettings(pix2pix.Discriminator(), ADAM),
            direction="BtoA",
        ),
        length=Length(epochs=200),
        outputs=Outputs(log_every=0.1, sample_every=4, samples=8, checkpoint_every=4),
    )
