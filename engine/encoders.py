"""The encoders of a trained run of DAMSM, for a run that takes them as they are."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import nn

from engine.checkpoint import newest_whole
from engine.networks.damsm import Encoders
from engine.run import read_recipe
from engine.steps.matching import Matching
from engine.stored import CheckpointError, Loaded

PLAYER = "encoders"


@dataclass(frozen=True)
class DamsmRun:
    """A run at its newest whole checkpoint. digest: SHA-256 of that."""

    folder: Path
    sizes: Encoders
    loaded: Loaded

    @property
    def digest(self) -> str:
        """SHA-256 of its checkpoint."""
        return self.loaded.index["index_sha256"]

    def check_words(self, words: tuple[str, ...]) -> None:
        """Raise ValueError where captions are of other words than those that it has read."""
        own = tuple(self.loaded.index.get("words", ()))
        if own != words:
            raise ValueError(
                f"--damsm {self.folder} was trained on captions of other words ({len(own):,} then, "
                f"{len(words):,} now{_first_other(own, words)}): train damsm_birds on these "
                f"captions, with the same --data.name and --data.path"
            )

    def fill(self, network: nn.Module) -> None:
        """Put its weights into a network of the same sizes. Raises CheckpointError where they do
        not fit."""
        stored, prefix = self.loaded.shared, f"{PLAYER}/network/"
        paths = [path for path in stored if path.startswith(prefix)]
        try:
            network.load_state_dict({path.removeprefix(prefix): stored[path] for path in paths})
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{self.loaded.folder} does not fit: {reason}") from error


def _first_other(own: tuple[str, ...], words: tuple[str, ...]) -> str:
    others = [word for word in words if word not in set(own)]
    return f", {others[0]!r} among them" if others else ""


@lru_cache
def open_damsm(folder: Path) -> DamsmRun:
    """The run in a folder. Raises ValueError naming the flag where it is none, or has nothing to
    take yet."""
    try:
        name, recipe, _ = read_recipe(folder)
    except ValueError as error:
        raise ValueError(f"--damsm {error}") from None
    if not isinstance(recipe.step, Matching):
        raise ValueError(f"--damsm {folder} is a run of {name}: give one of damsm_birds")
    said: list[str] = []
    checkpoint = newest_whole(folder / "checkpoints", said.append)
    if checkpoint is None:
        why = "; ".join(said) or "it has none yet"
        raise ValueError(f"--damsm {folder} has no whole checkpoint ({why}): train it first")
    return DamsmRun(folder, recipe.step.encoders.network, Loaded(checkpoint))
