"""Load what makes images from an export folder: config.json says which class and of what sizes,
model.safetensors holds the weights.

An export carries this file and the networks along, so it needs torch and safetensors alone.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from engine.networks.spec import ImageSpec, Network


def load(folder: str | Path) -> nn.Module:
    """The exported module, in eval mode, on the CPU."""
    config = json.loads(Path(folder, "config.json").read_text())
    return rebuild(config, safetensors.torch.load_file(Path(folder, "model.safetensors")))


def rebuild(config: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """The module that an export's configuration describes, with these weights, in eval mode.

    Raises ValueError for a class that is not here, RuntimeError for weights that do not fit.
    """
    module = _settings(config["network"]).build(ImageSpec(**config["images"]))
    module.load_state_dict(weights)
    return module.eval().requires_grad_(False)


def _settings(network: dict[str, Any]) -> Network:
    """The sizes of a network, which may hold another's."""
    path, _, name = network["class"].rpartition(".")
    if not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"{network['class']!r} is no class of the networks")
    try:
        kind = getattr(importlib.import_module(f".{path}", __package__), name)
    except (ModuleNotFoundError, AttributeError):
        raise ValueError(f"the networks here have no {network['class']}") from None
    if not (isinstance(kind, type) and issubclass(kind, Network)):
        raise ValueError(f"{network['class']} is no network")
    return kind(**{key: _value(value) for key, value in network["sizes"].items()})


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return _settings(value)
    return tuple(value) if isinstance(value, list) else value
