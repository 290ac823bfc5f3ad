"""Style transfer: AdaIN's statistics, losses by hand, VGG19's layers, engine.translate --style."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import vgg as theirs

from engine import evaluate, session, stylise, train, translate
from engine.checkpoint import listing
from engine.compile import Compiler
from engine.describe import parameters
from engine.networks.adain import LEAST, Encoder, StylerSizes, adain
from engine.networks.spec import ImageSpec
from engine.networks.vgg import TappedVgg19, read_state
from engine.recipe import load, run_name
from engine.run import check_same, write_recipe
from engine.session import build_networks
from engine.steps.stylising import content_N, style_N
from engine.trained import open_run
from pipelines.batch import Batch
from pipelines.datasets import DatasetMissing, NoSplit, find
from pipelines.settings import Data
from pipelines.sources import Synthetic
from tests.players import EPS, FP32, RANKS, pictures, steady
from tests.runs import toy
from tests.trained import refused_by, trained

NAME = "style_transfer"
refused = refused_by(lambda *arguments: translate.main([str(a) for a in arguments]))


def features(*shape: int, seed: int = 0) -> Tensor:
    """Noise of another mean and deviation in each channel, float64."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1]
    spread = torch.rand(1, channels, 1, 1, generator=generator, dtype=torch.float64) + 0.5
    shift = torch.randn(1, channels, 1, 1, generator=generator, dtype=torch.float64)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * spread + shift


def test_adain_gives_the_style_s_statistics():
    content, style = features(2, 5, 7, 9, seed=1), features(2, 5, 11, 4, seed=2)
    made = adain(content, style)
    torch.testing.assert_close(made.mean((2, 3)), style.mean((2, 3)), rtol=0, atol=1e-12)
    wanted = style.std((2, 3), correction=0)
    torch.testing.assert_close(made.std((2, 3), correction=0), wanted, rtol=1e-4, atol=0)
    torch.testing.assert_close(adain(content, content), content, rtol=0, atol=1e-12)
    flat = adain(torch.ones(1, 5, 3, 3), style[:1].float())  # a channel without contrast
    torch.testing.assert_close(flat.mean((2, 3)), style[:1].float().mean((2, 3)))
    assert adain(content.bfloat16(), style.bfloat16()).dtype == torch.float32


def test_losses_are_those_computed_by_hand():
    found = [features(2, 3, 4, 5, seed=3), features(2, 6, 2, 3, seed=4)]
    wanted = [features(2, 3, 6, 4, seed=5), features(2, 6, 3, 3, seed=6)]
    for image in range(2):
        total = 0.0
        for a_NCHW, b_NCHW in zip(found, wanted, strict=True):
            means, deviations = [], []
            for a, b in zip(a_NCHW[image].numpy(), b_NCHW[image].numpy(), strict=True):
                means.append((a.mean() - b.mean()) ** 2)
                roots = [np.sqrt(((x - x.mean()) ** 2).mean() + 1e-5) for x in (a, b)]
                deviations.append((roots[0] - roots[1]) ** 2)
            total += np.mean(means) + np.mean(deviations)
        assert style_N(found, wanted)[image].item() == pytest.approx(total, rel=1e-12)
        apart = ((found[0] - 0.5)[image].numpy() ** 2).mean()
        goal = torch.full_like(found[0], 0.5)
        assert content_N(found[0], goal)[image].item() == pytest.approx(apart, rel=1e-6)


def torchvisions() -> nn.Sequential:
    """Its VGG19 up to relu4_1."""
    torch.manual_seed(3)
    return theirs.make_layers(theirs.cfgs["E"])[:21]


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory) -> Path:
    """A file with torchvision's names; other layers than ours are in it too."""
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    state = {f"features.{name}": value for name, value in torchvisions().state_dict().items()}
    torch.save(state | {"classifier.0.bias": torch.zeros(4096)}, path)
    return path


def test_several_layers_of_a_file_are_torchvision_s(vgg_file):
    """With its padding by zeros, to the last bit; by reflection away from the borders."""
    ours = TappedVgg19(((64, 2), (128, 2), (256, 4), (512, 1)))
    ours.load_state_dict(read_state(vgg_file, ours))
    encoder = Encoder(64, 4)
    encoder.load_state_dict(read_state(vgg_file, encoder))
    images, layers = pictures(1, 96, 4), torchvisions()
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    x = (images / 2 + 0.5 - mean) / std
    with torch.no_grad():
        found, inner = ours(images), encoder(images)
        for tap, end in enumerate((2, 7, 12, 21)):  # relu1_1, relu2_1, relu3_1, relu4_1
            wanted = layers[:end](x)
            torch.testing.assert_close(found[tap], wanted)
            middle = slice(5, -5) if tap == 3 else slice(12, -12)
            torch.testing.assert_close(inner[tap][..., middle, middle], wanted[..., middle, middle])
    assert inner[3].shape == (1, 512, 12, 12)
    assert not torch.allclose(inner[3], found[3])


