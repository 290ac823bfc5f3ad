"""The baseline: one iteration of the PyTorch DCGAN tutorial, in its own arithmetic.

Plain eager float32; real and fake images go through the discriminator in separate passes with a
backward each; BCELoss on a sigmoid; Adam as torch makes it by default. Written from the tutorial's
description of the algorithm, on the networks of the same sizes that the engine trains.
"""

import torch
from torch import Tensor, nn


class TutorialDCGAN:
    """Generator, discriminator, their optimizers, and one iteration."""

    def __init__(self, generator: nn.Module, discriminator: nn.Module, latent: int = 100) -> None:
        self.generator = generator.train()
        self.discriminator = nn.Sequential(discriminator, nn.Sigmoid()).train()
        self.latent = latent
        self.criterion = nn.BCELoss()
        betas = (0.5, 0.999)
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), 2e-4, betas)
        self.optimizer_d = torch.optim.Adam(self.discriminator.parameters(), 2e-4, betas)

    def iteration(self, real_NCHW: Tensor) -> None:
        """Update the discriminator on real and on fake images, then the generator."""
        count, device = real_NCHW.shape[0], real_NCHW.device
        ones, zeros = torch.ones(count, device=device), torch.zeros(count, device=device)
        self.discriminator.zero_grad()
        self.criterion(self.discriminator(real_NCHW), ones).backward()
        fake_NCHW = self.generator(torch.randn(count, self.latent, device=device))
        self.criterion(self.discriminator(fake_NCHW.detach()), zeros).backward()
        self.optimizer_d.step()
        self.generator.zero_grad()
        self.criterion(self.discriminator(fake_NCHW), ones).backward()
        self.optimizer_g.step()
