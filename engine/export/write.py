"""Writes the forms of an exported model, and checks each against the PyTorch module.

Shapes: N images, L latent. A form that differs by more than TOLERANCE at one of the batch sizes
CHECKED is an error: what lies in an export is what was measured.
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
CHECKED = (1, 5)  # batch sizes; another one is exported with

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


def write_safetensors(module: nn.Module, config: Config, latents: Tensor, path: Path) -> None:
    """The weights, with the configuration as metadata."""
    tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    # one key: several would be written in an order that differs from time to time; and save_file
    # would make a file that only its owner may read
    path.write_bytes(safetensors.torch.save(tensors, {KEY: json.dumps(config)}))


def write_program(module: nn.Module, config: Config, latents: Tensor, path: Path) -> None:
    """The program that torch.export traces, with the configuration as an extra file."""
    extra = {"config.json": json.dumps(config)}
    torch.export.save(_trace(module, latents), path, extra_files=extra)


def write_onnx(module: nn.Module, config: Config, latents: Tensor, path: Path) -> None:
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
            _trace(module, latents), (latents,), dynamo=True, verbose=False, **names
        )
    graph.model.metadata_props[KEY] = json.dumps(config)
    graph.save(path, external_data=False)


def _trace(module: nn.Module, latents: Tensor) -> torch.export.ExportedProgram:
    """The module's graph at any batch size."""
    dynamic = ({0: torch.export.Dim("N", min=1)},)
    return torch.export.export(module, (latents,), dynamic_shapes=dynamic)


WRITERS: dict[str, Callable[[nn.Module, Config, Tensor, Path], None]] = {
    "safetensors": write_safetensors,
    "onnx": write_onnx,
    "program": write_program,
}


def write_form(form: str, module: nn.Module, config: Config, folder: Path) -> float:
    """Write one form of a module (on the CPU, in eval mode), open the file again as a user would,
    and compare: the largest difference of a pixel. Raises ExportError where it is too large.

    module: latents (N, L) to images (N, C, H, W), float32 in [-1, 1], contiguous weights.
    """
    path = folder / FILES[form]
    latent = config["inputs"][0]["shape"][1]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            WRITERS[form](module, config, torch.randn(3, latent, generator=generator), path)
    except RuntimeError as error:  # what torch.export and torch.onnx cannot express
        reason = " ".join(str(error).split())[:300]
        raise ExportError(
            f"cannot write {path.name}: {reason}; name the other --formats"
        ) from error
    opened = open_export(path, "cpu", warn=lambda text: None)  # of a folder half written
    draws = [torch.randn(count, latent, generator=generator) for count in CHECKED]
    return max(_compare(opened.forward, module, z_NL, path.name) for z_NL in draws)


@torch.no_grad()
def _compare(forward: Forward, module: nn.Module, z_NL: Tensor, of: str) -> float:
    """The largest difference of a pixel; not a number counts as too large."""
    difference = float((forward(z_NL) - module(z_NL)).abs().max())
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{of} differs from the PyTorch model by {difference:.2g} at batch {len(z_NL)}, more "
            f"than {TOLERANCE:g}; leave it out by naming the other --formats"
        )
    return difference
