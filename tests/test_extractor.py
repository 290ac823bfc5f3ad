"""What makes features: files of every kind, the small classifier, and what is refused."""

import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from engine.metrics import classifier, extractor
from engine.metrics.extractor import from_file, open_extractor
from engine.settings import Metrics
from pipelines.settings import Data

CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (4, 1, 20, 20), dtype=torch.uint8)


class Small(nn.Module):
    """A network of the user's, in a .safetensors file."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return self.layers(images_NCHW.float())


@pytest.fixture(scope="module")
def own_digits(tmp_path_factory) -> Data:
    """The digits with a cache of their own."""
    return Data(name="digits", cache=tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def digits(own_digits):
    lines: list[str] = []
    return *classifier.open_classifier(own_digits, CPU, lines.append), lines


def test_the_classifier_is_trained_once_and_says_how_good_it_is(digits, own_digits):
    _, about, lines = digits
    assert about["accuracy"] > 0.95
    assert any("right on" in line for line in lines)
    again: list[str] = []
    _, stored = classifier.open_classifier(own_digits, CPU, again.append)
    assert not again
    assert stored["digest"] == about["digest"]


def test_the_classifier_takes_images_of_any_size_and_colour(digits):
    made = extractor.of_classifier(*digits[:2])
    for shape in ((3, 1, 32, 32), (3, 3, 16, 16), (3, 3, 70, 70)):
        features_ND, logits_NK = made.forward(torch.randint(0, 256, shape, dtype=torch.uint8))
        assert features_ND.shape == (3, made.size)
        assert logits_NK.shape == (3, 10)
    assert "digits" in made.name
    assert made.digest == digits[1]["digest"]


def test_a_stored_classifier_serves_as_weights(digits, own_digits):
    path = next(own_digits.cache_folder().glob("classifier-digits-*.safetensors"))
    made = from_file(Metrics(weights=path), CPU)
    assert made.digest == digits[1]["digest"]


def test_a_dataset_without_labels_is_refused_with_the_remedies(data):
    one_class = next(path for path in data.path.iterdir() if path.is_dir())
    with pytest.raises(ValueError, match=r"no labels.*--metrics\.weights"):
        open_extractor(Metrics(), replace(data, path=one_class), CPU, print)


def test_torchscript_is_taken_as_it_is(tmp_path):
    path = tmp_path / "small.pt"
    torch.jit.script(Small()).save(str(path))
    made = from_file(Metrics(weights=path), CPU)
    assert (made.size, made.forward(IMAGES)[0].shape) == (8, (4, 8))
    assert made.forward(IMAGES)[1] is None


def test_safetensors_with_a_named_class(tmp_path):
    path, network = tmp_path / "small.safetensors", Small()
    safetensors.torch.save_file(network.state_dict(), path)
    made = from_file(Metrics(weights=path, network="tests.test_extractor:Small"), CPU)
    assert torch.equal(made.forward(IMAGES)[0], network(IMAGES.expand(-1, 3, -1, -1)))


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """A stand-in of torch-fidelity's Inception: the same structure, weights not trained."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *args, **options: {})
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        network = library.FeatureExtractorInceptionV3("stand-in", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_from_a_file(inception_file):
    made = from_file(Metrics(weights=inception_file), CPU)
    features_ND, logits_NK = made.forward(IMAGES[:2])
    assert features_ND.shape == (2, 2048)
    assert logits_NK.shape == (2, 1008)
    assert features_ND.isfinite().all()


def test_inception_in_the_librarys_cache_is_taken_unasked(inception_file, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / extractor.INCEPTION).symlink_to(inception_file)
    made = open_extractor(Metrics(), Data(name="digits"), CPU, print)
    assert made.size == 2048


def test_inception_that_cannot_be_fetched_is_an_error_with_the_remedies(monkeypatch):
    def fail(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(ValueError, match=r"no route to host.*--metrics.weights"):
        open_extractor(Metrics(extractor="inception"), Data(name="digits"), CPU, print)


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def refusal(path, **more) -> str:
    """The one line that says why the weights are refused."""
    with pytest.raises(ValueError, match=re.escape(Path(path).name)) as caught:
        open_extractor(Metrics(weights=Path(path), **more), Data(name="digits"), CPU, print)
    text = str(caught.value)
    assert "\n" not in text
    assert "\x1b" not in text
    assert len(text.replace(str(path), "")) < 420  # 200 of which may be foreign
    return text


def test_weights_of_the_wrong_kind_are_refused_and_never_unpickled(tmp_path, capsys):
    torch.save({"layer": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(Evil(), tmp_path / "evil.pth")
    torch.save(Small(), tmp_path / "module.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "junk.pth").write_bytes(b"junk" * 100)
    (tmp_path / "text.pt").write_text("no script")
    (tmp_path / "weights.bin").write_text("")
    (tmp_path / "folder.pth").mkdir()
    expected = {
        "other.pth": "is not the state dict of torch-fidelity's Inception",
        "list.pth": "is not the state dict of torch-fidelity's Inception",
        "evil.pth": "holds no state dict (a pickled module is never loaded)",
        "module.pth": "holds no state dict (a pickled module is never loaded)",
        "text.pth": "holds no state dict",
        "junk.pth": "holds no state dict",
        "text.pt": "is no TorchScript file",
        "weights.bin": "has an unknown suffix",
        "folder.pth": "is a folder",
    }
    assert set(expected) == {path.name for path in tmp_path.iterdir()}
    for name, text in expected.items():
        found = refusal(tmp_path / name)
        assert text in found
        assert extractor.EXPECTED in found
    assert "there is no such file" in refusal(tmp_path / "nowhere.pth")
    assert "unpickled" not in capsys.readouterr().out


def test_safetensors_of_the_wrong_kind_are_refused_with_the_form_of_the_network(tmp_path):
    (tmp_path / "text.safetensors").write_text("no tensors")
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, other)
    for path in (tmp_path / "text.safetensors", other):
        assert "--metrics.network MODULE:CLASS" in refusal(path)
    assert "Missing key" in refusal(other, network="tests.test_extractor:Small")
    cases = {
        "nomod": "must be MODULE:CLASS",
        "tests.test_extractor:": "must be MODULE:CLASS",
        "nonet:Net": "No module named 'nonet'; the module must be importable, from the current",
        "tests.test_extractor:Other": "cannot be built: module 'tests.test_extractor' has no attr",
        "tests.test_extractor:Evil": "is no torch.nn.Module",
    }
    for name, text in cases.items():
        with pytest.raises(ValueError, match=re.escape(text)) as caught:
            from_file(Metrics(weights=other, network=name), CPU)
        assert f"--metrics.network {name}" in str(caught.value)


class Maps(nn.Module):
    """Gives maps, not features."""

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return images_NCHW.float()


class Flat(nn.Module):
    """Gives features whose number is that of the pixels."""

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return images_NCHW.float().flatten(1)


class Bytes(nn.Module):
    """Forgets that images are uint8."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return self.layer(images_NCHW).mean((2, 3))


class Pooled(nn.Module):
    """Features as a pooling layer leaves them."""

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return images_NCHW.float().mean((2, 3), keepdim=True)


class Three(nn.Module):
    """Gives no tensor, but three."""

    def forward(self, images_NCHW: torch.Tensor) -> tuple:
        return images_NCHW, images_NCHW, images_NCHW


def script(network: nn.Module, path: Path) -> Path:
    torch.jit.script(network).save(str(path))
    return path


def test_what_is_no_features_is_refused_when_it_is_opened(tmp_path):
    path = script(Maps(), tmp_path / "maps.pt")
    expected = f"--metrics.weights {path} must give features (N, D), but gave (N, 3, 64, 64)"
    assert refusal(path) == expected
    found = refusal(script(Bytes(), tmp_path / "bytes.pt"))
    assert "must take uint8 images (N, 3, H, W), but fails on 64 x 64 pixels: " in found
    assert "Traceback" not in found
    empty = tmp_path / "empty.safetensors"
    safetensors.torch.save_file({}, empty)
    assert "(N, D), but gave a tuple" in refusal(empty, network="tests.test_extractor:Three")


def test_features_whose_width_depends_on_the_images_are_refused(tmp_path):
    path = script(Flat(), tmp_path / "flat.pt")
    made = from_file(Metrics(weights=path), CPU)
    with pytest.raises(ValueError, match=r"flat\.pt must give .*\(N, 1200\) for images of 20 x 20"):
        made.forward(IMAGES)


def test_pooled_features_need_no_flattening(tmp_path):
    made = from_file(Metrics(weights=script(Pooled(), tmp_path / "pooled.pt")), CPU)
    assert made.forward(IMAGES)[0].shape == (4, 3)


def test_torchscript_is_opened_without_the_librarys_warning(tmp_path):
    path = script(Small(), tmp_path / "small.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_file(Metrics(weights=path), CPU)


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"weights": "a.pt", "extractor": "classifier"}, ("weights a.pt", "extractor classifier")),
        ({"weights": "a.pth", "extractor": "classifier"}, ("weights a.pth", "extractor classi")),
        ({"weights": "a.pt", "extractor": "inception"}, ("weights a.pt", "extractor inception")),
        ({"weights": "a.pt", "network": "m:C"}, ("weights is a.pt", "network m:C")),
        ({"network": "m:C"}, ("network m:C", "no --metrics.weights")),
    ],
)
def test_settings_that_name_two_extractors_are_refused(settings, flags):
    path = Path(settings.pop("weights")) if "weights" in settings else None
    with pytest.raises(ValueError, match="leave") as caught:
        open_extractor(Metrics(weights=path, **settings), Data(name="digits"), CPU, print)
    assert all(flag in str(caught.value) for flag in flags)


def test_a_stored_classifier_and_the_classifier_are_one_extractor(digits, own_digits):
    path = next(own_digits.cache_folder().glob("classifier-digits-*.safetensors"))
    made = open_extractor(Metrics(weights=path, extractor="classifier"), own_digits, CPU, print)
    assert made.digest == digits[1]["digest"]
