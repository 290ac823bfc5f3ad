"""SRGAN: images enlarged four times, from 24x24 to 96x96 crops of large images.

Ledig et al. 2017, https://arxiv.org/abs/1609.04802, section 3.2: 16 residual blocks, batch 16, Adam
1e-4; 10^6 iterations by pixels, then 2 * 10^5 with the discriminator, whose drop to 1e-5 after half
is a linear fall to 0 here. They train on 350,000 images of ImageNet.

    python -m engine.train srgan_x4
    python -m engine.train srgan_x4 --data.path FOLDER --vgg vgg19-dcbb9e9d.pth
    python -m engine.translate RUN_DIR INPUT... --out DIR
    python -m engine.evaluate RUN_DIR --sr Set5/ Set14/ BSD100/

Not yet trained to its end.
"""

from engine.networks import srgan
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.super_resolution import SuperResolution
from pipelines.settings import Data

PRETRAINING, ADVERSARIAL, BATCH = 1_000_000, 200_000, 16
ADAM = Adam(lr=1e-4, betas=(0.9, 0.999), decay_kimg=ADVERSARIAL / 2 * BATCH / 1000)


def recipe() -> Recipe:
    data = Data(name="tiles", resolution=96, channels=3, batch=BATCH, load=192, scale=4, flip=True)
    return Recipe(
        data=data,
        step=SuperResolution(
            generator=PlayerSettings(srgan.Generator(), ADAM),
            discriminator=PlayerSettings(srgan.Discriminator(), ADAM),
            pretrain_steps=PRETRAINING,
        ),
        length=Length(steps=PRETRAINING + ADVERSARIAL),
        outputs=Outputs(samples=16, sample_every=100, checkpoint_every=100),
    )
