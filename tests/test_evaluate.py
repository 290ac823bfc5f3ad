"""The evaluate verb: runs side by side, plain folders, and what it refuses."""

import json
import shutil

import pytest
from PIL import Image

from engine.evaluate import main, remember
from engine.report.__main__ import main as report
from engine.train import main as train
from tests.images import images
from tests.reports import Page
from tests.test_metrics import SMALL, evaluations, flags


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two measured runs of a GAN that differ in the seed."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("a", "0"), ("b", "1")):
        more = ("--seed", seed, "--kimg", "0.08", "--run-name", name)
        assert train(["dcgan_digits", *flags("dcgan_digits", folder, *more)]) == 0
    return folder / "dcgan_digits"


def test_a_run_is_measured_again_with_the_same_result(runs, tmp_path, capsys):
    out = tmp_path / "all.json"
    assert main([str(runs / "a"), str(runs / "b"), "--json", str(out)]) == 0
    table = capsys.readouterr().out
    assert "fid" in table
    assert "protocol: extractor classifier on digits" in table
    results = json.loads(out.read_text())
    recorded = evaluations(runs / "a")[-1]
    assert results["a"]["figures"] == pytest.approx(recorded["figures"])
    assert results["a"]["protocol"] == recorded["protocol"]
    assert json.loads((runs / "b" / "evaluation.json").read_text()) == [results["b"]]
    assert results["a"]["figures"]["fid"] != results["b"]["figures"]["fid"]


def test_the_best_checkpoint_can_be_asked_for(runs, capsys):
    assert main([str(runs / "a"), "--checkpoint", "best", "--metrics.generated", "280"]) == 0
    assert "80 images" in capsys.readouterr().out


def test_the_newest_figures_of_every_protocol_and_checkpoint_are_kept(runs, tmp_path, capsys):
    run = shutil.copytree(runs / "a", tmp_path / "a")
    (run / "evaluation.json").write_text("[3, {")
    assert main([str(run)]) == 0
    assert "evaluation.json could not be read" in capsys.readouterr().err
    other = ("--metrics.generated", "290")
    assert main([str(run), *other]) == 0
    assert main([str(run)]) == 0
    kept = json.loads((run / "evaluation.json").read_text())
    usual = evaluations(run)[-1]["protocol"]["generated"]
    assert [entry["protocol"]["generated"] for entry in kept] == [290, usual]
    remember(run, kept[0] | {"images": 5})
    remember(run, kept[0] | {"figures": {"fid": 1.0}})
    kept = json.loads((run / "evaluation.json").read_text())
    assert [entry["images"] for entry in kept] == [80, 5, 80]
    assert kept[-1]["figures"] == {"fid": 1.0}


def test_runs_measured_alike_are_compared_by_the_report(runs, tmp_path):
    folders = [shutil.copytree(runs / name, tmp_path / name) for name in ("a", "b")]
    for folder in folders:
        (folder / "evaluation.json").unlink(missing_ok=True)
    assert main([*map(str, folders), "--metrics.generated", "290"]) == 0
    out = tmp_path / "cmp.html"
    assert report([*map(str, folders), "--out", str(out)]) == 0
    (table,) = Page(out).data()["evaluated"]
    assert "290 generated images" in table["words"]
    place = [name for name, _ in table["heads"]].index("FID")
    for (run, at, digest, cells), folder in zip(table["rows"], folders, strict=True):
        (stored,) = json.loads((folder / "evaluation.json").read_text())
        assert (folders[run], at, digest) == (folder, 80, stored["checkpoint"][:12])
        assert cells[place] == [pytest.approx(stored["figures"]["fid"], rel=1e-4)]


def test_mixed_protocols_are_refused_saying_why(runs, tmp_path, capsys):
    more = ("--kimg", "0.08", "--generator.ema-kimg", "0")
    assert train(["dcgan_digits", *flags("dcgan_digits", tmp_path, *more)]) == 0
    capsys.readouterr()
    assert main([str(runs / "a"), str(tmp_path / "dcgan_digits" / "it")]) == 2
    message = capsys.readouterr().err
    assert "do not go side by side" in message
    assert "ema: a has True, it has False" in message
    assert main([str(runs / "a"), str(tmp_path / "dcgan_digits" / "it"), "--no-ema"]) == 0


