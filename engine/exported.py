"""An export opened for use: its folder, its model.safetensors, or a .onnx or .pt2 file by itself.

Every file of an export carries the export's configuration, so each can be used alone. In its folder
a file is compared with the SHA-256 in config.json; away from it nothing says whether it is as it
was written, so a warning does, and pictures made with it name no checkpoint. No code from an export
is run: the networks are this engine's own, and a warning says so if the export was made with
others. PyTorch unpickles parts of a .pt2 file, however: open only what you trust.
"""

import hashlib
import importlib
import json
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.export.passes import move_to_device_pass

from engine.export import source
from engine.networks.load import rebuild
from engine.run import RunError
from engine.trained import Model
from engine.translation import Direction, Translation
from engine.world import choose_device

CONFIG = "config.json"
KEY = "saddle"  # under which a file carries the configuration
FILES = {"safetensors": "model.safetensors", "onnx": "model.onnx", "program": "model.pt2"}
SUFFIXES = tuple(Path(name).suffix for name in FILES.values())
UNVERIFIED = "not verified: a file without its export's folder"

OF_IMAGES = (
    "this export makes images of images: python -m engine.translate EXPORT INPUT... --out DIR does"
)
OF_LATENTS = (
    "this export makes images from latent vectors: python -m engine.sample EXPORT --out grid.png "
    "does"
)
MAKES_ALONE = "an export holds only what makes images"
ONE_CHECKPOINT = "an export holds the weights of one checkpoint"

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exported(Model):
    """An export, ready to sample from or to translate by."""

    config: dict[str, Any]
    run: Forward
    takes: Translation | None
    """How it takes images, if it makes images of images."""

    @property
    def channels(self) -> int:
        return self.config["images"]["channels"]

    @property
    def resolution(self) -> int:
        return self.config["images"]["resolution"]

    def latent_dim(self) -> int:
        if self.takes:
            raise ValueError(OF_IMAGES)
        return self.config["inputs"][0]["shape"][1]

    def classes(self) -> int:
        return self.config["inputs"][0].get("classes", 0)

    def forward(self, z_NL: Tensor) -> Tensor:
        return self.run(z_NL)

    def translation(self) -> Translation:
        if self.takes is None:
            raise ValueError(OF_LATENTS)
        return self.takes

    def translate(self, images_NCHW: Tensor, direction: Direction) -> Tensor:
        return self.run(images_NCHW)


def is_export(path: Path) -> bool:
    """Whether a path is meant for an export, and not for a run."""
    if path.is_dir():
        return (path / CONFIG).exists() and not (path / "recipe.json").exists()
    return path.is_file() or path.suffix.lower() in SUFFIXES


def open_export(path: Path, device: str = "auto", warn: Callable[[str], None] = print) -> Exported:
    """What an export's folder or file holds. Raises RunError for damage, ValueError for the rest.

    warn: hears of networks that are no longer those of the export, and of a file away from its
    folder, which is opened without its checkpoint's SHA-256 (UNVERIFIED in its place).
    """
    file = _choose_file(path) if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"there is no {file}")
    verified = _verify(file)
    openers = dict(zip(SUFFIXES, (_open_safetensors, _open_onnx, _open_program), strict=True))
    if file.suffix.lower() not in openers:
        raise ValueError(
            f"{file}: give a run directory, an export's folder, or a file of an export "
            f"({', '.join(SUFFIXES)})"
        )
    place = choose_device(device)
    try:
        config, run, place = openers[file.suffix.lower()](file, place, device)
        seen, weights = config["checkpoint"], config["checkpoint"]["ema"]
        digest = seen["sha256"] if verified else UNVERIFIED
        opened = Exported(
            config["recipe"]["name"],
            seen["images"],
            weights,
            place,
            digest,
            config,
            run,
            _takes(config),
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} holds no configuration of an export ({error!r})") from None
    if not verified:
        warn(
            f"{file} lies outside its export's folder, so nothing says whether it is as it was "
            f"written, and pictures will name no checkpoint: copy the whole folder"
        )
    if file.suffix.lower() == ".safetensors":
        _compare_source(config, file, warn)
    return opened


def check_flags(place: Path, *flags: tuple[str, bool, str]) -> None:
    """Raise ValueError for the first flag, of (flag, whether it was given, why), that needs a run
    and was given with an export."""
    for flag, given, reason in flags:
        if given:
            raise ValueError(f"{flag} needs the run directory, not {place}: {reason}")


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json of an export folder; None for a folder that is none."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return config if isinstance(config, dict) and "saddle_export" in config else None


