"""Worker of test_equality.py: python -m tests.equal OUT MODE CASE..., alone or under torchrun.

Trains each case for some steps on the same images, checks that all ranks hold the same, and writes
what was trained to OUT/CASE.safetensors.
"""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from engine import checkpoint, session, world
from engine.compile import Compiler
from engine.networks import mlp, vae
from engine.networks.spec import ImageSpec, Network
from engine.optimizer import Guarded, GuardedAdam, GuardedRMSprop
from engine.parallel import Piece
from engine.precision import Precision
from engine.session import Session
from engine.settings import Adam, Length, Optimizer, PlayerSettings, Recipe, RMSprop
from engine.steps.adversarial import Adversarial
from engine.steps.autoencoder import Variational
from pipelines.batch import Batch
from pipelines.settings import Data

SIDE = 16
ADAM = Adam(lr=1e-3, betas=(0.0, 0.99))


class ToDtype(nn.Module):
    """Latents are float32; the network may be float64."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.get_default_dtype())


@dataclass(frozen=True)
class NormFree(Network):
    """A generator whose images do not depend on one another; over 1 MB, so two of DDP's buckets."""

    latent: int = 12

    def build(self, images: ImageSpec) -> nn.Module:
        shape = (images.channels, images.resolution, images.resolution)
        pixels = shape[0] * shape[1] * shape[2]
        layers = [ToDtype(), nn.Linear(self.latent, 700), nn.LeakyReLU(0.2), nn.Linear(700, 700)]
        layers += [nn.LeakyReLU(0.2), nn.Linear(700, pixels), nn.Tanh(), nn.Unflatten(1, shape)]
        return nn.Sequential(*layers)


@dataclass(frozen=True)
class Normed(mlp.Generator):
    """Its statistics are to be those of all ranks."""

    def build(self, images: ImageSpec) -> nn.Module:
        return nn.Sequential(ToDtype(), super().build(images))


def adversarial(
    generator: Network,
    optimizer: Optimizer = ADAM,
    spectral_norm: bool = False,
    eps: float = 1e-8,
    **settings: Any,
) -> Adversarial:
    critic = mlp.Discriminator(channels=(8, 16))
    return Adversarial(
        PlayerSettings(generator, Adam(lr=1e-3, eps=eps), spectral_norm, ema_kimg=0.05),
        PlayerSettings(critic, optimizer, spectral_norm),
        **settings,
    )


def critic(optimizer: Optimizer, **settings: Any) -> Adversarial:
    """A large epsilon, since the gradient of the critic's last bias is rounding alone."""
    return adversarial(
        NormFree(), replace(optimizer, eps=1e-3), loss="wasserstein", critic_updates=2, **settings
    )


CLIPPED = critic(RMSprop(lr=1e-3), clip_weights=0.05)
PENALISED = critic(ADAM, gp=10.0)
SPECTRAL = adversarial(
    NormFree(),
    spectral_norm=True,
    eps=1e-6,  # gradients through so many norms are 1e-5 and less, and their rounding is large
    loss="hinge",
    augment=("color", "translation", "cutout"),
)
PENALTY = adversarial(NormFree(), r1=1.0, r1_every=2)
GAN = adversarial(NormFree())
NORMS = adversarial(Normed(latent=12, hidden=(32, 32)), joint=True)
VAE = Variational(
    PlayerSettings(vae.Dense(hidden=600, latent=8), Adam(lr=1e-3), ema_kimg=0.05, clip=1.0),
    beta=2.0,
)
# case: algorithm, micro-batches, sync_bn, compiled
CASES = {
    "gan": (GAN, 1, "off", False),
    "gan accumulated": (GAN, 2, "off", False),
    "norms": (NORMS, 1, "on", False),
    "penalty": (PENALTY, 1, "off", False),
    "penalty accumulated": (PENALTY, 2, "off", False),
    "clipped critic": (CLIPPED, 1, "off", False),
    "penalty of a critic": (PENALISED, 2, "off", False),
    "spectral norm": (SPECTRAL, 1, "off", False),
    "vae": (VAE, 1, "off", False),
    "vae halves": (VAE, 2, "off", False),
    "vae accumulated": (VAE, 4, "off", False),
    "vae poisoned": (VAE, 1, "off", False),
    "vae rolled back": (VAE, 1, "off", False),
    "penalty compiled": (PENALTY, 2, "off", True),
    "penalty of a critic compiled": (PENALISED, 1, "off", True),
    "spectral norm compiled": (SPECTRAL, 1, "off", True),
    "vae compiled": (VAE, 1, "off", True),
}
BATCH = 16


