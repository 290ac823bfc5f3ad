"""Repair of CelebA's faces, 128x128: free-form strokes and boxes filled in.

Yu et al. 2019 (DeepFill v2), https://arxiv.org/abs/1806.03589: gated convolutions, SN-PatchGAN,
hinge loss, batch 16, 1e-4; without its refining stage. Holes weigh 6 times what is known, as of
Liu et al. 2018, https://arxiv.org/abs/1804.07723.

    python -m engine.train inpaint_celeba
    python -m engine.train inpaint_celeba --data.name folder --data.path SCANS --data.channels 1
    python -m engine.translate RUN_DIR INPUT... --mask MASK --out DIR

Measured, small and short (flags in README): PSNR 25.42 after 20,000 images at 32x32, where holes in
the mean colour have 20.92 and those filled from their surroundings 25.13; not yet trained to its
end, nor at 128x128.
"""

from engine.networks import inpaint
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.inpainting import Inpainting
from pipelines.settings import Data

ADAM = Adam(lr=1e-4, betas=(0.5, 0.999))  # as the authors' code


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="celeba", resolution=128, channels=3, batch=16, flip=True),
        step=Inpainting(
            generator=PlayerSettings(inpaint.Generator(), ADAM),
            discriminator=PlayerSettings(inpaint.Discriminator(), ADAM, spectral_norm=True),
        ),
        length=Length(kimg=8000),
        outputs=Outputs(log_every=2, sample_every=100, samples=8, checkpoint_every=100),
    )
