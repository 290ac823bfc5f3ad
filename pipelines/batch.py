"""What a pipeline hands to a step, and the clock that says which images come next."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Batch:
    """One rank's slice of a global batch, on the device.

    images_NCHW: float32 in [-1, 1], in the memory format asked for.
    labels_N: int64 classes, or None where the dataset has none.
    position_N: int64, each image's place in the run's endless stream of images; latents, flips
        and every other random draw of an image are a function of it.
    pair_NCHW: what goes with each image, float32 in [-1, 1]: the right half of a side-by-side
        pair, an image of the other domain, or the image itself made smaller.
    tokens_NL, lengths_N: int64, a caption of each image and the number of its words.
    """

    images_NCHW: Tensor
    labels_N: Tensor | None
    position_N: Tensor
    pair_NCHW: Tensor | None = None
    tokens_NL: Tensor | None = None
    lengths_N: Tensor | None = None


@dataclass
class Clock:
    """How many images of the stream the run has seen, on the host and on the device alike.

    A step and a pipeline read `device_images` (int64, 0-d), so that a captured graph advances by
    itself; the loop reads `images`, which needs no synchronisation.

    doing: what this rank is at in the iteration, a player's name during its update; moves: how
    often that changed since the iteration began. The watchdog reads them from its thread; a
    listener hears of each change.
    """

    batch: int
    device: torch.device
    images: int = 0
    rank: int = 0
    world_size: int = 1
    doing: str = "start"
    moves: int = 0
    listener: Callable[[str], None] | None = None
    device_images: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.device_images = torch.tensor(self.images, dtype=torch.int64, device=self.device)
        share = self.batch // self.world_size
        self._offset_N = torch.arange(share, device=self.device) + self.rank * share

    def position_N(self) -> Tensor:
        """Stream positions of this rank's slice of the current batch, int64 (batch / world,)."""
        return self.device_images + self._offset_N

    @property
    def iteration(self) -> int:
        """Iterations that the run has done."""
        return self.images // self.batch

    def enter(self, doing: str) -> None:
        """Note what comes next, at the same places on all ranks."""
        self.doing = doing
        self.moves += 1
        if self.listener:
            self.listener(doing)

    def advance(self) -> None:
        """Go on to the next global batch."""
        self.advance_host()
        self.advance_device()

    def advance_host(self) -> None:
        """The host's part of it."""
        self.images += self.batch
        self.moves = 0

    def advance_device(self) -> None:
        """The device's part, which a graph may hold."""
        self.device_images += self.batch

    def seek(self, images: int) -> None:
        """Go to a place in the stream, as a resumed run does."""
        self.images = images
        self.device_images.fill_(images)
