"""DCGAN on CelebA, 64x64.

Radford, Metz and Chintala 2016, https://arxiv.org/abs/1511.06434, sections 3 and 4

    torchrun --nproc_per_node=8 -m engine.train dcgan_celeba

Measured: 227 images/s at batch 64 on 2 cores of an AMD EPYC (Zen 5) without GPU, 2.1 times the
PyTorch tutorial's (bench/bench_step.py); not yet trained to its full length, nor on a GPU.
"""

from engine.networks import dcgan
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.steps.adversarial import Adversarial
from pipelines.settings import Data

ADAM = Adam(lr=2e-4, betas=(0.5, 0.999))  # paper, section 4


def recipe() -> Recipe:
    return Recipe(
        data=Data(name="celeba", resolution=64, channels=3, batch=128),  # batch: paper, section 4
        step=Adversarial(
            generator=PlayerSettings(dcgan.Generator(latent=100, width=64), ADAM, ema_kimg=10),
            discriminator=PlayerSettings(dcgan.Discriminator(width=64), ADAM),
        ),
        length=Length(epochs=25),
        outputs=Outputs(log_every=5, sample_every=100, checkpoint_every=100),
    )
