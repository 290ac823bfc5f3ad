"""Worker of bench_memory.py: python -m bench.memory_one WAY, under torchrun; prints one JSON line.

Trains a network that is large for its batch, and says what memory this rank holds between
iterations and at most, less what it held before the network was there.
"""

import ctypes
import gc
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine import session, world
from engine.compile import Compiler
from engine.networks.spec import ImageSpec, Network
from engine.precision import Precision
from engine.settings import Adam, Length, PlayerSettings, Recipe
from engine.steps.autoencoder import Variational
from pipelines.batch import Batch
from pipelines.settings import Data

WIDTH, DEPTH, BATCH, STEPS = 2048, 12, 8, 3


class Chain(nn.Module):
    """Layers of equal size, so that parts of the network are small against all of it."""

    def __init__(self) -> None:
        super().__init__()
        layers = [m for _ in range(DEPTH) for m in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
        self.layers = nn.Sequential(*layers)

    def encode(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        mean_NL, log_variance_NL = self.layers(x_NCHW.flatten(1)).chunk(2, 1)
        return mean_NL, log_variance_NL

    def decode(self, z_NL: Tensor) -> Tensor:
        return torch.cat([z_NL, z_NL], 1)[:, :, None, None]


@dataclass(frozen=True)
class Deep(Network):
    """A network that is large for its batch."""

    latent: int = WIDTH // 2

    def build(self, images: ImageSpec) -> nn.Module:
        return Chain()


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(x for x in lines if x.startswith(field)).split()[1])


def forget_peak() -> None:
    """Begin to measure VmHWM anew, from memory that is really in use."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def main(way: str) -> None:
    torch.set_num_threads(1)
    ranks = world.start(torch.device("cpu"))
    step = Variational(PlayerSettings(Deep(), Adam()))
    data = Data(name="digits", resolution=1, channels=WIDTH, batch=BATCH)
    recipe = Recipe(step, data, Length(steps=STEPS), parallel=way)
    if way.startswith("deepspeed"):
        import deepspeed  # noqa: F401  (its code is not what is measured)
    forget_peak()
    before = resident("VmRSS")
    live = session.start(
        recipe, ranks, Precision("fp32", "bench", "cpu"), Compiler(False, "bench"), 1000
    )
    own = BATCH // ranks.world_size
    batch = Batch(
        torch.zeros(own, WIDTH, 1, 1), torch.zeros(own, dtype=torch.int64), torch.arange(own)
    )
    for number in range(STEPS):
        if number == STEPS - 1:
            forget_peak()
            held = resident("VmRSS") - before
        live.step(batch)
        live.clock.advance()
    peak = resident("VmHWM") - before
    parameters = sum(p.numel() for p in vae_parameters(live))
    everyone = ranks.gather((held, peak))
    if ranks.rank == 0:
        found = {"parameters": parameters, "held": [h for h, _ in everyone]}
        print(json.dumps(found | {"peak": [p for _, p in everyone]}), flush=True)
    world.stop()


def vae_parameters(live: session.Session) -> list[torch.Tensor]:
    """As the recipe builds them, whole."""
    return list(session.build_networks(live.recipe)["autoencoder"].to("meta").parameters())


if __name__ == "__main__":
    main(sys.argv[1])
    world.leave(0)
