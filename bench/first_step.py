"""The baseline of a start: a plain script of the PyTorch tutorial, up to its first iteration.

    python -m bench.first_step BATCH

Imports torch, makes DCGAN-64 and a batch of noise, and trains once; says so as engine.train does.
"""

import sys

import torch

from bench.tutorial_dcgan import TutorialDCGAN
from engine.networks import dcgan
from engine.networks.spec import ImageSpec


def main(batch: int) -> None:
    """One iteration."""
    device, images = torch.device("cuda" if torch.cuda.is_available() else "cpu"), ImageSpec(3, 64)
    generator = dcgan.Generator(latent=100, width=64).build(images).to(device)
    discriminator = dcgan.Discriminator(width=64).build(images).to(device)
    real_NCHW = torch.rand(batch, 3, 64, 64, device=device) * 2 - 1
    TutorialDCGAN(generator, discriminator).iteration(real_NCHW)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("first step", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
