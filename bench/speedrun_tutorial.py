"""Trains the PyTorch DCGAN tutorial's loop on a recipe's images and measures its generator.

    python -m bench.speedrun_tutorial RECIPE FOLDER --seed 0 --kimg 300 --every-kimg 10
        --workers 2 [--width 64] -- [FLAGS]

A process of its own, as a user would start it. Its clock runs from the start on, imports of torch
included, and stands still while the generator is measured and while what the tutorial does not have
is imported and opened. FLAGS override the recipe: taken of it are data, metrics and the networks'
width (--width: another). Loop, arithmetic, networks and data loading are the tutorial's.
FOLDER/metrics.jsonl gets a line for each measurement, as a run's has.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from engine import BEGAN


class Watch:
    """Seconds since the process began, less those in which it was stopped."""

    def __init__(self) -> None:
        self._out = 0.0

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Time inside does not count."""
        began = time.monotonic()
        yield
        self._out += time.monotonic() - began

    def seconds(self) -> float:
        """What it shows now."""
        return time.monotonic() - BEGAN - self._out


class Images:
    """A dataset's images as torchvision's datasets hand them out: each opened by PIL, transformed.

    They are resized, cut and mirrored as the recipe says, and in [-1, 1].
    """

    def __init__(self, dataset, data) -> None:
        from torchvision import transforms as t

        from pipelines.images import to_channels

        self.dataset, self.data, self._to_channels = dataset, data, to_channels
        side, load = data.resolution, data.load or data.resolution
        steps = [t.CenterCrop(data.crop)] if data.crop else []
        steps += [t.Resize(load), t.RandomCrop(side) if data.load else t.CenterCrop(side)]
        steps += [t.RandomHorizontalFlip()] if data.flip else []
        half = (0.5,) * data.channels
        self.transform = t.Compose([*steps, t.ToTensor(), t.Normalize(half, half)])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int):
        image = self._to_channels(self._opened(row), self.data.channels, self.data.window)
        return self.transform(image)

    def _opened(self, row: int):
        from PIL import Image

        if hasattr(self.dataset, "images_NHWC"):
            return Image.fromarray(self.dataset.images_NHWC[row].squeeze())
        if hasattr(self.dataset, "encoded"):
            return Image.open(io.BytesIO(self.dataset.encoded(row)))
        return Image.fromarray(self.dataset.decode(row).squeeze())  # computed ones


def with_its_networks(recipe, width: int | None):
    """The recipe with the tutorial's networks: latent 100, BatchNorm in both, as wide as the
    recipe's generator unless told (the tutorial's are 64)."""
    from engine.networks import dcgan

    step = recipe.step
    wide = width or getattr(step.generator.network, "width", 64)
    generator = replace(step.generator, network=dcgan.Generator(width=wide))
    discriminator = replace(step.discriminator, network=dcgan.Discriminator(wide))
    return replace(recipe, step=replace(step, generator=generator, discriminator=discriminator))


def train(recipe, kimg: float, every_kimg: float, workers: int, path: Path, watch: Watch) -> None:
    """The tutorial's loop until so many thousand images were seen."""
    import torch

    with watch.stopped():
        from bench.tutorial_dcgan import TutorialDCGAN
        from engine.metrics.evaluator import Evaluator
        from engine.metrics.schedule import entry_of
        from engine.session import build_networks
        from engine.stats import synchronize
        from engine.world import Ranks, choose_device
        from pipelines.datasets import find

        device = choose_device(recipe.device)
        evaluator = Evaluator(recipe, Ranks(0, 0, 1, device), print)
    torch.manual_seed(recipe.seed)
    images = Images(find(recipe.data), recipe.data)
    loader = torch.utils.data.DataLoader(
        images, recipe.data.batch, shuffle=True, num_workers=workers
    )
    networks = {name: n.to(device) for name, n in build_networks(recipe).items()}
    baseline = TutorialDCGAN(*networks.values(), latent=recipe.step.generator.network.latent)
    seen, total, every = 0, kimg * 1000, every_kimg * 1000
    while seen < total:
        for real_NCHW in loader:
            baseline.iteration(real_NCHW.to(device))
            before, seen = seen, seen + len(real_NCHW)
            if seen >= total or seen // every > before // every:
                synchronize(device)
                seconds = watch.seconds()
                with watch.stopped(), open(path, "a") as file:
                    entry = entry_of(seen, evaluator.evaluate(networks, False), seconds)
                    file.write(json.dumps(entry) + "\n")
                    print(f"{seen:,} images, {seconds:.1f} s: {entry['figures']}", flush=True)
            if seen >= total:
                break
    evaluator.close()


def main() -> int:
    """The command line; exit code."""
    watch = Watch()
    parser = argparse.ArgumentParser(prog="python -m bench.speedrun_tutorial")
    parser.add_argument("recipe")
    parser.add_argument("folder", type=Path)
    for flag, kind in (("seed", int), ("kimg", float), ("every-kimg", float), ("workers", int)):
        parser.add_argument(f"--{flag}", type=kind, required=True)
    parser.add_argument("--width", type=int)
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, flags = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    import torch  # noqa: F401 (as the tutorial's script does first, so the clock has it)
    import torchvision  # noqa: F401

    with watch.stopped():
        from engine import recipe as recipes

        recipe = replace(recipes.parse(given.recipe, flags).recipe, seed=given.seed)
        recipe = with_its_networks(recipe, given.width)
    given.folder.mkdir(parents=True, exist_ok=True)
    path = given.folder / "metrics.jsonl"
    train(recipe, given.kimg, given.every_kimg, given.workers, path, watch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
