"""What is said when a dataset is not there."""

from pathlib import Path

from pipelines.settings import PAIRED, UNPAIRED, Data

DOWNLOADS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
DOWNLOADS |= {"celeba": "CelebA"}
"""torchvision's name of each dataset that it can fetch."""

COMPUTED = dict.fromkeys(UNPAIRED, "synthetic_unpaired")
COMPUTED |= dict.fromkeys(PAIRED, "synthetic_pairs") | {"birds": "synthetic_captions"}
"""The computed images that stand in for a dataset, where they are not those of `synthetic`."""


class DatasetMissing(Exception):
    """A dataset is not where it was looked for; the message has the places and the remedies."""


class NoSplit(Exception):
    """The dataset is there, but it has no images of this split."""


def missing_text(data: Data, why: str = "", looked: tuple[str, list[Path]] | None = None) -> str:
    """The whole message: what was looked for, where, and what can be done about it."""
    lines = [why or f"dataset {data.name!r} not found"]
    if looked is not None:
        lines += [f"  looked for: {looked[0]}"]
        lines += [f"  in: {folder.absolute()}" for folder in looked[1]]
    remedies = ["  SADDLE_DATA=/folder (or --data.root, --data.path)  says where the data is"]
    if data.path is not None:
        remedies = ["  --data.path  names another place"]
    if data.name in DOWNLOADS:
        remedies.append("  --data.download  fetches it with torchvision into the root")
    computed = COMPUTED.get(data.name, "synthetic")
    remedies.append(f"  --data.name {computed}  runs on computed images instead")
    return "\n".join([*lines, "remedies:", *remedies])
