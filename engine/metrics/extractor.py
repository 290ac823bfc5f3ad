"""What turns images into features: Inception, a network from a file, or the small classifier.

An extractor takes uint8 images and says what it is, since a figure means nothing without its ruler.
"""

import hashlib
import importlib
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.metrics import classifier
from engine.settings import Metrics
from pipelines.settings import Data

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
"""File name of torch-fidelity's Inception weights, converted from the FID paper's network."""
EXPECTED = (
    "--metrics.weights takes torch-fidelity's Inception state dict (.pth), TorchScript (.pt), or "
    ".safetensors with --metrics.network MODULE:CLASS"
)


@dataclass(frozen=True)
class Extractor:
    """forward(uint8 (N, C, H, W) on the device) -> features (N, size), logits (N, K) or None.

    name: what it is, for people. digest: of its weights. resize: how it treats other sizes.
    """

    name: str
    digest: str
    size: int
    resize: str
    forward: Callable[[Tensor], tuple[Tensor, Tensor | None]]


def open_extractor(
    settings: Metrics, data: Data, device: torch.device, say: Callable[[str], None]
) -> Extractor:
    """The extractor that the settings ask for. Raises ValueError naming a setting, and what
    `find` raises where the classifier is to be trained on a dataset that is not there."""
    _refuse_contradictions(settings)
    if settings.weights is not None:
        return from_file(settings, device)
    if not takes_classifier(settings):
        return fetched_inception(device)
    network, about = classifier.open_classifier(data, device, say)
    return of_classifier(network, about)


def takes_classifier(settings: Metrics) -> bool:
    """Whether these settings make the small classifier the extractor."""
    if settings.weights is not None or settings.extractor == "inception":
        return False
    return settings.extractor == "classifier" or not _cached().exists()


def _refuse_contradictions(settings: Metrics) -> None:
    """Raise ValueError naming both flags where one of them would go unused."""
    path, network, kind = settings.weights, settings.network, settings.extractor
    suffix = path.suffix if path else None
    if network is not None and suffix != ".safetensors":
        there = f"--metrics.weights is {path}" if path else "there is no --metrics.weights"
        raise ValueError(
            f"--metrics.network {network} is for weights in a .safetensors file, but {there}: "
            f"leave --metrics.network out, or give --metrics.weights FILE.safetensors"
        )
    stored = suffix == ".safetensors" and network is None  # a classifier of Saddle's
    fits = {"auto": True, "inception": suffix == ".pth", "classifier": stored}
    if path is not None and not fits[kind]:
        raise ValueError(
            f"--metrics.weights {path} and --metrics.extractor {kind} name two extractors: leave "
            f"one of them out (--metrics.extractor auto takes the weights)"
        )


def _cached() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION


def fetched_inception(device: torch.device) -> Extractor:
    """torch-fidelity's Inception, its weights fetched once by PyTorch and checked."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    try:
        state = torch.hub.load_state_dict_from_url(
            URL_INCEPTION_V3, check_hash=True, progress=False
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"the Inception weights cannot be fetched ({' '.join(str(error).split())}); give "
            f"--metrics.weights FILE ({INCEPTION}), or --metrics.extractor classifier"
        ) from None
    return inception(state, _cached(), device)


def from_file(settings: Metrics, device: torch.device) -> Extractor:
    """The extractor in a file; its kind is told by the suffix. Raises ValueError."""
    path = settings.weights
    if path.is_dir():
        raise ValueError(f"--metrics.weights {path} is a folder, not a file: {EXPECTED}")
    if not path.is_file():
        raise ValueError(f"--metrics.weights {path}: there is no such file")
    if path.suffix == ".safetensors":
        return _safetensors(path, settings.network, device)
    if path.suffix == ".pth":
        return inception(_state(path), path, device)
    if path.suffix in (".pt", ".ts", ".torchscript"):
        return _of_network(_torchscript(path, device), f"TorchScript {path.name}", path, device)
    raise ValueError(f"--metrics.weights {path} has an unknown suffix: {EXPECTED}")


def _state(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # whatever a foreign file makes PyTorch raise, a KeyError too: no state dict
        raise ValueError(
            f"--metrics.weights {path} holds no state dict (a pickled module is never loaded): "
            f"{EXPECTED}"
        ) from None


def _torchscript(path: Path, device: torch.device) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", FutureWarning)
            return torch.jit.load(str(path), map_location=device).eval()
    except (OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a foreign file makes PyTorch raise: it is not usable
        raise ValueError(
            f"--metrics.weights {path} is no TorchScript file ({_short(error)}): {EXPECTED}"
        ) from None


def inception(state: dict[str, Tensor], path: Path, device: torch.device) -> Extractor:
    """torch-fidelity's Inception v3 as the FID paper used it: pool features, 2048 of them. path:
    the file that the state is from. Raises ValueError where it is another network's."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.TemporaryDirectory() as folder:  # the library would unpickle the user's own file
        safe = Path(folder) / INCEPTION
        torch.save(state, safe)
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], str(safe)
            )
        except (RuntimeError, TypeError, AttributeError):  # a list of all names, or no dict
            raise ValueError(
                f"{path} is not the state dict of torch-fidelity's Inception: {EXPECTED}"
            ) from None
    network.to(device)

    def forward(images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        features_ND, logits_NK = network(_channels(images_NCHW, 3))
        return features_ND, logits_NK

    resize = "bilinear as in TensorFlow 1, to 299"
    return Extractor("Inception v3 (torch-fidelity)", _digest(path), 2048, resize, forward)


def _safetensors(path: Path, name: str | None, device: torch.device) -> Extractor:
    if name is None:
        return of_classifier(*classifier.load(path, device))
    network = _built(name)
    try:
        network.load_state_dict(safetensors.torch.load_file(path))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"--metrics.weights {path} does not fit --metrics.network {name}: {_short(error)}"
        ) from None
    network = network.to(device).eval().requires_grad_(False)
    return _of_network(network, f"{name.partition(':')[2]} {path.name}", path, device)