def test_two_folders_are_measured(tmp_path, weights, capsys):
    real = images(tmp_path / "real", 300, (20, 20), 0)
    fake = images(tmp_path / "fake", 280, (20, 20), 1)
    arguments = ["--real", real, "--fake", fake, "--metrics.weights", weights]
    out = tmp_path / "out.json"
    assert main([*arguments, "--json", str(out)]) == 0
    found = json.loads(out.read_text())["fake"]
    assert found["figures"]["fid"] < 1  # both are noise
    assert (found["protocol"]["real"], found["protocol"]["generated"]) == (300, 280)


def test_pairs_of_images_are_compared_by_name(tmp_path):
    real = images(tmp_path / "real", 6, (24, 24), 0)
    copies = images(tmp_path / "copies", 6, (24, 24), 0, "bmp")
    others = images(tmp_path / "others", 6, (24, 24), 1)
    for fake, expected in ((copies, 1.0), (others, 0.0)):
        out = tmp_path / "out.json"
        assert main(["--real", real, "--fake", fake, "--paired", "--json", str(out)]) == 0
        (found,) = json.loads(out.read_text()).values()
        assert found["figures"]["ssim"] == pytest.approx(expected, abs=0.1)


def test_bad_folders_are_one_clear_error(tmp_path, weights, capsys):
    good = images(tmp_path / "good", 300, (20, 20), 0)
    few = images(tmp_path / "few", 40, (20, 20), 0)
    wide = images(tmp_path / "wide", 3, (20, 30), 0)
    large = images(tmp_path / "large", 300, (40, 40), 0)
    mixed = images(tmp_path / "mixed", 3, (20, 20), 0)
    Image.new("RGB", (33, 20)).save(tmp_path / "mixed" / "other.png")
    (tmp_path / "empty").mkdir()
    cases = {
        few: "--fake: 40 images are too few for the 256 features",
        wide: "images of 30 x 20, not square: --resize N",
        large: "--real has images of 20 x 20, --fake of 40 x 40: --resize N",
        mixed: "images of different sizes (000.png is 20 x 20, other.png 33 x 20): --resize N",
        str(tmp_path / "empty"): "holds no images",
        str(tmp_path / "nowhere"): "there is no such folder",
    }
    for fake, text in cases.items():
        assert main(["--real", good, "--fake", fake, "--metrics.weights", weights]) == 2
        assert text in capsys.readouterr().err
    arguments = ["--real", good, "--fake", large, "--metrics.weights", weights, "--resize", "16"]
    assert main(arguments) == 0
    assert main(["--real", good, "--fake", few, "--paired"]) == 2
    assert "260 are alone" in capsys.readouterr().err


def test_a_corrupt_image_is_named(tmp_path, weights, capsys):
    real = images(tmp_path / "real", 300, (20, 20), 0)
    whole = (tmp_path / "real" / "007.png").read_bytes()
    (tmp_path / "real" / "007.png").write_bytes(whole[: len(whole) // 2])
    assert main(["--real", real, "--fake", real, "--metrics.weights", weights]) == 1
    assert "007.png" in capsys.readouterr().err


def test_wrong_commands_are_one_clear_error(runs, tmp_path, capsys):
    (tmp_path / "not a run").mkdir()
    cases = {
        (): "name run directories, or --real DIR and --fake DIR",
        (str(tmp_path / "not a run"),): "is not a run directory",
        (str(runs / "a"), str(runs / "a")): "named twice",
        (str(runs / "a"), "--paired"): "--paired is for --real and --fake",
        ("--real", str(tmp_path)): "go together",
        (str(runs / "a"), "--checkpoint", "77"): "has none of that",
        (str(runs / "a"), "--metrics.generated", "20"): "too few",
        (str(runs / "a"), "--metrics.extractor", "none"): "",
    }
    for arguments, text in cases.items():
        try:
            code = main(list(arguments))
        except SystemExit as leaving:  # tyro's own
            code = leaving.code
        assert code == 2, arguments
        assert text in capsys.readouterr().err


def test_a_run_without_checkpoints_is_a_failure_that_says_so(runs, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "recipe.json").write_bytes((runs / "a" / "recipe.json").read_bytes())
    assert main([str(bare), *SMALL]) == 1
    assert "no checkpoint yet" in capsys.readouterr().err