def changed_files(folder: Path, config: dict[str, Any]) -> list[str]:
    """Files of an export folder that are not as they were written, or not of the export."""
    written = config.get("files", {})
    there = {
        str(p.relative_to(folder)): p
        for p in folder.rglob("*")
        if not p.is_dir() and "__pycache__" not in p.parts and p != folder / CONFIG
    }
    changed = [n for n, p in there.items() if n not in written or file_digest(p) != written[n]]
    return sorted(changed + [name for name in written if name not in there])


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _takes(config: dict[str, Any]) -> Translation | None:
    if "translation" not in config:
        return None
    way, facts = config["translation"]["direction"], dict(config["translation"])
    del facts["direction"]
    return Translation((way,) if way else (), **facts)


def _choose_file(folder: Path) -> Path:
    """The file of an export folder to take, whole."""
    config = read_config(folder)
    if config is None:
        raise ValueError(f"{folder} is neither a run directory nor an export of Saddle")
    name = next((n for n in FILES.values() if n in config.get("files", {})), None)
    if name is None:
        raise ValueError(f"{folder / CONFIG} names no model")
    if not (folder / name).is_file():
        raise RunError(f"{folder / name} is missing: export again")
    return folder / name


def _verify(file: Path) -> bool:
    """Whether an export's folder vouches for a file in it. Raises RunError for a changed one."""
    written = (read_config(file.parent) or {}).get("files", {}).get(file.name)
    if written is not None and file_digest(file) != written:
        raise RunError(f"{file} is damaged (wrong SHA-256): export again")
    return written is not None


def _open_safetensors(
    file: Path, place: torch.device, _: str
) -> tuple[dict[str, Any], Forward, torch.device]:
    try:
        with safe_open(file, "pt") as opened:
            config = json.loads(opened.metadata()[KEY])
        module = rebuild(config, safetensors.torch.load_file(file))
    except SafetensorError as error:
        raise RunError(f"{file} is damaged or no safetensors file ({error})") from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"{file} does not fit this version's networks: {reason}") from error
    return config, module.to(place, memory_format=torch.channels_last), place


def _open_onnx(
    file: Path, _: torch.device, device: str
) -> tuple[dict[str, Any], Forward, torch.device]:
    if device == "cuda":
        raise ValueError(f"{file}: ONNX files run on the CPU here; leave --device cuda out")
    problems = import_for_onnx("onnxruntime").capi.onnxruntime_pybind11_state
    try:
        session = onnx_session(file)
    except (problems.Fail, problems.InvalidProtobuf, problems.InvalidArgument) as error:
        raise RunError(f"{file} is damaged or no ONNX file ({error})") from error
    config = json.loads(session.get_modelmeta().custom_metadata_map[KEY])
    name = config["inputs"][0]["name"]

    def run(given: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: given.numpy()})[0])

    return config, run, torch.device("cpu")


def _open_program(
    file: Path, place: torch.device, _: str
) -> tuple[dict[str, Any], Forward, torch.device]:
    try:
        with zipfile.ZipFile(file) as archive:  # torch.export.load prints tracebacks of a torn one
            torn = archive.testzip()
            name = next(n for n in archive.namelist() if n.endswith(f"/extra/{CONFIG}"))
            config = json.loads(archive.read(name))
    except (zipfile.BadZipFile, StopIteration) as error:
        raise RunError(f"{file} is damaged or no program of an export ({error})") from error
    if torn:
        raise RunError(f"{file} is damaged ({torn})")
    with warnings.catch_warnings():  # torch 2.11 warns of its own read-only buffer
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        program = torch.export.load(file)
    if place.type != "cpu":
        program = move_to_device_pass(program, place)
    return config, program.module(), place


def import_for_onnx(package: str) -> Any:
    """One of the packages that ONNX needs. Raises ValueError saying how to install them."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"ONNX needs the package {error.name}: pip install 'saddle[export]'"
        ) from None


def onnx_session(file: Path) -> Any:
    """An onnxruntime session on the CPU, with as many threads as PyTorch has."""
    onnxruntime = import_for_onnx("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _compare_source(config: dict[str, Any], file: Path, warn: Callable[[str], None]) -> None:
    files = source.bundle(source.modules(config["network"]))
    if source.digest(files) != config["network"]["source_sha256"]:
        warn(
            f"the networks of {file} were of another version than this engine's: where images "
            f"differ, trust the export's own network/"
        )
