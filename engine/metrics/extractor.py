"""What turns images into features: Inception, a network from a file, or the small classifier.

An extractor takes uint8 images and says what it is, since a figure means nothing without its ruler.
"""

import hashlib
import importlib
import tempfile
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
    if settings.weights is not None:
        return from_file(settings, device)
    if settings.extractor == "inception" or (settings.extractor == "auto" and _cached().exists()):
        return fetched_inception(device)
    network, about = classifier.open_classifier(data, device, say)
    return of_classifier(network, about)


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
    return inception(state, _digest(_cached()), device)


def from_file(settings: Metrics, device: torch.device) -> Extractor:
    """The extractor in a file; its kind is told by the suffix. Raises ValueError."""
    path = settings.weights
    if not path.is_file():
        raise ValueError(f"--metrics.weights {path}: there is no such file")
    if path.suffix == ".safetensors":
        return _safetensors(path, settings.network, device)
    try:
        if path.suffix == ".pth":
            state = torch.load(path, map_location="cpu", weights_only=True)
            return inception(state, _digest(path), device)
        if path.suffix in (".pt", ".ts", ".torchscript"):
            network = torch.jit.load(str(path), map_location=device).eval()
            return _of_network(network, f"TorchScript {path.name}", _digest(path), device)
    except ValueError:
        raise
    except Exception as error:  # whatever a foreign file makes PyTorch raise: it is not usable
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--metrics.weights {path} cannot be used: {reason}") from None
    raise ValueError(
        f"--metrics.weights {path}: its suffix must be .pth (torch-fidelity's Inception), .pt "
        f"(TorchScript) or .safetensors"
    )


def inception(state: dict[str, Tensor], digest: str, device: torch.device) -> Extractor:
    """torch-fidelity's Inception v3 as the FID paper used it: pool features, 2048 of them."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.TemporaryDirectory() as folder:  # the library would unpickle the user's own file
        safe = Path(folder) / INCEPTION
        torch.save(state, safe)
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], str(safe)
        )
    network.to(device)

    def forward(images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        features_ND, logits_NK = network(_channels(images_NCHW, 3))
        return features_ND, logits_NK

    resize = "bilinear as in TensorFlow 1, to 299"
    return Extractor("Inception v3 (torch-fidelity)", digest, 2048, resize, forward)


def _safetensors(path: Path, name: str | None, device: torch.device) -> Extractor:
    if name is None:
        return of_classifier(*classifier.load(path, device))
    module, _, kind = name.partition(":")
    try:
        network = getattr(importlib.import_module(module), kind)()
        network.load_state_dict(safetensors.torch.load_file(path))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"--metrics.network {name} cannot be built: {error}") from None
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--metrics.weights {path} does not fit {name}: {reason}") from None
    network = network.to(device).eval().requires_grad_(False)
    return _of_network(network, f"{kind} {path.name}", _digest(path), device)


def _of_network(network: nn.Module, name: str, digest: str, device: torch.device) -> Extractor:
    """A network that takes uint8 images (N, 3, H, W) of any size, tried out on one."""

    def forward(images_NCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        made = network(_channels(images_NCHW, 3))
        features, logits = made if isinstance(made, tuple) else (made, None)
        return features.flatten(1).float(), logits

    with torch.no_grad():
        features_ND, _ = forward(torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device=device))
    return Extractor(name, digest, features_ND.shape[1], "the network's own", forward)


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
