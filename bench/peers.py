"""One DCGAN, trained eagerly in float32 by four loops: a bare one, accelerate's, Lightning's, ours.

    python -m bench.peers LOOP SIZE FOLDER BLOCK BLOCKS

The worker of bench_peers.py, one process for each loop. For each line that it reads it trains BLOCK
iterations, then prints what they took, as JSON; after BLOCKS of them it ends.

All train the same networks with the same losses and the same Adam, fused, and read their losses
back every 50 iterations, which is Lightning's default. The others take float images in [-1, 1] from
a TensorDataset and a DataLoader without workers; ours its resident pipeline, and guards against
non-finite values beside. accelerate and Lightning write what they read to TensorBoard, as ours.
Lightning has its default callbacks but for progress bar and summary, which are off. The run is one
epoch: checkpoints and pictures are written after it.

Shapes: N batch, C channels, H height, W width, L latent.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from bench.plain import entropy
from engine import recipe, session
from engine.describe import cost
from engine.networks import dcgan, mlp
from engine.settings import Adam, Length, Outputs, PlayerSettings, Recipe
from engine.start import begin, examine
from engine.stats import synchronize
from engine.steps.adversarial import Adversarial
from engine.train import loop
from pipelines.datasets import find
from pipelines.settings import Data

LATENT, LOG = 64, 50
SIDES = {"narrow": 16, "usual": 32}
NETWORKS = {
    "narrow": (dcgan.Generator(LATENT, 8), mlp.Discriminator((8, 16, 32))),
    "usual": (dcgan.Generator(LATENT, 32), mlp.Discriminator((32, 64, 128))),
}
"""Generator and discriminator; the usual ones are those of dcgan_mnist."""
BATCHES = {"narrow": 16, "usual": 64}


def moment() -> np.ndarray:
    """Seconds of the clock, and of all threads of this process on a processor."""
    return np.array([time.perf_counter(), time.process_time()])


class Turns:
    """Blocks of iterations, each begun at someone's word: `with turns:` around the computing of an
    iteration, `turns.next(losses)` at its end."""

    def __init__(self, block: int, device: torch.device, wait: Callable, tell: Callable) -> None:
        self.block, self.device, self.wait, self.tell = block, device, wait, tell
        self._begin()

    def _begin(self) -> None:
        self.wait()
        self.done, self.inside = 0, np.zeros(2)
        self.began = moment()

    def __enter__(self) -> None:
        self.entered = moment()

    def __exit__(self, *_: object) -> None:
        self.inside += moment() - self.entered

    def next(self, loss_d: Tensor, loss_g: Tensor) -> None:
        """Another iteration is done; at the end of a block, tell and wait."""
        self.done += 1
        if self.done == self.block:
            synchronize(self.device)
            took = {"": moment() - self.began, "inside_": self.inside}
            self.tell(
                {
                    f"{part}{unit}": float(seconds) / self.block
                    for part, both in took.items()
                    for unit, seconds in zip(("seconds", "cpu"), both, strict=True)
                }
            )
            self._begin()


def latents(real_NCHW: Tensor) -> Tensor:
    """As many as there are images, (N, L)."""
    return torch.randn(len(real_NCHW), LATENT, device=real_NCHW.device)


@dataclass
class Work:
    """What a loop trains, on which images, and where it may write."""

    generator: nn.Module
    discriminator: nn.Module
    optimizer_g: torch.optim.Optimizer
    optimizer_d: torch.optim.Optimizer
    loader: DataLoader
    device: torch.device
    folder: Path
    noise: Callable[[Tensor], Tensor] = latents


def recipe_of(size: str, iterations: int, folder: Path) -> Recipe:
    """What ours trains: no moving average, no schedule, nothing written before the end but the
    statistics."""
    adam, batch = Adam(lr=2e-4, betas=(0.5, 0.999)), BATCHES[size]
    never = 2 * iterations * batch / 1000
    generator, discriminator = (PlayerSettings(network, adam) for network in NETWORKS[size])
    return Recipe(
        Adversarial(generator, discriminator),
        Data("synthetic", SIDES[size], 1, batch, pipeline="resident", cache=folder / "cache"),
        Length(steps=iterations),
        Outputs(log_every=LOG * batch / 1000, sample_every=never, checkpoint_every=never),
        precision="fp32",
        compile="off",
    )


def work_of(
    given: Recipe, device: torch.device, folder: Path, rows: list[int] | None = None
) -> Work:
    """The same for the others, with the weights that ours begins with; rows: of the images, in
    the order in which they are shown, else shuffled."""
    networks = [n.to(device).train() for n in session.build_networks(given).values()]
    optimizers = []
    for settings, network in zip(given.step.players().values(), networks, strict=True):
        adam = settings.optimizer
        optimizers.append(
            torch.optim.Adam(network.parameters(), adam.lr, adam.betas, adam.eps, fused=True)
        )
    dataset = find(given.data)
    pixels_NHWC = np.stack([dataset.decode(row) for row in range(len(dataset))])
    images_NCHW = torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2).contiguous() / 127.5 - 1
    images, count = TensorDataset(images_NCHW), given.length.steps * given.data.batch
    sampler = RandomSampler(images, num_samples=count) if rows is None else rows
    loader = DataLoader(images, given.data.batch, sampler=sampler, pin_memory=device.type == "cuda")
    return Work(*networks, *optimizers, loader, device, folder)


def iteration(work: Work, real_NCHW: Tensor, backward: Callable) -> tuple[Tensor, Tensor]:
    """Update the discriminator, then the generator by the same fakes: their losses."""
    fake_NCHW = work.generator(work.noise(real_NCHW))
    work.optimizer_d.zero_grad()
    real_N, fake_N = work.discriminator(real_NCHW), work.discriminator(fake_NCHW.detach())
    loss_d = entropy(real_N, 1.0) + entropy(fake_N, 0.0)
    backward(loss_d)
    work.optimizer_d.step()
    work.discriminator.requires_grad_(False)
    work.optimizer_g.zero_grad()
    loss_g = entropy(work.discriminator(fake_NCHW), 1.0)
    backward(loss_g)
    work.optimizer_g.step()
    work.discriminator.requires_grad_(True)
    return loss_d.detach(), loss_g.detach()


def bare(work: Work, turns: Turns) -> None:
    """No library's loop; it keeps what it reads."""
    read = []
    for number, (real_NCHW,) in enumerate(work.loader, 1):
        real_NCHW = real_NCHW.to(work.device, non_blocking=True)
        with turns:
            losses = iteration(work, real_NCHW, Tensor.backward)
        if number % LOG == 0:
            read.append([loss.item() for loss in losses])
        turns.next(*losses)


