"""The baseline of the adversarial recipes: one iteration as today's public code writes it.

Eager float32 in contiguous NCHW; real and fake images are judged apart; torch.optim as torch makes
it by default; penalties by torch.autograd.grad(create_graph=True); torch's own spectral_norm;
clamp_ on one parameter after the other; both losses are read back in every iteration. Written from
what those programs do, on networks of the sizes that the engine trains, and from nothing else of
the engine. How a program comes by the generator's fakes is a field, as it differs between them.

Shapes: N batch, C channels, H height, W width, L latent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

Loss = Callable[..., Tensor]

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Embedding)


def entropy(logits_N: Tensor, target: float) -> Tensor:
    """Cross-entropy of logits, (), with targets that are made anew each time."""
    target_N = torch.full_like(logits_N, target)
    return F.binary_cross_entropy_with_logits(logits_N, target_N)


def squared(output_N: Tensor, target: float) -> Tensor:
    """Half the mean squared distance, (), from such targets."""
    return 0.5 * F.mse_loss(output_N, torch.full_like(output_N, target))


LOSSES: dict[str, tuple[Loss, Loss]] = {
    "nonsaturating": (lambda r, f: entropy(r, 1.0) + entropy(f, 0.0), lambda f: entropy(f, 1.0)),
    "least-squares": (lambda r, f: squared(r, 1.0) + squared(f, 0.0), lambda f: squared(f, 1.0)),
    "hinge": (lambda r, f: F.relu(1.0 - r).mean() + F.relu(1.0 + f).mean(), lambda f: -f.mean()),
    "wasserstein": (lambda r, f: -r.mean() + f.mean(), lambda f: -f.mean()),
}
"""The discriminator's loss of its outputs at real and fake images, and the generator's."""


def normalised(network: nn.Module) -> nn.Module:
    """The network with torch's spectral normalisation on every layer that has a weight."""
    for module in list(network.modules()):
        if isinstance(module, LAYERS):
            spectral_norm(module)
    return network


@dataclass
class PlainGAN:
    """Generator and discriminator with their optimizers, and one iteration.

    reuse: the generator learns from the fakes that the discriminator has just judged, as in the
        PyTorch DCGAN tutorial and PyTorch-GAN; otherwise from new ones.
    freeze: the discriminator's fakes carry no graph, and its parameters get no gradient while the
        generator learns, as in the code of Arjovsky et al. 2017 and in caogang/wgan-gp; otherwise
        as in heykeetae/Self-Attention-GAN and akanimax/pro_gan_pytorch.
    """

    generator: nn.Module
    discriminator: nn.Module
    optimizer_g: torch.optim.Optimizer
    optimizer_d: torch.optim.Optimizer
    loss: str
    latent: int
    reuse: bool
    freeze: bool
    critic_updates: int = 1
    clip: float = 0.0
    gp: float = 0.0
    drift: float = 0.0
    r1: float = 0.0
    r1_every: int = 1

    def __post_init__(self) -> None:
        self.counter = count()

    def noise(self, like_NCHW: Tensor) -> Tensor:
        """Latents, (N, L)."""
        return torch.randn(len(like_NCHW), self.latent, device=like_NCHW.device)

    def mixing(self, like_NCHW: Tensor) -> Tensor:
        """How much of the real image there is in a mixture, (N,)."""
        return torch.rand(len(like_NCHW), device=like_NCHW.device)

    def iteration(self, real_NCHW: Tensor, *label_N: Tensor) -> tuple[float, float | None]:
        """Update the discriminator, and the generator if it is its turn: their losses."""
        done = next(self.counter)
        with torch.set_grad_enabled(not self.freeze):
            fake_NCHW = self.generator(self.noise(real_NCHW), *label_N)
        punished = self.r1 > 0 and done % self.r1_every == 0
        loss_d = self.update_discriminator(real_NCHW, fake_NCHW.detach(), label_N, punished)
        if (done + 1) % self.critic_updates:
            return loss_d, None
        if not self.reuse:
            fake_NCHW = None
        return loss_d, self.update_generator(real_NCHW, fake_NCHW, label_N)

    def update_discriminator(
        self, real_NCHW: Tensor, fake_NCHW: Tensor, label_N: tuple[Tensor, ...], punished: bool
    ) -> float:
        """One step of the discriminator; its loss with all penalties."""
        if self.clip:
            for p in self.discriminator.parameters():
                p.data.clamp_(-self.clip, self.clip)
        self.optimizer_d.zero_grad()
        real_N = self.discriminator(real_NCHW, *label_N)
        loss = LOSSES[self.loss][0](real_N, self.discriminator(fake_NCHW, *label_N))
        if self.drift:
            loss = loss + self.drift * (real_N**2).mean()
        if self.gp:
            loss = loss + self.gp * self.gradient_penalty(real_NCHW, fake_NCHW, label_N)
        if punished:
            gradient = self.slope(real_NCHW, label_N)
            penalty = gradient.flatten(1).pow(2).sum(1).mean()
            loss = loss + self.r1 / 2 * self.r1_every * penalty
        loss.backward()
        self.optimizer_d.step()
        return loss.item()

    def gradient_penalty(
        self, real_NCHW: Tensor, fake_NCHW: Tensor, label_N: tuple[Tensor, ...]
    ) -> Tensor:
        """Of Gulrajani et al. 2017, equation 3, ()."""
        alpha = self.mixing(real_NCHW).view(-1, 1, 1, 1)
        mixed_NCHW = alpha * real_NCHW + (1 - alpha) * fake_NCHW
        gradient = self.slope(mixed_NCHW, label_N)
        return ((gradient.flatten(1).norm(2, dim=1) - 1) ** 2).mean()

    def slope(self, x_NCHW: Tensor, label_N: tuple[Tensor, ...]) -> Tensor:
        """The gradient of the discriminator's outputs at x, (N, C, H, W)."""
        x_NCHW = x_NCHW.detach().requires_grad_(True)
        output_N = self.discriminator(x_NCHW, *label_N)
        ones_N = torch.ones_like(output_N)
        return torch.autograd.grad(output_N, x_NCHW, ones_N, create_graph=True)[0]

    def update_generator(
        self, real_NCHW: Tensor, fake_NCHW: Tensor | None, label_N: tuple[Tensor, ...]
    ) -> float:
        """One step of the generator, from given fakes or new ones; its loss."""
        self.discriminator.requires_grad_(not self.freeze)
        self.optimizer_g.zero_grad()
        if fake_NCHW is None:
            fake_NCHW = self.generator(self.noise(real_NCHW), *label_N)
        loss = LOSSES[self.loss][1](self.discriminator(fake_NCHW, *label_N))
        loss.backward()
        self.optimizer_g.step()
        self.discriminator.requires_grad_(True)
        return loss.item()