def test_sizes_are_those_of_the_paper():
    """By hand: the decoder is 3x3 convolutions between these widths."""
    styler = StylerSizes().build(ImageSpec(3, 256))
    widths = [512, 256, 256, 256, 256, 128, 128, 64, 64, 3]
    wanted = sum(a * b * 9 + b for a, b in pairwise(widths))
    assert parameters(styler) == wanted == 3_505_219
    assert sum(isinstance(layer, nn.Upsample) for layer in styler.decoder) == 3
    held = sum(b.numel() for name, b in styler.named_buffers() if "features" in name)
    assert held == sum(p.numel() for p in torchvisions().parameters())


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_images_keep_their_size_whatever_the_style_s(levels):
    network = StylerSizes(width=4, levels=levels).build(ImageSpec(1, 32)).eval()
    content, style = torch.rand(2, 1, 32, 48) * 2 - 1, torch.rand(1, 1, 17, 61) * 2 - 1
    with torch.no_grad():
        assert network(content, style).shape == content.shape
        plain = network.decoder(network.encoder(content)[-1])
        assert torch.equal(network(content, style, alpha=0.0), plain)
        half = network(content, style, alpha=0.5)
    assert not torch.equal(half, plain)
    assert network(content[..., :LEAST, :LEAST], style[..., :LEAST, :LEAST]).isfinite().all()


def noise_batch(recipe, live) -> Batch:
    side = recipe.data.resolution
    return Batch(pictures(2, side, 1), None, live.clock.position_N(), pictures(2, side, 2))


