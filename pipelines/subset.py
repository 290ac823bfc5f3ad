"""A dataset without some of its classes, for models that must not see them while they train.

It is a dataset of its own to all that reads it: its rows are counted from zero, its caches have
their own names. Numbers and names of the classes stay those of the whole.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from pipelines.images import Box
from pipelines.sources import Dataset, EncodedSet


@dataclass
class Subset(Dataset):
    """Some rows of another dataset; rows: int64 (n,), ascending."""

    whole: Dataset = None
    rows: np.ndarray = None

    def __len__(self) -> int:
        return len(self.rows)

    def decode(self, row: int) -> np.ndarray:
        return self.whole.decode(int(self.rows[row]))

    def describe(self, row: int) -> str:
        return self.whole.describe(int(self.rows[row]))

    def digest(self, times: bool) -> str:
        digest = hashlib.sha256(self.whole.digest(times).encode())
        digest.update(self.rows.tobytes())
        return digest.hexdigest()


@dataclass
class EncodedSubset(Subset, EncodedSet):
    """Some rows of a set of encoded image files."""

    def encoded(self, row: int) -> bytes:
        return self.whole.encoded(int(self.rows[row]))

    def ends(self, row: int) -> tuple[int, bytes, bytes]:
        return self.whole.ends(int(self.rows[row]))

    def box(self, row: int) -> Box | None:
        return self.whole.box(int(self.rows[row]))


def without(dataset: Dataset, classes: tuple[int, ...]) -> Dataset:
    """The dataset without the images of these classes. Raises ValueError naming the setting."""
    given = " ".join(str(label) for label in classes)
    if dataset.labels is None:
        raise ValueError(
            f"--data.without {given} needs classes, which {dataset.name} has not: leave it out"
        )
    there = set(np.unique(dataset.labels).tolist())
    if unknown := sorted(set(classes) - there):
        raise ValueError(
            f"--data.without {given}: {dataset.name} has no class {unknown[0]}; it has "
            f"{_listed(there, dataset.classes)}"
        )
    rows = np.flatnonzero(~np.isin(dataset.labels, classes))
    if not len(rows):
        raise ValueError(f"--data.without {given} leaves no class of {dataset.name}: name fewer")
    kept = f"of {len(dataset):,}, without class {given.replace(' ', ', ')}"
    kind = EncodedSubset if isinstance(dataset, EncodedSet) else Subset
    return kind(
        dataset.name,
        dataset.split,
        dataset.fit,
        dataset.labels[rows],
        dataset.classes,
        f"{dataset.note}; {kept}" if dataset.note else kept,
        attributes=None if dataset.attributes is None else dataset.attributes[rows],
        attribute_names=dataset.attribute_names,
        captions=dataset.captions and dataset.captions.of(rows),
        second=dataset.second,
        whole=dataset,
        rows=rows,
    )


def _listed(numbers: set[int], names: tuple[str, ...]) -> str:
    """The classes by number and, where that says more, by name; of many the first ten."""
    some = [
        f"{n} ({names[n]})" if n < len(names) and names[n] != str(n) else str(n)
        for n in sorted(numbers)[:10]
    ]
    return ", ".join(some) + (f" and {len(numbers) - 10} more" if len(numbers) > 10 else "")
