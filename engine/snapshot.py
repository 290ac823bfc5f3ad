"""What a run shows of itself while it trains: its pictures, held-out figures, the report."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engine import pictures, report
from engine.algorithm import Algorithm
from engine.latents import between_pairs
from engine.metrics.held_out import HeldOut
from engine.monitors import pairwise_distance
from engine.neighbours import Found, Neighbours
from engine.networks.conditional import with_classes
from engine.origin import Origin
from engine.originals import UNUSABLE, held_out_batch, originals, rows_over_rows
from engine.session import Session
from engine.world import Ranks
from kernels import philox
from pipelines.batch import Batch
from pipelines.datasets import Dataset, decode_some

SAMPLES = 2  # noise stream of latents for pictures
MEASURED, BESIDE = 64, 8  # samples sought among the training images, and those of them shown
ROWS, COLUMNS = 4, 8  # of the interpolation, and of the originals over reconstructions


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
        alone = Ranks(0, 0, 1, session.clock.device)
        self._held_out = HeldOut.open(session.recipe, alone, reconstructions=False)
        self._dataset = dataset
        self._neighbours: Neighbours | None = None
        self._originals_NCHW: Tensor | None = None
        self._shown: Batch | None = None

    def take(self) -> dict[str, float]:
        """Write the pictures of this moment; gives the figures that go with them.

        A family that cannot decode latents, or not reconstruct, is spared the pictures of that.
        """
        figures: dict[str, float] = {}
        with evaluating(self.session):
            if self._able("sampler"):
                figures |= self._samples()
                self._interpolation()
            if self._able("reconstruct"):
                self._reconstruction()
            if self._able("columns"):
                self._columns()
            if self._held_out:
                found = self._held_out.figures(self.session.samplers())
                figures |= {f"test/{name}": value for name, value in found.items()}
        return figures

    def _able(self, verb: str) -> bool:
        return getattr(type(self.session.recipe.step), verb) is not getattr(Algorithm, verb)

    def _samples(self) -> dict[str, float]:
        """The grid, the samples' nearest training images, and what monitors say of both."""
        images_NCHW = generate(self.session, self.session.recipe.outputs.samples)
        name = f"samples/{self.session.clock.images:09}.png"
        picture = pictures.grid(images_NCHW, columns_by_class(self.session, len(images_NCHW)))
        pictures.save(picture, self.folder / name, self._origin())
        figures = {}
        if len(images_NCHW) > 1 and len(self.reals_NCHW) > 1:
            distance = pairwise_distance(images_NCHW) / pairwise_distance(self.reals_NCHW)
            figures["monitor/diversity"] = float(distance)
        return figures | self._memorised(images_NCHW[:MEASURED])

    def _memorised(self, images_NCHW: Tensor) -> dict[str, float]:
        """The samples beside their nearest training images, and how near those are."""
        if self._neighbours is None:  # not before the first picture: training begins without it
            data, device = self.session.recipe.data, self.session.clock.device
            self._neighbours = Neighbours(self._dataset, data, device)
        found = self._neighbours.nearest(images_NCHW)
        shown = Found(*(values[:BESIDE] for values in found))
        picture = self._neighbours.picture(images_NCHW[:BESIDE], shown)
        pictures.save(picture, self.folder / "neighbours.png", self._origin(composite=True))
        distance = self._neighbours.distance(found)
        return {} if distance is None else {"monitor/neighbour_distance": distance}

    def _interpolation(self) -> None:
        """A row of images for each pair of the run's first fixed latents."""
        z_NL = between_pairs(fixed_latents(self.session, 2 * ROWS), COLUMNS)
        images_NCHW = self.session.recipe.step.decode(self.session.samplers(), z_NL)
        picture = pictures.grid(images_NCHW, COLUMNS)
        pictures.save(picture, self.folder / "interpolation.png", self._origin())

    def _reconstruction(self) -> None:
        """Rows of real images, held-out ones where there are any, over their reconstructions."""
        session = self.session
        if self._originals_NCHW is None:
            data = replace(session.recipe.data, download=False, on_error="skip")
            try:
                self._originals_NCHW, _ = originals(data, 0, ROWS // 2 * COLUMNS)
            except UNUSABLE:  # the test split; the training images are there
                self._originals_NCHW = self.reals_NCHW[: ROWS // 2 * COLUMNS]
        above_NCHW = self._originals_NCHW
        given_NCHW = above_NCHW.to(session.clock.device)
        made_NCHW = session.recipe.step.reconstruct(session.samplers(), given_NCHW).cpu()
        columns = min(COLUMNS, len(above_NCHW))
        picture = pictures.grid(rows_over_rows(above_NCHW, made_NCHW, columns), columns)
        path = self.folder / "reconstruction.png"
        pictures.save(picture, path, self._origin(composite=True))

    def _columns(self) -> None:
        """Held-out images beside what the model makes of them, a row for each."""
        session = self.session
        if self._shown is None:
            count = session.recipe.outputs.samples
            self._shown = held_out_batch(session.recipe.data, session.clock.device, count)
        columns = session.recipe.step.columns(session.samplers(), self._shown)
        made_NCHW = torch.stack(columns, 1).flatten(0, 1).float().cpu()
        path = self.folder / f"samples/{session.clock.images:09}.png"
        pictures.save(pictures.grid(made_NCHW, len(columns)), path, self._origin(composite=True))

    def _origin(self, composite: bool = False) -> Origin:
        """What pictures of this moment say of where they come from; a run is runs/RECIPE/NAME."""
        images, seed = self.session.clock.images, self.session.recipe.seed
        moment = f"run {self.folder.name} while training, at {images} images"
        return Origin(self.folder.parent.name, moment, seed, images, composite=composite)

    def write_report(self) -> None:
        """Refresh report.html."""
        report.write(self.folder)

    def close(self) -> None:
        """Let go of the held-out set."""
        if self._held_out:
            self._held_out.close()


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
    z_NL, classes = fixed_latents(session, count), session.recipe.step.classes()
    if columns := columns_by_class(session, count):
        label_N = (torch.arange(count, device=z_NL.device) // columns).clamp(max=classes - 1)
        z_NL = with_classes(z_NL, label_N, classes)
    return session.recipe.step.decode(session.samplers(), z_NL).cpu()


def columns_by_class(session: Session, count: int) -> int | None:
    """Images in a row of the grid where every class has one; None where there are no classes, or
    too many for a row each."""
    classes = session.recipe.step.classes()
    return count // classes if classes and 2 * classes <= count else None


def fixed_latents(session: Session, count: int) -> Tensor:
    """The run's latents for pictures, (count, L), the same at every moment."""
    key = philox.make_key(session.recipe.seed, device=session.clock.device)
    positions = torch.arange(count, device=session.clock.device)
    return philox.normal(key, SAMPLES, positions, session.recipe.step.latent_dim())