def test_an_update_is_that_of_a_plain_reference():
    recipe = steady(toy(NAME, 2)[0])
    live = session.start(recipe, RANKS, FP32, Compiler(False, "test"), 100)
    batch = noise_batch(recipe, live)
    values = live.step(batch)

    network = build_networks(recipe)["styler"].train()
    adam = torch.optim.Adam(network.parameters(), 1e-4, (0.9, 0.999), EPS)
    encoded = [network.encoder(x) for x in (batch.images_NCHW, batch.pair_NCHW)]
    content, wanted = encoded[0][-1], encoded[1]
    goal = adain(content, wanted[-1])  # a channel without contrast makes much of rounding
    found = network.encoder(network.decoder(goal))
    style = 0.0
    for a, b in zip(found, wanted, strict=True):
        deviations = [(x.var((2, 3), correction=0) + 1e-5).sqrt() for x in (a, b)]
        style = style + F.mse_loss(a.mean((2, 3)), b.mean((2, 3))) + F.mse_loss(*deviations)
    loss = F.mse_loss(found[-1], goal) + recipe.step.style_weight * style
    loss.backward()
    adam.step()

    assert values["styler/loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert values["styler/style"].item() == pytest.approx(style.item(), rel=1e-5)
    mine = live.players["styler"].network.state_dict()
    for path, value in network.state_dict().items():
        torch.testing.assert_close(mine[path], value, rtol=1e-5, atol=1e-6)


def test_the_encoder_is_given_by_the_file_and_else_by_the_seed(vgg_file):
    small = toy(NAME, 2)[0]
    player = small.step.styler
    wide = replace(player, network=StylerSizes(width=64), ema_kimg=1.0)
    full = replace(small, step=replace(small.step, styler=wide, vgg=vgg_file))
    live = session.start(full, RANKS, FP32, Compiler(False, "test"), 100)
    live.step(noise_batch(full, live))
    wanted = read_state(vgg_file, Encoder(64, 4))
    for network in (live.players["styler"].network, live.players["styler"].average.network):
        state = network.encoder.state_dict()
        assert all(torch.equal(state[name], value) for name, value in wanted.items())
    assert "VGG19" in full.step.notes()[0] and "no --vgg FILE" not in full.step.notes()[0]
    assert "not the paper's model" in small.step.notes()[0]
    first, again, other = (
        build_networks(replace(small, seed=seed))["styler"].encoder.state_dict()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["features.0.weight"], other["features.0.weight"])


def test_the_random_encoder_is_orthogonal_and_fixed():
    encoder = Encoder(8, 4)
    assert not list(encoder.parameters())
    for layer in encoder.features:
        if isinstance(layer, nn.Conv2d):
            weight = layer.weight.flatten(1).double()
            side = min(weight.shape)
            gram = weight @ weight.T if side == len(weight) else weight.T @ weight
            torch.testing.assert_close(gram, 2 * torch.eye(side).double(), atol=1e-5, rtol=0)


@pytest.fixture(scope="module", autouse=True)
def few():
    """Of each computed domain 64 images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Synthetic, "__len__", lambda self: min(self.count, 64))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Whose decoder has left the grey of its beginning."""
    return trained(tmp_path_factory.mktemp("runs"), NAME, *toy(NAME)[1], "--styler.lr", "1e-2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Contents and styles of several sizes and kinds."""
    sizes = {
        "in/a.png": ("RGB", (37, 50)),
        "in/b.jpg": ("L", (8, 61)),
        "in/a-x.png": ("RGB", (9, 9)),
    }
    sizes |= {"style/x.png": ("RGBA", (40, 33)), "style/y.png": ("L", (5, 70))}
    for name, (mode, size) in sizes.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        noise = np.random.default_rng(len(name)).integers(0, 256, (*size[::-1], 4), np.uint8)
        Image.fromarray(noise).convert(mode).save(tmp_path / name)
    Image.new("RGB", (5, 70), (255, 30, 0)).save(tmp_path / "style" / "y.png")
    return tmp_path


def drawn(run: Path, out: Path, *more: object) -> dict[str, bytes]:
    """The pictures written, by name."""
    assert translate.main([str(a) for a in (run, *more, "--out", out)]) == 0
    return {p.name: Image.open(p).tobytes() for p in sorted(out.iterdir())}


def test_any_image_is_drawn_in_any_style(run, folder, capsys):
    style, inputs = folder / "style" / "x.png", folder / "in"
    one = drawn(run, folder / "one", inputs, "--style", style)
    assert list(one) == ["a-x.png", "a.png", "b.png"]
    assert Image.open(folder / "one" / "a.png").size == (37, 50)
    assert "in the style of x" in capsys.readouterr().out
    both = drawn(run, folder / "both", inputs / "a.png", inputs / "b.jpg", "--style", style.parent)
    assert list(both) == ["a-x.png", "a-y.png", "b-x.png", "b-y.png"]
    assert both["a-x.png"] == one["a.png"] != both["a-y.png"]
    plain = drawn(run, folder / "plain", inputs / "a.png", "--style", style, "--alpha", 0)
    other = folder / "style" / "y.png"
    assert plain == drawn(run, folder / "plain2", inputs / "a.png", "--style", other, "--alpha", 0)
    assert plain["a.png"] != one["a.png"]


def test_wrong_commands_are_one_clear_error(run, folder, capsys):
    image, style = folder / "in" / "a.png", folder / "style" / "x.png"
    out = ("--out", folder / "out")
    assert "give --style IMAGE" in refused(capsys, 2, run, image, *out)
    assert "absent.png: there is no" in refused(
        capsys, 2, run, image, "--style", folder / "absent.png", *out
    )
    for alpha in ("1.5", "-0.1", "nan"):
        said = refused(capsys, 2, run, image, "--style", style, "--alpha", alpha, *out)
        assert f"--alpha {float(alpha):g} must be from 0" in said
    assert "goes with --style" in refused(capsys, 2, run, image, "--alpha", "0.5", *out)
    (folder / "torn.png").write_bytes(b"no image")
    assert "torn.png" in refused(capsys, 1, run, image, "--style", folder / "torn.png", *out)
    said = refused(capsys, 2, run, image, "--style", style, "--out", style.parent.parent / "in")
    assert "would replace the input a.png" in said
    Image.new("RGB", (20, 20)).save(folder / "x-x.png")
    Image.new("RGB", (20, 20)).save(folder / "a.png")
    clash = (folder / "in" / "a-x.png", image, "--style", style, folder / "x-x.png")
    assert "both become a-x-x.png" in refused(capsys, 2, run, *clash, *out)
    assert "no two domains" in refused(
        capsys, 2, run, image, "--style", style, "--direction", "AtoB", *out
    )
    assert not (folder / "out").exists()
    other = SimpleNamespace(name="srgan_x4", recipe=load("srgan_x4"))
    with pytest.raises(ValueError, match="srgan_x4 takes no style: leave --style out"):
        stylise.check_model(other, {"x": style})
    stylise.check_model(other, {})


def test_held_out_figures_stand_beside_content_and_style_as_they_are(run, tmp_path):
    out = tmp_path / "out.json"
    assert evaluate.main([str(run), "--device", "cpu", "--json", str(out)]) == 0
    (found,) = json.loads(out.read_text()).values()
    suffixes = ("", "_identity", "_style_image")
    assert set(found["figures"]) == {f"{x}{s}" for x in ("content", "style") for s in suffixes}
    assert found["figures"]["style_style_image"] == 0 < found["figures"]["style_identity"]
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert any("test/content_identity" in line.get("values", {}) for line in lines)
    with Image.open(max((run / "samples").glob("*.png"))) as picture:
        wide, high = picture.size
    assert high > wide  # three columns, four rows


def test_a_checkpoint_keeps_the_encoder(run):
    """So that a run translates without the file of weights."""
    opened = open_run(run, device="cpu").networks["styler"].encoder.state_dict()
    fresh = build_networks(toy(NAME)[0])["styler"].encoder.state_dict()
    assert all(torch.equal(opened[name], fresh[name]) for name in fresh) and len(fresh) == 18
    assert listing(run / "checkpoints")


def test_a_file_of_weights_counts_by_its_content(vgg_file, tmp_path):
    """It may be moved; another one is another run."""
    small = toy(NAME)[0]
    given = replace(small, step=replace(small.step, vgg=vgg_file))
    moved = tmp_path / "moved.pth"
    shutil.copy(vgg_file, moved)
    elsewhere = replace(small, step=replace(small.step, vgg=moved))
    assert run_name(given) == run_name(elsewhere) != run_name(small)
    write_recipe(tmp_path / "run", NAME, given, {"device": "cpu"})
    assert check_same(tmp_path / "run", elsewhere)["recipe"] == NAME
    moved.write_bytes(b"other weights")
    other = replace(small, step=replace(small.step, vgg=moved.rename(tmp_path / "other.pth")))
    for wrong in (other, small):
        with pytest.raises(ValueError, match=r"--vgg: the run has sha256 [0-9a-f]{16}, this"):
            check_same(tmp_path / "run", wrong)


def test_content_and_style_folders(tmp_path):
    def save(*names: str) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30)).save(tmp_path / name)

    data = Data(name="unpaired", path=tmp_path, resolution=16)
    save("content/a.png", "content/b.png")
    with pytest.raises(DatasetMissing, match=r"style holds no images .*both domains are needed"):
        find(data)
    save("style/s.png")
    assert find(data).note == "content: 2 images, style: 1, unpaired"
    assert len(find(data).second) == 1
    with pytest.raises(NoSplit, match=r"no test images \(no test/ in content/\)"):
        find(data, "test")
    split = replace(data, path=tmp_path / "split")
    save("split/content/train/a.png", "split/content/test/b.png", "split/style/train/s.png")
    with pytest.raises(NoSplit, match=r"no test/ in style/"):
        find(split, "test")
    save("split/style/test/t.png")
    assert find(split, "test").note == "content: 1 images, style: 1, unpaired"
    root = replace(data, name="style_transfer", path=None, root=tmp_path)
    with pytest.raises(DatasetMissing, match="content/ and style/"):
        find(root)
    tmp_path.joinpath("style_transfer").symlink_to(tmp_path / "split")
    assert len(find(root)) == 1


def test_settings_that_cannot_be_trained_with_are_refused(vgg_file, capsys):
    for more, words in {
        ("--vgg", "nowhere.pth", "--styler.width", "64"): "--vgg nowhere.pth: there is no such",
        ("--vgg", str(vgg_file)): "--styler.width 8: the layers of --vgg are 64 wide",
        ("--style-weight", "-1"): "--style-weight -1.0 must not be negative",
        ("--data.resolution", "8"): "--data.resolution 8 is too small",
        ("--data.resolution", "36"): "--data.resolution 36 is no multiple of 8",
        ("--styler.levels", "5"): "--styler.levels 5",
        ("--data.name", "synthetic"): "data.name=synthetic has no images of content and of style",
    }.items():
        with pytest.raises(SystemExit) as left:
            train.main([NAME, *toy(NAME)[1], *more])
        assert left.value.code == 2
        assert words in capsys.readouterr().err
    assert load(NAME).step.styler.network == StylerSizes(64, 4)
