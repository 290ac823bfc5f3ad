"""How does a model that makes images of images take them? What its step, or its export, says of
that to whoever has images to give."""

from dataclasses import dataclass
from typing import Literal, get_args

Direction = Literal["AtoB", "BtoA"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


@dataclass(frozen=True)
class Translation:
    """How a model takes images."""

    directions: tuple[Direction, ...] = ()
    """From which domain to which, if there are two; the first is what is done unasked."""
    multiple: int = 1
    """What height and width must be multiples of."""
    least: int = 1
    """The smallest height and width; such a multiple."""
    scale: int = 1
    """By what factor the images that it makes are larger."""
    reach: int | None = None
    """How far around a place it looks, in pixels of the given image; none: at all of it."""
    side: int | None = None
    """The only height and width that it takes; none: any."""

    def chosen(self, asked: Direction | None, whose: str) -> Direction:
        """The direction that is asked for, or else done unasked; any where there are no two
        domains. Raises ValueError, naming whose it is not."""
        if asked and asked not in self.directions:
            ways = f"goes {self.directions[0]} alone" if self.directions else "has no two domains"
            raise ValueError(f"{whose} {ways}: leave --direction {asked} out")
        return asked or (self.directions or DIRECTIONS)[0]