def run(case: str, mode: str, steps: int, ranks: world.Ranks) -> Session:
    """Train a case; every gradient is there in every step, and parameters never part."""
    step, accumulate, synchronised, compiled = CASES[case]
    data = Data(name="digits", resolution=SIDE, channels=1, batch=BATCH)
    recipe = Recipe(
        step, data, Length(steps=steps), parallel=mode, accumulate=accumulate, sync_bn=synchronised
    )
    compiler = Compiler(compiled, "test", required=True)
    live = session.start(recipe, ranks, Precision("fp32", "test", "cpu"), compiler, 10_000)
    own = BATCH // ranks.world_size
    rows = slice(ranks.rank * own, (ranks.rank + 1) * own)
    for number in range(steps):
        random = torch.Generator().manual_seed(number)
        images = torch.rand(BATCH, 1, SIDE, SIDE, generator=random)[rows] * 2 - 1
        positions = torch.arange(BATCH)[rows] + live.clock.images
        images = images.to(torch.get_default_dtype())
        if "poisoned" in case and number == 3 and ranks.rank == ranks.world_size - 1:
            images[-1] = torch.nan  # the other ranks see nothing of it, and must skip the step too
        batch = Batch(images, torch.zeros(own, dtype=torch.int64), positions)
        if "rolled back" in case and number == 3:
            wander(live, batch)
        live.step(batch)
        live.clock.advance()
    skipped = {name: int(player.bad_gradients) for name, player in live.players.items()}
    assert set(skipped.values()) == {int("poisoned" in case)}, skipped
    return live


def wander(live: Session, batch: Batch) -> None:
    """Go two steps, and back to where they began as a checkpoint is restored."""
    kept = {path: held(t).clone() for path, t in checkpoint.shared_tensors(live).items()}
    for _ in range(2):
        live.step(batch)
    for path, tensor in checkpoint.shared_tensors(live).items():
        held(tensor).copy_(kept[path])
    for player in live.players.values():
        player.shared.loaded()


def held(tensor: Tensor | Piece) -> Tensor:
    """What this rank has of it."""
    return tensor.values if isinstance(tensor, Piece) else tensor


def trained(live: Session) -> dict[str, Tensor]:
    """Parameters, buffers, moving averages and the optimizers' moments, whole."""
    found: dict[str, Tensor | Piece] = {}
    for name, player in live.players.items():
        found |= {f"{name}/{k}": v for k, v in player.shared.parameters().items()}
        found |= {f"{name}/buffers/{k}": v for k, v in player.network.named_buffers()}
        found |= {f"{name}/moments/{k}": v for k, v in player.shared.moments().items()}
        if player.average:
            found |= {f"{name}/average/{k}": v for k, v in player.average.parameters().items()}
    whole = {k: v.whole() if isinstance(v, Piece) else v for k, v in found.items()}
    with live.gathered():  # what is shown is the same as what is stored
        for name, player in live.players.items():
            kind = f"{name}/average" if player.average else name
            for path, shown in player.sampler.named_parameters():
                assert torch.equal(shown, whole[f"{kind}/{path}"]), path
    return {k: v.detach().clone().contiguous() for k, v in whole.items()}


def assert_same_on_all_ranks(tensors: dict[str, Tensor], ranks: world.Ranks) -> None:
    data = safetensors.torch.save(tensors)
    digests = ranks.gather(hashlib.sha256(data).hexdigest())
    assert len(set(digests)) == 1, digests


def guard_gradients() -> None:
    """A parameter without a gradient is an error: frameworks skip it in silence."""
    for kind in (GuardedAdam, GuardedRMSprop):
        kind.step = checked(kind.step)


def checked(step: Callable) -> Callable:
    """An optimizer's step, after a look whether all gradients are there."""

    def look_and_step(self: Guarded, closure: None = None) -> None:
        missing = [p.shape for g in self.param_groups for p in g["params"] if p.grad is None]
        assert not missing, missing
        step(self, closure)

    return look_and_step


def main(out: str, mode: str, dtype: str, steps: str, *cases: str) -> None:
    torch.set_default_dtype(getattr(torch, dtype))
    torch.set_num_threads(1)
    guard_gradients()
    ranks = world.start(torch.device("cpu"))
    for case in cases:
        torch._dynamo.reset()
        tensors = trained(run(case, mode, int(steps), ranks))
        assert_same_on_all_ranks(tensors, ranks)
        if ranks.rank == 0:
            safetensors.torch.save_file(tensors, Path(out) / f"{case}.safetensors")
    world.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
    world.leave(0)
