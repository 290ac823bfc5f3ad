"""Measuring while training: what is written, which checkpoint is kept, and that nothing changes."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from engine import checkpoint
from engine.evaluate import main as evaluate
from engine.metrics import schedule
from engine.metrics.evaluator import Evaluation
from engine.metrics.protocol import FeatureProtocol
from engine.metrics.schedule import Schedule
from engine.train import main
from tests.checkpoints import started
from tests.forked import train
from tests.runs import QUICK, differences, final_state, toy

SMALL = ["--metrics.generated", "300", "--metrics.real", "400"]
NAMES = {"fid", "kid", "inception_score", "precision", "recall", "density", "coverage"}


def flags(recipe: str, runs, *more: str) -> list[str]:
    """A toy run on the digits, measured each 80 images."""
    small = ["digits" if flag == "synthetic" else flag for flag in toy(recipe, 8)[1]]
    length = ["--kimg", "0.16", "--precision", "fp32", "--run-name", "it", "--runs", str(runs)]
    return [*small, *QUICK, *SMALL, *length, "--metrics.every-kimg", "0.08", *more]


def evaluations(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    runs = tmp_path_factory.mktemp("measured")
    assert main(["dcgan_digits", *flags("dcgan_digits", runs, "--keep", "1")]) == 0
    return runs / "dcgan_digits" / "it"


def test_figures_are_written_with_their_protocol(measured):
    first, last = evaluations(measured)
    assert (first["images"], last["images"]) == (80, 160)
    assert set(last["figures"]) >= NAMES
    protocol = last["protocol"]
    assert (protocol["generated"], protocol["real"], protocol["split"]) == (300, 400, "train")
    assert "classifier on digits" in protocol["extractor"]
    assert len(protocol["extractor_digest"]) == 16
    logged = [json.loads(line) for line in (measured / "stats.jsonl").read_text().splitlines()]
    values = next(x["values"] for x in logged if x["images"] == 80 and "values" in x)
    assert values["metric/fid"] == pytest.approx(first["figures"]["fid"])
    assert 0 < values["time/metrics_share"] < 1


def test_measuring_does_not_change_the_training(measured, tmp_path):
    assert (
        main(["dcgan_digits", *flags("dcgan_digits", tmp_path, "--metrics.every-kimg", "0")]) == 0
    )
    without = tmp_path / "dcgan_digits" / "it"
    assert not (without / "metrics.jsonl").exists()
    assert not differences(final_state(measured), final_state(without))


def test_the_best_checkpoint_outlives_the_newest(tmp_path, monkeypatch):
    values = iter([5.0, 3.0, 4.0, 6.0])
    real = Schedule.measure

    def measure(self, session):
        evaluate = self._evaluator.evaluate

        def pretend(*args):
            evaluation = evaluate(*args)
            evaluation.figures["fid"] = next(values)
            return evaluation

        self._evaluator.evaluate = pretend
        found = real(self, session)
        self._evaluator.evaluate = evaluate
        return found

    monkeypatch.setattr(Schedule, "measure", measure)
    more = ("--kimg", "0.32", "--keep", "1", "--checkpoint-every", "0.08")
    assert main(["dcgan_digits", *flags("dcgan_digits", tmp_path, *more)]) == 0
    folder = tmp_path / "dcgan_digits" / "it" / "checkpoints"
    assert [int(p.name) for p in checkpoint.listing(folder)] == [320, 160]
    best = checkpoint.read_best(folder)
    assert (best["images"], best["metric"], best["value"]) == (160, "fid", 3.0)


def test_a_resumed_run_measures_what_the_unbroken_one_did(measured, tmp_path):
    half = flags("dcgan_digits", tmp_path, "--checkpoint-every", "0.08")
    assert main(["dcgan_digits", *half, "--kimg", "0.08"]) == 0
    folder = tmp_path / "dcgan_digits" / "it"
    with open(folder / "metrics.jsonl", "a") as file:  # of a part that is lost
        file.write(json.dumps(evaluations(folder)[0] | {"images": 96}) + "\n")
    assert main(["dcgan_digits", *half]) == 0
    figures = [(e["images"], e["figures"]) for e in evaluations(folder)]
    assert figures == [(e["images"], e["figures"]) for e in evaluations(measured)]


def test_an_autoencoder_is_measured_by_its_likelihood_and_reconstructions(weights, tmp_path):
    more = ("--data.name", "synthetic", "--metrics.weights", weights, "--kimg", "0.08")
    assert main(["vae_mnist", *flags("vae_mnist", tmp_path, *more)]) == 0
    (evaluation,) = evaluations(tmp_path / "vae_mnist" / "it")
    assert {"elbo", "bits_per_dim", "psnr", "ssim", "fid"} <= set(evaluation["figures"])
    assert evaluation["figures"]["elbo"] < 0 < evaluation["figures"]["bits_per_dim"]


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (["--metrics.generated", "100"], "--metrics.generated: 100 images are too few"),
        (["--metrics.real", "50"], "--metrics.real: 50 images are too few"),
        (["--metrics.split", "test"], "--metrics.split test: digits has no test images"),
        (["--metrics.weights", "nowhere.pth"], "nowhere.pth: there is no such file"),
    ],
)
def test_bad_settings_are_found_before_training(setting, text, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["dcgan_digits", *flags("dcgan_digits", tmp_path, *setting)])
    assert text in capsys.readouterr().err
    assert not any(tmp_path.iterdir())  # no empty run folder stays


def test_a_refused_start_leaves_a_folder_that_was_there(tmp_path, capsys):
    folder = tmp_path / "dcgan_digits" / "it"
    folder.mkdir(parents=True)
    with pytest.raises(SystemExit, match="2"):
        main(["dcgan_digits", *flags("dcgan_digits", tmp_path, "--metrics.real", "50")])
    assert "--metrics.real" in capsys.readouterr().err and folder.is_dir()


def test_the_end_of_a_run_says_what_measuring_cost(tmp_path, capsys):
    for more in ((), ("--metrics.every-kimg", "0")):
        arguments = flags("dcgan_digits", tmp_path / str(len(more)), "--kimg", "0.08", *more)
        assert main(["dcgan_digits", *arguments]) == 0
        found = re.findall(r"^metrics: (\S+) % of the wall time", capsys.readouterr().out, re.M)
        assert len(found) == (0 if more else 1)
        assert all(0 < float(share) < 100 for share in found)


def test_preparing_the_metrics_is_no_part_of_their_share(tmp_path, monkeypatch):
    """As when the classifier is trained at the start: neither in the share nor in its whole."""
    clock = [0.0]

    class Slow:
        protocol = FeatureProtocol("", "", "", "", "", "", 1, 1, False, 0)

        def __init__(self, *_):
            clock[0] += 100

        def evaluate(self, *_):
            clock[0] += 3
            return Evaluation({"fid": 1.0}, self.protocol, 3.0)

    monkeypatch.setattr(schedule, "open_evaluator", Slow)
    monkeypatch.setattr(schedule, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    live = started()
    opened = Schedule(live, tmp_path, lambda text: None)
    assert opened.account() == ""
    clock[0] += 9
    assert opened.measure(live)["time/metrics_share"] == 0.25
    said = "metrics: 25.0 % of the wall time (100.0 s to prepare them not counted)"
    assert opened.account() == said


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(weights, tmp_path):
    found, more = [], ("--kimg", "0.08", "--metrics.weights", weights)
    for ranks in (1, 2):
        runs = tmp_path / str(ranks)
        train("vae_mnist", *flags("vae_mnist", runs, *more), ranks=ranks)
        found.append(evaluations(runs / "vae_mnist" / "it")[-1])
    assert found[0]["protocol"] == found[1]["protocol"]
    for name, value in found[0]["figures"].items():
        assert found[1]["figures"][name] == pytest.approx(value, rel=2e-3, abs=1e-3), name


def test_the_global_generator_is_left_alone(measured):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert evaluate([str(measured), *SMALL]) == 0
    assert torch.equal(torch.rand(1), expected)