def _built(name: str) -> nn.Module:
    """A network of the class MODULE:CLASS. Raises ValueError."""
    module, _, kind = name.partition(":")
    if not module or not kind:
        raise ValueError(
            f"--metrics.network {name} must be MODULE:CLASS, the class of the weights' network "
            f"(mypackage.networks:Features)"
        )
    try:
        network = getattr(importlib.import_module(module), kind)()
    except ImportError as error:
        raise ValueError(
            f"--metrics.network {name}: {_short(error)}; the module must be importable, from the "
            f"current folder or by PYTHONPATH"
        ) from None
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"--metrics.network {name} cannot be built: {_short(error)}") from None
    if not isinstance(network, nn.Module):
        raise ValueError(f"--metrics.network {name} is no torch.nn.Module")
    return network


def _of_network(network: nn.Module, name: str, path: Path, device: torch.device) -> Extractor:
    """A network that takes uint8 images (N, 3, H, W) of any size, tried out on one. Raises
    ValueError where it gives no features (N, D); so does its forward."""
    tried_NCHW = torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device=device)
    with torch.no_grad():
        size = _made(network, tried_NCHW, path)[0].shape[1]

    def forward(images_NCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        features_ND, logits_NK = _made(network, _channels(images_NCHW, 3), path)
        if features_ND.shape[1] != size:
            raise ValueError(
                f"--metrics.weights {path} must give features (N, D) of one width, but gave "
                f"(N, {features_ND.shape[1]}) for images of {_sides(images_NCHW)} and (N, {size}) "
                f"for {_sides(tried_NCHW)}"
            )
        return features_ND, logits_NK

    return Extractor(name, _digest(path), size, "the network's own", forward)


def _made(network: nn.Module, images_NCHW: Tensor, path: Path) -> tuple[Tensor, Tensor | None]:
    """(features (N, D), logits (N, K) or None) of a user's network. Raises ValueError."""
    try:
        made = network(images_NCHW)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the user's own code, which may raise anything
        raise ValueError(
            f"--metrics.weights {path} must take uint8 images (N, 3, H, W), but fails on "
            f"{_sides(images_NCHW)} pixels: {_short(error)}"
        ) from None
    pair = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    features, logits = pair
    if not _is_flat(features, len(images_NCHW)):
        given = _shape(features, len(images_NCHW))
        raise ValueError(f"--metrics.weights {path} must give features (N, D), but gave {given}")
    if logits is not None and not _is_flat(logits, len(images_NCHW)):
        given = _shape(logits, len(images_NCHW))
        raise ValueError(f"--metrics.weights {path} must give logits (N, K), but gave {given}")
    return features.flatten(1).float(), logits


def _is_flat(made: object, count: int) -> bool:
    """Whether it is (N, D), or (N, D, 1, 1) as a pooling layer leaves it."""
    if not isinstance(made, Tensor) or made.dim() < 2 or len(made) != count:
        return False
    return made.shape[2:].numel() == 1


def _shape(made: object, count: int) -> str:
    if not isinstance(made, Tensor):
        return f"a {type(made).__name__}"
    sizes = ["N" if i == 0 and n == count else str(n) for i, n in enumerate(made.shape)]
    return f"({', '.join(sizes)})"


def _sides(images_NCHW: Tensor) -> str:
    return f"{images_NCHW.shape[3]} x {images_NCHW.shape[2]}"


def _short(error: Exception) -> str:
    """What a foreign error says in one line of at most 200 characters, without terminal codes."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    if "TorchScript interpreter" in lines[0]:
        lines = lines[-1:]  # a traceback, of which the last line is the reason
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return first if len(first) <= 200 else f"{first[:197]}..."


def of_classifier(network: classifier.Classifier, about: dict) -> Extractor:
    """The small classifier; the Inception score needs classes that exclude each other."""
    side = network.resolution

    def forward(images_NCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        x_NCHW = _channels(images_NCHW, network.channels)
        if x_NCHW.shape[2:] != (side, side):
            x_NCHW = functional.interpolate(
                x_NCHW.float(), (side, side), mode="bilinear", antialias=True
            )
        features_ND, logits_NK = network(x_NCHW)
        return features_ND, logits_NK if about["exclusive"] else None

    name = f"classifier on {about['dataset']} ({about['accuracy']:.2%} right)"
    resize = f"bilinear with antialias, to {side}"
    return Extractor(name, about["digest"], network.size, resize, forward)


def _channels(images_NCHW: Tensor, channels: int) -> Tensor:
    """Grey repeated to colour; colour to grey by luminance (ITU-R 601, as Pillow's)."""
    if images_NCHW.shape[1] == channels:
        return images_NCHW
    if channels == 3:
        return images_NCHW.expand(-1, 3, -1, -1)
    weights = torch.tensor([0.299, 0.587, 0.114], device=images_NCHW.device).view(1, 3, 1, 1)
    return (images_NCHW.float() * weights).sum(1, keepdim=True).round().to(torch.uint8)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
