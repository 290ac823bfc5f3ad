"""What a recipe says of a player: network, optimizer, average."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from engine.networks.spec import Network

Inline = tyro.conf.arg(name="")  # the part's fields become flags without the part's own prefix


@dataclass(frozen=True)
class Optimizer:
    """What moves a player's parameters; the learning rate may warm up and decay, in images."""

    lr: float = 2e-4
    """Learning rate."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    warmup_kimg: float = 0.0
    """Thousands of images over which the learning rate rises linearly from zero."""
    decay_kimg: float = 0.0
    """Thousands of images, at the end of the run, over which it falls linearly to zero; at most
    the run's second half."""


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba 2015)."""

    betas: tuple[float, float] = (0.5, 0.999)
    """Decay rates of the first and second moments."""


@dataclass(frozen=True)
class RMSprop(Optimizer):
    """RMSprop (Tieleman and Hinton 2012), without momentum."""

    lr: float = 5e-5
    """Learning rate."""
    alpha: float = 0.99
    """Decay rate of the second moment."""


@dataclass(frozen=True)
class PlayerSettings:
    """The networks that one optimizer updates together."""

    network: Annotated[Network, Inline]
    optimizer: Annotated[Optimizer, Inline] = Adam()
    spectral_norm: bool = False
    """Divide the weights of every layer by their largest singular value (Miyato et al. 2018)."""
    ema_kimg: float = 0.0
    """Half-life of the moving average of the weights, in thousands of images; 0 keeps none."""
    clip: float = 0.0
    """Largest norm of the player's gradient; 0 does not clip."""
