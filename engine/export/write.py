"""Writes the forms of an exported model, and checks each against the PyTorch module.

What goes in are latent vectors (N, L), or images (N, C, H, W), which may be of any size: then a
form is checked at two. One that differs by more than TOLERANCE is an error: what lies in an export
is what was measured.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from engine.export.source import PACKAGE, ExportError
from engine.exported import FILES, KEY, Forward, import_for_onnx, open_export
from engine.networks.spec import Network

TOLERANCE = 1e-4
TRACED, CHECKED = 3, (1, 5)  # batch sizes

Config = dict[str, Any]


def describe(network: Network) -> dict[str, Any]:
    """Class and sizes of a network, for `engine.networks.load`. Raises ExportError for a class
    that lies elsewhere."""
    module, name = type(network).__module__, type(network).__name__
    if not module.startswith(f"{PACKAGE}."):
        raise ExportError(
            f"the network {module}.{name} cannot be exported: move it to a file of engine/networks/"
        )
    values = {f.name: getattr(network, f.name) for f in fields(network)}
    sizes = {k: describe(v) if isinstance(v, Network) else v for k, v in values.items()}
    return {"class": f"{module.removeprefix(f'{PACKAGE}.')}.{name}", "sizes": sizes}


def write_safetensors(module: nn.Module, config: Config, given: Tensor, path: Path) -> None:
    """The weights, with the configuration as metadata."""
    tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    # one key: several would be written in an order that differs from time to time; and save_file
    # would make a file that only its owner may read
    path.write_bytes(safetensors.torch.save(tensors, {KEY: json.dumps(config)}))


def write_program(module: nn.Module, config: Config, given: Tensor, path: Path) -> None:
    """The program that torch.export traces, with the configuration as an extra file."""
    extra = {"config.json": json.dumps(config)}
    torch.export.save(_trace(module, config, given), path, extra_files=extra)


def write_onnx(module: nn.Module, config: Config, given: Tensor, path: Path) -> None:
    """The ONNX graph of that program, with the configuration as metadata."""
    for package in ("onnx", "onnxscript"):
        import_for_onnx(package)
    names = {
        "input_names": [x["name"] for x in config["inputs"]],
        "output_names": [x["name"] for x in config["outputs"]],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its own
        graph = torch.onnx.export(
            _trace(module, config, given), (given,), dynamo=True, verbose=False, **names
        )
    graph.model.metadata_props[KEY] = json.dumps(config)
    graph.save(path, external_data=False)


def _trace(module: nn.Module, config: Config, given: Tensor) -> torch.export.ExportedProgram:
    """The module's graph at any batch size, and of images of any size where it takes them."""
    axes: dict[int, Any] = {0: torch.export.Dim("N", min=1)}
    if takes_any_size(config):
        multiple, least = (config["translation"][name] for name in ("multiple", "least"))
        for axis, name in enumerate(("H", "W"), start=2):
            unit = torch.export.Dim(name, min=least // multiple)
            axes[axis] = multiple * unit if multiple > 1 else unit
    return torch.export.export(module, (given,), dynamic_shapes=(axes,))


WRITERS: dict[str, Callable[[nn.Module, Config, Tensor, Path], None]] = {
    "safetensors": write_safetensors,
    "onnx": write_onnx,
    "program": write_program,
}


def takes_any_size(config: Config) -> bool:
    """Whether what goes in are images of any size."""
    return "H" in config["inputs"][0]["shape"]


def shapes(config: Config) -> tuple[tuple[int, ...], ...]:
    """Of what goes in: to trace with, and then to compare at. Where it may be of any size those are
    of the training size, and of half of it, not square."""
    first, *others = (TRACED, *CHECKED)
    if not takes_any_size(config):
        rest = config["inputs"][0]["shape"][1:]
        return tuple((count, *rest) for count in (first, *others))
    channels, scale = config["images"]["channels"], config["images"]["scale"]
    multiple, least = (config["translation"][name] for name in ("multiple", "least"))
    side = max(config["images"]["resolution"] // scale, least, 2)  # torch makes 1 a constant
    half = max(side // 2 // multiple * multiple, least)
    sides = [(side, side + multiple), (side, side), (half, half + multiple)]
    return tuple((n, channels, *at) for n, at in zip((first, *others), sides, strict=True))


def draw(config: Config, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Something to go in, of that shape."""
    if "translation" in config:
        return torch.rand(shape, generator=generator) * 2 - 1
    return torch.randn(shape, generator=generator)


def write_form(form: str, module: nn.Module, config: Config, folder: Path) -> float:
    """Write one form of a module (on the CPU, in eval mode), open the file again as a user would,
    and compare: the largest difference of a pixel. Raises ExportError where it is too large.

    module: to images (N, C, H, W), float32 in [-1, 1], contiguous weights.
    """
    path = folder / FILES[form]
    generator = torch.Generator().manual_seed(0)
    traced, *checked = (draw(config, shape, generator) for shape in shapes(config))
    try:
        with torch.no_grad():
            WRITERS[form](module, config, traced, path)
    except RuntimeError as error:  # what torch.export and torch.onnx cannot express
        reason = " ".join(str(error).split())[:300]
        raise ExportError(
            f"cannot write {path.name}: {reason}; name the other --formats"
        ) from error
    opened = open_export(path, "cpu", warn=lambda text: None)  # of a folder half written
    return max(_compare(opened.forward, module, given, path.name) for given in checked)


@torch.no_grad()
def _compare(forward: Forward, module: nn.Module, given: Tensor, of: str) -> float:
    """The largest difference of a pixel; not a number counts as too large."""
    difference = float((forward(given) - module(given)).abs().max())
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{of} differs from the PyTorch model by {difference:.2g} at batch {len(given)}, more "
            f"than {TOLERANCE:g}; leave it out by naming the other --formats"
        )
    return difference
