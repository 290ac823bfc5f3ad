"""CycleGAN on horse2zebra, 256x256: horses to zebras and back, without pairs.

Zhu, Park, Isola and Efros 2017, https://arxiv.org/abs/1703.10593, with the settings of the authors'
code: ResNet-9 generators, 70x70 PatchGANs, pools of 50, batch 1, images of 286 pixels cut to 256,
2e-4 that falls to 0 over the second half.

    python -m engine.train cyclegan_horse2zebra
    python -m engine.train cyclegan_horse2zebra --data.name unpaired --data.path FOLDER
    python -m engine.translate RUN_DIR --direction AtoB INPUT... --out DIR

Not yet trained to its end.
"""

from engine.networks import cyclegan
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.cycle import Cycle
from pipelines.settings import Data

ADAM = Adam(lr=2e-4, betas=(0.5, 0.999), decay_kimg=1e6)  # at most half of the run


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="horse2zebra", resolution=256, channels=3, batch=1, load=286, flip=True),
        step=Cycle(
            generators=PlayerSettings(cyclegan.Generators(), ADAM),
            discriminators=PlayerSettings(cyclegan.Discriminators(), ADAM),
        ),
        length=Length(epochs=200),
        outputs=Outputs(log_every=0.1, sample_every=2, samples=8, checkpoint_every=2),
    )