def accelerate_loop(work: Work, turns: Turns) -> None:
    """As accelerate's documentation has it: everything prepared, its backward, its tracker."""
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=work.device.type == "cpu",
        mixed_precision="no",
        log_with="tensorboard",
        project_dir=work.folder,
    )
    accelerator.init_trackers("peers")
    names = ("generator", "discriminator", "optimizer_g", "optimizer_d", "loader")
    prepared = accelerator.prepare(*(getattr(work, name) for name in names))
    work = replace(work, **dict(zip(names, prepared, strict=True)))
    for number, (real_NCHW,) in enumerate(work.loader, 1):
        with turns:
            losses = iteration(work, real_NCHW, accelerator.backward)
        if number % LOG == 0:
            read = zip(("loss_d", "loss_g"), (loss.item() for loss in losses), strict=True)
            accelerator.log(dict(read), step=number)
        turns.next(*losses)
    accelerator.end_training()


def lightning_loop(work: Work, turns: Turns) -> None:
    """As Lightning's documentation has it for several optimizers, with the fakes made once."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.generator, self.discriminator = work.generator, work.discriminator
            self.automatic_optimization = False

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [work.optimizer_g, work.optimizer_d]

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            with turns:
                loss_d, loss_g = self.updates(batch[0])
            self.log_dict({"loss_d": loss_d, "loss_g": loss_g})
            self.losses = loss_d.detach(), loss_g.detach()

        def updates(self, real_NCHW: Tensor) -> tuple[Tensor, Tensor]:
            optimizer_g, optimizer_d = self.optimizers()
            fake_NCHW = self.generator(work.noise(real_NCHW))
            self.toggle_optimizer(optimizer_d)
            optimizer_d.zero_grad()
            real_N, fake_N = self.discriminator(real_NCHW), self.discriminator(fake_NCHW.detach())
            loss_d = entropy(real_N, 1.0) + entropy(fake_N, 0.0)
            self.manual_backward(loss_d)
            optimizer_d.step()
            self.untoggle_optimizer(optimizer_d)
            self.toggle_optimizer(optimizer_g)
            optimizer_g.zero_grad()
            loss_g = entropy(self.discriminator(fake_NCHW), 1.0)
            self.manual_backward(loss_g)
            optimizer_g.step()
            self.untoggle_optimizer(optimizer_g)
            return loss_d, loss_g

    class Next(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            turns.next(*module.losses)

    trainer = lightning.Trainer(
        accelerator="gpu" if work.device.type == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        callbacks=[Next()],
        default_root_dir=work.folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), work.loader)


def ours(given: Recipe, turns: Turns, folder: Path) -> None:
    """The engine's loop, as a run has it."""
    given, device, dataset = examine(given)
    command = recipe.Command(given, runs=folder / "runs")
    t = begin(command, "dcgan_mnist", dataset, device, cost(given))
    step = t.session.step

    def timed(batch):
        with turns:
            values = step(batch)
        timed.losses = values["discriminator/loss"], values["generator/loss"]
        return values

    iterate = t.iterate

    def iterate_and_tell():
        iterate()
        turns.next(*timed.losses)

    t.session.step, t.iterate = timed, iterate_and_tell
    with t.exits:
        loop(t)


OTHERS = {"bare": bare, "accelerate": accelerate_loop, "lightning": lightning_loop}
LOOPS = (*OTHERS, "ours")


def main(name: str, size: str, folder: str, block: str, blocks: str) -> None:
    """Train by one loop, in blocks."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = recipe_of(size, int(block) * int(blocks), Path(folder))
    work = None if name == "ours" else work_of(given, device, Path(folder))
    told = sys.stdout

    def tell(found: dict[str, float]) -> None:
        print(json.dumps(found), file=told, flush=True)

    with contextlib.redirect_stdout(sys.stderr):  # a loop may say what it likes
        turns = Turns(int(block), device, sys.stdin.readline, tell)
        if work is None:
            ours(given, turns, Path(folder))
        else:
            OTHERS[name](work, turns)


if __name__ == "__main__":
    main(*sys.argv[1:])
