"""Exports: forms that agree with the run, a folder that needs no engine, nothing else touched."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from PIL import Image

from engine.export import __main__ as command
from engine.export import card, folder, source, write
from engine.export.subject import subject_of
from engine.networks.load import rebuild
from engine.networks.spectral import folded
from engine.recipe import image_spec, load, names
from engine.session import build_networks
from engine.trained import open_run
from engine.translation import DIRECTIONS, Direction
from tests.runs import toy
from tests.trained import refused_by, trained

ROOT = Path(__file__).parents[1]
DIGITS = ("--data.name", "digits", "--data.resolution", "8")
FORMS = ("model.safetensors", "model.onnx", "model.pt2")


@pytest.fixture(scope="module")
def gan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GAN with BatchNorm and a moving average, exported."""
    sizes = ("--generator.width", "4", "--discriminator.channels", "4", "8")
    run_dir = trained(tmp_path_factory.mktemp("gan"), "dcgan_digits", *sizes)
    assert export(run_dir) == 0
    return run_dir


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder of which only the decoder is exported."""
    sizes = ("--autoencoder.latent", "5", "--autoencoder.widths", "8", "16")
    run_dir = trained(tmp_path_factory.mktemp("vae"), "vae_celeba", *DIGITS, *sizes)
    assert export(run_dir) == 0
    return run_dir


@pytest.fixture(params=["gan", "vae"])
def run_dir(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def copy(gan: Path, tmp_path: Path) -> Path:
    """A copy of the GAN's run and export to spoil."""
    return shutil.copytree(gan, tmp_path / "dcgan_digits" / "run")


def export(*arguments: object) -> int:
    return command.main([str(a) for a in arguments])


def quickly(*arguments: object) -> int:
    """Without ONNX, which takes seconds to trace."""
    return export(*arguments, "--formats", "safetensors")


refused = refused_by(quickly)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_folder_and_what_it_says_of_itself(run_dir: Path) -> None:
    run, config = open_run(run_dir), json.loads((run_dir / "export/config.json").read_text())
    files = contents(run_dir / "export")
    assert {*FORMS, "README.md", "samples.png", "network/load.py"} < files.keys()
    assert files.keys() == config["files"].keys() | {"config.json"}
    index = json.loads((run_dir / "checkpoints/000000064/checkpoint.json").read_text())
    assert config["checkpoint"] == {
        "images": 64,
        "sha256": index["index_sha256"],
        "ema": run.averaged,
    }
    (z,), (images,) = config["inputs"], config["outputs"]
    assert (z["name"], z["shape"]) == ("z", ["N", run.latent_dim()])
    assert (images["name"], images["shape"]) == ("images", ["N", run.channels, 8, 8])
    stored = json.loads((run_dir / "recipe.json").read_text())
    assert config["recipe"]["source_sha256"] == stored["digest"]
    assert config["recipe"]["name"] == run.name and str(run_dir.parent.parent) not in str(config)
    assert all(value <= 1e-4 for value in config["largest_difference"].values())


def test_weights_are_contiguous_and_no_more_than_needed(gan: Path, vae: Path) -> None:
    generator = open_run(gan).networks["generator"].state_dict()
    stored = safetensors.torch.load_file(gan / "export/model.safetensors")
    assert generator.keys() == stored.keys()
    assert all(torch.equal(stored[k], generator[k]) for k in stored)
    assert (gan / "export/model.safetensors").stat().st_mode & 0o044  # others may read it
    decoder = safetensors.torch.load_file(vae / "export/model.safetensors")
    assert decoder and all(name.startswith("decoder.") for name in decoder)


def snippets(card: str) -> list[str]:
    return [part.split("```")[0] for part in card.split("```python\n")[1:]]


