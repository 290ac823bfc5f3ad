"""DAMSM: encoders of captions and of images that learn which go together, for attngan_birds.

Xu et al. 2018, https://arxiv.org/abs/1711.10485, section 3.2, settings as in the authors' code:
batch 48, Adam 2e-3, gradients of norm 0.25 at most, 200 epochs (of the released encoders). Their
fall of 2% an epoch is a linear one over the second half here, and the bound is on both encoders'
gradient.

    python -m engine.train damsm_birds
    python -m engine.train damsm_birds --inception inception_v3_google-0cc3c7bd.pth
    python -m engine.train attngan_birds --damsm RUN_DIR

Not yet trained to its end.
"""

from engine.networks import damsm
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.matching import Matching
from pipelines.settings import Data

ADAM = Adam(lr=2e-3, betas=(0.5, 0.999), decay_kimg=1e6)  # at most half of the run


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="birds", resolution=256, channels=3, batch=48, load=304, flip=True),
        step=Matching(encoders=PlayerSettings(damsm.Encoders(), ADAM, clip=0.25)),
        length=Length(epochs=200),
        outputs=Outputs(samples=8, sample_every=100, checkpoint_every=100),
    )
