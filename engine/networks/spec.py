"""What every network is built from: the images it sees or makes, and a dataclass of its sizes.

Networks import nothing else of the engine, so that an export can carry their source along.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn


@dataclass(frozen=True)
class ImageSpec:
    """Shape of the images that a network sees or makes, the classes of their dataset, and by what
    factor they are larger than those that they are made of."""

    channels: int
    resolution: int
    classes: int = 0
    scale: int = 1


@dataclass(frozen=True)
class Network:
    """Sizes of a network; a subclass holds them as fields and builds the module."""

    classes: ClassVar[int] = 0
    """Classes that its module is given as its second input, int64 (N,); a subclass whose module is
    makes it a field."""

    words: ClassVar[int] = 0
    """Rows of its table of words, at least as many as the vocabulary of the captions has; a
    subclass whose module is given captions makes it a field."""

    traceable: ClassVar[bool] = True
    """Whether the module is one graph of a sensible size, for ONNX and torch.export."""

    alone: ClassVar[bool] = False
    """Whether its module judges each image by itself, whatever else is in the batch, and remembers
    nothing of it: real and fake images may then go through it as one batch."""

    any_size: ClassVar[bool] = True
    """Whether a module that makes images of images takes other sizes than it was built for."""

    def build(self, images: ImageSpec) -> nn.Module:
        """The module with fresh parameters; raises ValueError where the sizes do not fit."""
        raise NotImplementedError