def test_the_card_s_own_lines_run_without_the_engine(run_dir: Path, tmp_path: Path) -> None:
    """Each snippet as it stands, on given latents: the run's own images."""
    there, run = run_dir / "export", open_run(run_dir, device="cpu")
    z_NL = torch.randn(16, run.latent_dim(), generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "z.npy", z_NL.numpy())
    lines = ["import sys", "sys.path.insert(0, '.')", "sys.dont_write_bytecode = True"]
    lines += [f"sys.modules[{name!r}] = None" for name in source.OURS]  # importing it would fail
    lines += ["import numpy, torch", f"z = numpy.load({str(tmp_path / 'z.npy')!r})"]
    lines += ["torch.randn = lambda *shape: torch.from_numpy(z)"]
    lines += ["numpy.random.standard_normal = lambda shape: z"]
    parts = snippets((there / "README.md").read_text())
    assert len(parts) == 3 and len(parts[0].split("\n\n")[0].splitlines()) < 5
    for number, part in enumerate(parts):
        assert len([line for line in part.splitlines() if line]) <= 5
        save = f"numpy.save({str(tmp_path / str(number))!r}, numpy.asarray(images))"
        lines += [part, save]
    program = [sys.executable, "-I", "-c", "\n".join(lines)]
    done = subprocess.run(program, cwd=there, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    expected_NCHW = next(run.decode(z_NL, 16)).numpy()
    for number in range(3):
        made_NCHW = np.load(tmp_path / f"{number}.npy")
        assert made_NCHW.dtype == np.float32 and made_NCHW.shape == expected_NCHW.shape
        assert np.abs(made_NCHW - expected_NCHW).max() <= 1e-4
    assert not list(there.rglob("__pycache__"))


def test_onnx_takes_batches_that_it_was_not_checked_with(run_dir: Path) -> None:
    run = open_run(run_dir, device="cpu")
    session = onnxruntime.InferenceSession(run_dir / "export/model.onnx")
    for count in (1, 7, 33):
        z_NL = run.latents(3, torch.arange(count))
        (made_NCHW,) = session.run(["images"], {"z": z_NL.numpy()})
        expected_NCHW = next(run.decode(z_NL, count)).numpy()
        assert np.abs(made_NCHW - expected_NCHW).max() <= 1e-4


@pytest.mark.parametrize("form", ["safetensors", "onnx", "program"])
def test_a_form_that_differs_fails_the_export(
    form: str, gan: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    right = write.WRITERS[form]

    def wrong(module, config, latents, path):
        state = {
            k: v + 0.01 if v.is_floating_point() else v for k, v in module.state_dict().items()
        }
        twin = folder.portable(subject_of(open_run(gan)).module)
        twin.load_state_dict(state)
        right(twin, config, latents, path)

    monkeypatch.setitem(write.WRITERS, form, wrong)
    assert export(gan, "--out", tmp_path / "out", "--formats", form) == 1
    error = capsys.readouterr().err
    assert "differs from the PyTorch model" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_export_is_replaced_but_nothing_else_is(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    there = copy / "export"
    (there / "network/__pycache__").mkdir()  # from loading it
    assert quickly(copy, "--checkpoint", 32) == 0
    assert json.loads((there / "config.json").read_text())["checkpoint"]["images"] == 32
    assert not (there / "model.onnx").exists()
    assert not (there / "network/__pycache__").exists()
    with open(there / "README.md", "a") as file:
        file.write("licence: mine")
    (there / "LICENSE").write_text("mine")
    before = contents(there)
    assert "LICENSE, README.md" in refused(capsys, 2, copy)
    assert contents(there) == before
    mine = tmp_path / "mine"
    mine.mkdir()
    assert quickly(copy, "--out", mine) == 0  # an empty folder is free
    for place in (copy, copy / "checkpoints", copy / "recipe.json"):
        before = contents(copy)
        assert "is no export" in refused(capsys, 2, copy, "--out", place)
        assert contents(copy) == before


def test_a_failed_export_leaves_the_one_before(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = contents(copy)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(card, "write", full_disk)
    assert "No space left" in refused(capsys, 1, copy)
    assert contents(copy) == before


def test_a_network_that_diverged_is_refused(gan: Path, tmp_path: Path) -> None:
    run = open_run(gan, device="cpu")
    run.networks["generator"][1].weight[0] = torch.nan
    with pytest.raises(source.ExportError, match="not numbers"):
        folder.write_export(run, subject_of(run), gan, ["safetensors"], tmp_path / "out", print)
    assert not list(tmp_path.iterdir())


def test_without_the_packages_for_onnx(
    gan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if "onnx" in name else name)
    assert export(gan, "--out", tmp_path / "a", "--formats", "onnx") == 2
    assert "pip install 'saddle[export]'" in capsys.readouterr().err
    assert export(gan, "--out", tmp_path / "b") == 0
    assert "no model.onnx: " in capsys.readouterr().out
    assert {"model.safetensors", "model.pt2"} < contents(tmp_path / "b").keys()
    assert "ONNX Runtime" not in (tmp_path / "b/README.md").read_text()


def test_another_checkpoint_and_the_weights_as_trained(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name, *flags in (("ema", "--ema"), ("raw", "--no-ema"), ("old", "--checkpoint", 32)):
        assert quickly(copy, *flags, "--out", tmp_path / name) == 0
    stored = [contents(tmp_path / name)["model.safetensors"] for name in ("ema", "raw", "old")]
    assert len(set(stored)) == 3
    assert "best.json" in refused(capsys, 2, copy, "--checkpoint", "best")
    best = {"images": 32, "metric": "fid", "value": 3.5}
    (copy / "checkpoints/best.json").write_text(json.dumps(best))
    assert quickly(copy, "--checkpoint", "best", "--out", tmp_path / "best") == 0
    assert contents(tmp_path / "best")["model.safetensors"] == stored[2]
    for spoilt in (json.dumps(best | {"images": 5}), "{"):
        (copy / "checkpoints/best.json").write_text(spoilt)
        assert "best.json names no checkpoint" in refused(capsys, 2, copy, "--checkpoint", "best")
    assert "none of that" in refused(capsys, 2, copy, "--checkpoint", 33)
    assert "not a run directory" in refused(capsys, 2, tmp_path / "nowhere")


def test_the_card_tells_the_figures_of_these_very_weights(copy: Path, tmp_path: Path) -> None:
    def written(*flags: str) -> str:
        assert quickly(copy, "--out", tmp_path / "out", *flags) == 0
        return (tmp_path / "out/README.md").read_text()

    assert "None were measured of these weights (64 images)" in written()
    lines = [
        {"images": images, "figures": {"fid": fid, "kid": None}, "protocol": {"ema": ema}}
        for images, fid, ema in (
            (32, 99.5, True),
            (64, 88.25, True),
            (64, 44.125, True),
            (64, 33.5, False),
            (128, 11.5, True),
        )
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (copy / "metrics.jsonl").write_text(text + '\n{"images": 64, "fig')
    card = written()
    assert "| fid | 44.125 |" in card and "| kid | not a number |" in card and "- ema: True" in card
    assert not any(other in card for other in ("99.5", "88.25", "33.5", "11.5"))
    assert "| fid | 33.5 |" in written("--no-ema")
    entry = {"checkpoint": open_run(copy).checkpoint, "images": 64}
    alike = entry | {"figures": {"fid": 7.75}, "protocol": {"ema": True}}
    apart = entry | {"figures": {"fid": 5.5, "psnr": 1.0}, "protocol": {"ema": True, "real": 9}}
    (copy / "evaluation.json").write_text(json.dumps([apart]))
    card = written()  # those of training's own protocol come first
    assert 0 < card.index("| fid | 44.125 |") < card.index("| fid | 5.5 |") < card.index("real: 9")
    assert "- psnr: of held-out images" in card
    another = entry | {"checkpoint": "another", "figures": {"fid": 99.5}, "protocol": {}}
    (copy / "evaluation.json").write_text(json.dumps([alike, apart, another]))
    card = written()
    assert 0 < card.index("| fid | 7.75 |") < card.index("| fid | 5.5 |")
    assert not any(other in card for other in ("99.5", "44.125"))
    assert "| fid | 99.5 |" in written("--checkpoint", "32")


def test_the_card_has_a_header_samples_and_the_command(gan: Path) -> None:
    text = (gan / "export/README.md").read_text()
    header = text.split("---\n")[1]
    assert "pipeline_tag: unconditional-image-generation\n" in header
    assert "library_name: pytorch\n" in header and "license" not in header
    assert "![64 samples](samples.png)" in text
    assert "1,797 training images" in text and "images seen: 64 " in text
    assert str(gan.parent.parent) not in text  # no path of this machine
    assert card._without_paths("x --runs 'a b' --kimg 2 --data.root=/c") == "x --kimg 2"
    picture = Image.open(gan / "export/samples.png")
    assert picture.text["Saddle recipe"] == "dcgan_digits"
    assert picture.text["Saddle checkpoint"] in text


@pytest.mark.parametrize("name", names())
def test_every_recipe_s_sampler_can_be_rebuilt_from_what_an_export_says(name: str) -> None:
    recipe, _ = toy(name)
    networks = build_networks(recipe)
    try:
        sampler = recipe.step.sampler(networks).eval()
    except ValueError:
        with pytest.raises(ValueError, match="makes no images from latent vectors"):
            recipe.step.sampler_settings()
        return
    settings = recipe.step.sampler_settings()
    assert source.bundle(source.modules(write.describe(settings)))
    config = json.loads(
        json.dumps({"network": write.describe(settings), "images": vars(image_spec(recipe))})
    )
    sampler = folded(sampler)  # as an export is
    again = rebuild(config, sampler.state_dict())
    z_NL = torch.randn(3, recipe.step.latent_dim())
    made_NCHW = again(z_NL)
    assert torch.equal(made_NCHW, sampler(z_NL)) and made_NCHW.dtype == torch.float32
    assert made_NCHW.abs().max() <= 1


TRANSLATORS = ("cyclegan_horse2zebra", "pix2pix_facades", "srgan_x4")


@pytest.mark.parametrize("way", DIRECTIONS)
@pytest.mark.parametrize("name", TRANSLATORS)
def test_a_translator_can_be_rebuilt_from_what_an_export_says(name: str, way: Direction) -> None:
    recipe, _ = toy(name)
    step, networks = recipe.step, build_networks(recipe)
    settings = step.translator_settings(way)
    translator = step.translator(networks, recipe.data, way).eval()
    config = {"network": write.describe(settings), "images": vars(image_spec(recipe))}
    assert source.bundle(source.modules(config["network"]))
    again = rebuild(json.loads(json.dumps(config)), translator.state_dict())
    given_NCHW = torch.rand(2, 3, 32, 32) * 2 - 1
    made_NCHW = again(given_NCHW)
    for network in networks.values():
        network.eval()
    assert torch.equal(made_NCHW, step.translate(networks, given_NCHW, way))
    assert made_NCHW.dtype == torch.float32


def test_other_recipes_translate_nothing_by_an_export() -> None:
    for name in set(names()) - set(TRANSLATORS):
        step, data = load(name).step, load(name).data
        with pytest.raises(ValueError, match="does not translate images"):
            step.translator({}, data, "AtoB")
        with pytest.raises(ValueError, match="does not translate images"):
            step.translator_settings("AtoB")


def test_the_source_that_goes_along(tmp_path: Path) -> None:
    files = source.bundle(["engine.networks.mlp"])
    names = ("__init__", "mlp", "dcgan", "point", "spec", "load")
    assert files.keys() == {f"{name}.py" for name in names}
    assert not any(
        "engine." in line for line in "".join(files.values()).split("\n") if "import" in line
    )
    assert source.digest(files) != source.digest(files | {"mlp.py": files["mlp.py"] + " "})


@pytest.mark.parametrize(
    "line",
    [
        "from engine.losses import gaussian_kl",
        "from engine import networks",
        "from kernels import philox",
        "import engine.networks.spec",
        "from .spec import Network",
    ],
)
def test_source_that_cannot_go_along_is_refused(line: str) -> None:
    with pytest.raises(source.ExportError, match="cannot go along"):
        source._imports("engine.networks.new", f"import torch\n\ndef f():\n    {line}\n")


def test_a_network_that_lies_elsewhere_is_refused() -> None:
    with pytest.raises(source.ExportError, match="move it to a file of engine/networks/"):
        write.describe(type("Mine", (write.Network,), {})())


def test_the_command_as_a_user_types_it(gan: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "engine.export", str(gan), "--out", str(tmp_path / "x")]
    words += ["--formats", "safetensors", "program"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "model.pt2: " in done.stdout and "README.md says how" in done.stdout
    assert sorted(json.loads((tmp_path / "x/config.json").read_text())["largest_difference"]) == [
        "program",
        "safetensors",
    ]
