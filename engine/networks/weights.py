"""Weights of a fixed judge from a file that somebody else has made."""

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn


def fill(network: nn.Module, path: Path, flag: str, whose: str, expected: str) -> None:
    """Load a file's weights into a network (see `read`)."""
    network.load_state_dict(read(network, path, flag, whose, expected))


def read(network: nn.Module, path: Path, flag: str, whose: str, expected: str) -> dict[str, Tensor]:
    """A file's weights of what the network has, on the host; more may be in it. flag: where the
    path came from. whose, expected: of messages. Raises ValueError naming the flag where the file
    is another's."""
    if not path.is_file():
        raise ValueError(f"{flag} {path}: there is no such file")
    wanted, state = network.state_dict(), _state(path, flag, expected)
    for name, tensor in wanted.items():
        found = state.get(name) if isinstance(state, dict) else None
        if not isinstance(found, Tensor) or found.shape != tensor.shape:
            has = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else "missing"
            raise ValueError(f"{flag} {path} is not {whose} ({name} is {has}): {expected}")
    return {name: state[name] for name in wanted}


def _state(path: Path, flag: str, expected: str) -> object:
    """What a file holds; nothing in it is ever run."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # whatever a foreign file makes the readers raise, a KeyError too
        raise ValueError(f"{flag} {path} holds no state dict: {expected}") from None
