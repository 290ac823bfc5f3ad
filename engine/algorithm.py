"""What an algorithm is to the engine: players, the updates of an iteration, what it can do."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from torch import Tensor, nn

from engine.networks.spec import Network
from engine.player_settings import PlayerSettings
from engine.translation import Direction, Translation
from pipelines.settings import Data

if TYPE_CHECKING:
    from engine.player import Player
    from pipelines.batch import Batch

Networks = dict[str, nn.Module]  # a player's network by the player's name
Values = dict[str, Tensor]  # named 0-d device tensors


NO_LATENTS = (
    "this recipe's model makes no images from latent vectors; where it makes them from images, "
    "python -m engine.translate RUN_DIR INPUT... --out DIR does"
)
NEEDS_CAPTION = (
    "this recipe's model draws what a caption says: python -m engine.sample RUN_DIR --caption "
    "'TEXT' does"
)
NO_TRANSLATION = "this recipe's model does not translate images"


@dataclass(frozen=True)
class Algorithm:
    """A training algorithm: its players, and how one iteration updates them.

    A subclass, one per file of `engine/steps/`, has one PlayerSettings field per player, in the
    order in which they are built. What a family cannot do raises ValueError saying so.
    """

    def players(self) -> dict[str, PlayerSettings]:
        """Settings of each player by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: v for name, v in values.items() if isinstance(v, PlayerSettings)}

    def begin(self, networks: "Networks") -> None:
        """Give fresh networks of a run, still on the host, those weights for which a setting names
        a source. Raises ValueError naming it."""

    def start(self, players: "dict[str, Player]", key: Tensor) -> "Callable[[Batch], Values]":
        """The step of a run: a callable that performs one iteration on a batch and returns named
        0-d device tensors. `key` is the run's noise key (see `kernels.philox`)."""
        raise NotImplementedError

    def period(self) -> int:
        """Iterations after which the pattern of updates repeats (penalties of some iterations
        only)."""
        return 1

    def settles(self) -> int:
        """The iteration from which on that is so."""
        return 0

    def turns(self, iteration: int) -> Hashable:
        """Which of its updates an iteration makes: iterations of equal turns give the device the
        same work, whatever else the clock says."""
        return ()

    def kinds(self) -> tuple[int, ...]:
        """Iterations that together show all that is computed."""
        return tuple(range(min(self.period(), 2)))

    def reduced(self) -> int:
        """Bytes that a rank gives into the step's own sum over ranks in an iteration; gradients and
        norms not counted. 0 where it takes none."""
        return 0

    def gathered(self, data: Data) -> int:
        """Bytes of each image that its rank gives to all others in an iteration."""
        return 0

    def talks(self) -> bool:
        """Whether a loss function itself takes something of other ranks; where there are several,
        such a one is not compiled."""
        return False

    def second_order(self) -> bool:
        """Whether a loss holds a gradient of a network (a penalty)."""
        return False

    def settled(self) -> "Algorithm":
        """The same with what a file or a run that its settings name says of sizes and content.
        Raises ValueError naming the flag."""
        return self

    def check(self) -> None:
        """Raise ValueError, naming flag and remedy, for values that cannot be trained with."""

    def check_words(self, words: tuple[str, ...]) -> None:
        """Raise ValueError, naming flag and remedy, for a vocabulary that is not the right one."""

    def classes(self) -> int:
        """Classes that the sampler is given: by the largest of the last so many numbers of the
        latent vector. 0 where it is given none."""
        return 0

    def told(self) -> dict[str, int]:
        """The dataset's classes by each player whose network is given them."""
        counts = {name: player.network.classes for name, player in self.players().items()}
        return {name: count for name, count in counts.items() if count}

    def reads_captions(self) -> bool:
        """Whether it is trained on captions."""
        return any(player.network.words for player in self.players().values())

    def check_data(self, data: Data) -> None:
        """Raise ValueError, naming flag and remedy, for data that it cannot be trained on."""

    def uses(self) -> dict[str, str]:
        """What a trained run is good for, and the command with RUN_DIR in the run's place."""
        found, kind = {}, type(self)
        if self.draws_captions():
            found["sample"] = "python -m engine.sample RUN_DIR --caption 'TEXT'"
        elif kind.latent_dim is not Algorithm.latent_dim:
            found["sample"] = "python -m engine.sample RUN_DIR --num 64 --out grid.png"
        for verb, more in (
            ("translate", ""),
            ("stylise", "--style IMAGE "),
            ("repair", "--mask MASK "),
        ):
            if getattr(kind, verb) is not getattr(Algorithm, verb):
                found[verb] = f"python -m engine.translate RUN_DIR IMAGES... {more}--out FOLDER"
        if kind.reconstruct is not Algorithm.reconstruct:
            found["reconstruct"] = "python -m engine.sample RUN_DIR --reconstruct"
        return found

    def latent_dim(self) -> int:
        """Length of the latent vector."""
        raise ValueError(NO_LATENTS)

    def sampler(self, networks: "Networks") -> nn.Module:
        """What makes images (N, C, H, W), float32 in [-1, 1], from latent vectors (N, L), in the
        mode that the networks are in; it shares their weights."""
        raise ValueError(NEEDS_CAPTION if self.draws_captions() else NO_LATENTS)

    def sampler_settings(self) -> Network:
        """Sizes whose `build` gives the module that `sampler` does, for whoever has only its
        weights."""
        raise ValueError(NO_LATENTS)

    def decode(self, networks: "Networks", z_NL: Tensor) -> Tensor:
        """Images (N C H W in [-1, 1]) from latent vectors, by networks in eval mode."""
        return self.sampler(networks)(z_NL).float()

    def draws_captions(self) -> bool:
        """Whether `captioned` makes images."""
        return type(self).captioned is not Algorithm.captioned

    def captioned(
        self, networks: "Networks", z_NL: Tensor, tokens_NL: Tensor, lengths_N: Tensor
    ) -> Tensor:
        """Images (N, C, H, W), float32 in [-1, 1], of captions (see `Batch`) and latent vectors,
        by networks in eval mode."""
        raise ValueError("this recipe's model draws no captions")

    def attended(
        self, networks: "Networks", z_NL: Tensor, tokens_NL: Tensor, lengths_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Those images, and what of each word went where in them: (N, words, h, w), of any scale,
        0 after the last word."""
        raise ValueError("--attention: this recipe's model has no map of where each word goes")

    def notes(self) -> tuple[str, ...]:
        """What a run says of it at its start: what it takes in place of what it was not given."""
        return ()

    def translation(self, data: Data) -> Translation:
        """How `translate`, or `repair`, takes images."""
        raise ValueError(NO_TRANSLATION)

    def translate(self, networks: "Networks", images_NCHW: Tensor, direction: Direction) -> Tensor:
        """Images of the other domain or of the larger size, float32 in [-1, 1]."""
        raise ValueError(NO_TRANSLATION)

    def translator(self, networks: "Networks", data: Data, direction: Direction) -> nn.Module:
        """What makes the images that `translate` does of images alone, in the mode that the
        networks are in; it shares their weights. Its settings say if it takes any size."""
        raise ValueError(NO_TRANSLATION)

    def translator_settings(self, direction: Direction) -> Network:
        """Sizes whose `build` gives the module that `translator` does, for whoever has only its
        weights."""
        raise ValueError(NO_TRANSLATION)

    def stylise(
        self, networks: "Networks", images_NCHW: Tensor, style_NCHW: Tensor, alpha: float
    ) -> Tensor:
        """Images in the style of others, (1 or N, C, any H, any W), float32 in [-1, 1]; alpha: how
        much so, from 0 to 1."""
        raise ValueError("this recipe's model takes no style")

    def repair(self, networks: "Networks", images_NCHW: Tensor, hole_N1HW: Tensor) -> Tensor:
        """Images, float32 in [-1, 1], whose holes (bool) are filled; elsewhere they stay as they
        are. `translation` says how it takes them."""
        raise ValueError("this recipe's model does not repair images")

    def columns(self, networks: "Networks", batch: "Batch") -> tuple[Tensor, ...]:
        """What stands side by side in a picture of what the model makes of held-out images: each
        (N, C, H, W) in [-1, 1], by networks in eval mode."""
        raise ValueError("this recipe's model makes nothing of given images")

    def reconstruct(self, networks: "Networks", images_NCHW: Tensor) -> Tensor:
        """What the model makes of given images (N C H W in [-1, 1])."""
        raise ValueError("this recipe's model does not reconstruct images")

    def remade(self, networks: "Networks", batch: "Batch") -> tuple[Tensor, Tensor]:
        """What the model makes of a held-out batch, and what that should be: (N, C, H, W) each, in
        [-1, 1]."""
        return self.reconstruct(networks, batch.images_NCHW), batch.images_NCHW

    def trivial(self, batch: "Batch") -> dict[str, Tensor]:
        """By name, what one would have in place of `remade` without a model."""
        return {}

    def held_out(self, networks: "Networks", batch: "Batch", key: Tensor) -> "Values":
        """Named figures per image (N,) on a held-out batch; empty where the family has none."""
        return {}

    def summarise(
        self, values: "Values", labels_N: Tensor | None, without: tuple[int, ...] = ()
    ) -> dict[str, float]:
        """Figures of a held-out set from what `held_out` gave for all of its images, (N,) float64
        by name on the host, and their classes; here the means. without: classes that were left out
        of training."""
        return {name: float(value_N.mean()) for name, value_N in values.items()}
