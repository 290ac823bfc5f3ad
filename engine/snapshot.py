"""What a run shows of itself while it trains: sample grids, held-out figures, the report."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engine import pictures, report
from engine.monitors import pairwise_distance
from engine.session import Session
from kernels import philox
from pipelines.batch import Clock
from pipelines.datasets import Dataset, NoSplit, decode_some, find
from pipelines.open import Pipeline, open_pipeline

SAMPLES = 2  # noise stream of latents for pictures
HELD_OUT_IMAGES, HELD_OUT_BATCH = 10_000, 500


class Snapshots:
    """Draws a run's pictures and measures it on held-out images; rank 0's work."""

    def __init__(self, session: Session, folder: Path, dataset: Dataset) -> None:
        self.session, self.folder = session, folder
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        count = min(session.recipe.outputs.samples, len(dataset))
        skip = session.recipe.data.on_error == "skip"
        reals = torch.from_numpy(decode_some(dataset, range(len(dataset)), count, skip))
        self.reals_NCHW = reals.float() / 127.5 - 1
        pictures.save(pictures.grid(self.reals_NCHW), folder / "reals.png")
        self._test = _held_out_pipeline(session)

    def take(self) -> dict[str, float]:
        """Write the sample grid of this moment; gives the figures that go with it."""
        session = self.session
        with evaluating(session):
            images_NCHW = generate(session, session.recipe.outputs.samples)
            name = f"{session.clock.images:09}.png"
            pictures.save(pictures.grid(images_NCHW), self.folder / "samples" / name)
            figures = self._held_out()
        if len(images_NCHW) > 1 and len(self.reals_NCHW) > 1:
            distance = pairwise_distance(images_NCHW) / pairwise_distance(self.reals_NCHW)
            figures["monitor/diversity"] = float(distance)
        return figures

    def write_report(self) -> None:
        """Refresh report.html."""
        report.write(self.folder)

    def close(self) -> None:
        """Let go of the held-out set."""
        if self._test:
            self._test[0].close()

    def _held_out(self) -> dict[str, float]:
        if not self._test:
            return {}
        pipeline, clock = self._test
        total = min(pipeline.images, HELD_OUT_IMAGES)
        step, networks = self.session.recipe.step, self.session.samplers()
        key = philox.make_key(0, device=clock.device)
        sums: dict[str, Tensor] = {}
        clock.seek(0)
        while clock.images < total:
            pipeline.ready(clock)
            values = step.held_out(networks, pipeline.batch(clock), key)
            for name, value_N in values.items():
                part = value_N[: total - clock.images].double().sum()
                sums[name] = sums.get(name, 0) + part
            clock.advance()
        return {f"test/{name}": float(value) / total for name, value in sums.items()}


def _held_out_pipeline(session: Session) -> tuple[Pipeline, Clock] | None:
    """The test split, if the family measures on it and the dataset has one."""
    recipe = session.recipe
    if type(recipe.step).held_out is type(recipe.step).__mro__[1].held_out:
        return None
    try:
        dataset = find(recipe.data, "test")
    except NoSplit:
        return None
    clock = Clock(min(HELD_OUT_BATCH, len(dataset)), session.clock.device)
    data = replace(recipe.data, flip=False, batch=clock.batch)
    return open_pipeline(dataset, data, clock, 0, session.key, say=lambda text: None), clock


@contextmanager
def evaluating(session: Session) -> Iterator[None]:
    """No gradients, and the networks to show in eval mode (running statistics)."""
    networks = session.samplers().values()
    before = [n.training for n in networks]
    try:
        for network in networks:
            network.eval()
        with torch.no_grad():
            yield
    finally:
        for network, training in zip(networks, before, strict=True):
            network.train(training)


def generate(session: Session, count: int) -> Tensor:
    """Images from the run's fixed latents, (count, C, H, W) in [-1, 1], on the host."""
    step = session.recipe.step
    key = philox.make_key(session.recipe.seed, device=session.clock.device)
    positions = torch.arange(count, device=session.clock.device)
    z_NL = philox.normal(key, SAMPLES, positions, step.latent_dim())
    return step.decode(session.samplers(), z_NL).cpu()
