"""The baseline of the variational autoencoders: one iteration as today's public code writes it.

Eager float32 in contiguous NCHW, each term of the bound written out, Adam as torch makes it by
default, the loss read back in every iteration. Written from Kingma and Welling 2014, on networks of
the sizes that the engine trains, and from nothing else of the engine.

Shapes: N batch, C channels, H height, W width, L latent.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def bernoulli(output_NCHW: Tensor, target_NCHW: Tensor) -> Tensor:
    """Cross-entropy of grey targets, summed over all pixels of all images, () (appendix C.1)."""
    return F.binary_cross_entropy(torch.sigmoid(output_NCHW), target_NCHW, reduction="sum")


def gaussian(output_NCHW: Tensor, target_NCHW: Tensor) -> Tensor:
    """Half the squared error, summed likewise, () (appendix C.2, variance 1)."""
    return 0.5 * F.mse_loss(output_NCHW, target_NCHW, reduction="sum")


PIXELS = {"bernoulli": bernoulli, "gaussian": gaussian}


@dataclass
class PlainVAE:
    """An autoencoder with `encoder`, to means and log-variances side by side, and `decoder`; its
    optimizer; and one iteration. beta: of Higgins et al. 2017, equation 4."""

    autoencoder: nn.Module
    optimizer_a: torch.optim.Optimizer
    pixels: str
    beta: float

    def noise(self, like_NL: Tensor) -> Tensor:
        """Of the latents, (N, L)."""
        return torch.randn_like(like_NL)

    def iteration(self, image_NCHW: Tensor) -> float:
        """Minimise the negative bound of equation 10 with one sample for each image: its value."""
        self.optimizer_a.zero_grad()
        mean_NL, log_variance_NL = self.autoencoder.encoder(image_NCHW).chunk(2, dim=1)
        deviation_NL = torch.exp(0.5 * log_variance_NL)
        z_NL = mean_NL + deviation_NL * self.noise(deviation_NL)
        output_NCHW = self.autoencoder.decoder(z_NL)
        reconstruction = PIXELS[self.pixels](output_NCHW, (image_NCHW + 1) / 2)
        kl = -0.5 * torch.sum(1 + log_variance_NL - mean_NL.pow(2) - log_variance_NL.exp())
        loss = (reconstruction + self.beta * kl) / len(image_NCHW)
        loss.backward()
        self.optimizer_a.step()
        return loss.item()
