"""Non-finite losses and gradients: named, stopped on all ranks, or rolled back."""

import json

import pytest
import torch
from safetensors.torch import load_file

from engine import checkpoint
from engine.steps import adversarial
from engine.stored import Loaded
from engine.train import main
from kernels import philox
from tests.forked import train
from tests.runs import QUICK, final_state, toy

FLAGS = [*toy("dcgan_digits", 8)[1], *QUICK, "--run-name", "it", "--precision", "fp32"]
EXPLODING = ["--discriminator.lr", "1e30"]
VAE = [*toy("vae_mnist", 8)[1], *QUICK, "--run-name", "it", "--autoencoder.lr", "1e30"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_non_finite_loss_stops_all_ranks_and_names_the_player(ranks, tmp_path):
    flags = [*VAE, "--runs", str(tmp_path), "--steps", "50"]
    output = train("vae_mnist", *flags, ranks=ranks, code=1)
    assert output.count("the loss of the autoencoder was not finite") == 1  # from one rank
    assert "--on-nan rollback" in output
    assert "SIGABRT" not in output
    folder = tmp_path / "vae_mnist" / "it"
    (evidence,) = folder.glob("nan-*")
    seen = json.loads((evidence / "nan.json").read_text())
    assert seen["player"] == "autoencoder"
    tensors = load_file(evidence / "state.safetensors")
    assert tensors["batch/images"].shape == (8 // ranks, 1, 28, 28)
    state = [t for k, t in tensors.items() if k.startswith("state/")]
    assert state
    events = [json.loads(x).get("event") for x in (folder / "stats.jsonl").read_text().splitlines()]
    assert "nan" in events


def test_rollback_gives_up_after_three_times(tmp_path):
    flags = [*FLAGS, *EXPLODING, "--runs", str(tmp_path), "--steps", "50", "--on-nan", "rollback"]
    output = train("dcgan_digits", *flags, code=1)
    assert "(3 of 3)" in output
    assert "(4 of 3)" not in output
    assert len(list((tmp_path / "dcgan_digits" / "it").glob("nan-*"))) == 4


@pytest.fixture
def poisoned(monkeypatch):
    """Latents of the run's first noise stream are not a number from the 64th image on."""
    key_of_salt_0, normal = philox.make_key(0), philox.normal

    def poisoned_normal(key, stream, index_N, size):
        bad = (index_N[:, None] >= 64) & (key == key_of_salt_0) & (stream == adversarial.LATENTS)
        return torch.where(bad, torch.nan, normal(key, stream, index_N, size))

    monkeypatch.setattr(philox, "normal", poisoned_normal)


def test_rollback_goes_on_from_the_checkpoint_with_new_noise(poisoned, tmp_path, capsys):
    flags = [*FLAGS, "--runs", str(tmp_path), "--steps", "20", "--checkpoint-every", "0.04"]
    assert main(["dcgan_digits", *flags, "--on-nan", "rollback"]) == 0
    assert "back to 40 images with new noise (1 of 3)" in capsys.readouterr().out
    folder = tmp_path / "dcgan_digits" / "it"
    assert all(t.isfinite().all() for t in final_state(folder).values())
    assert Loaded(checkpoint.listing(folder / "checkpoints")[0]).index["salt"] == 1
    events = [json.loads(x).get("event") for x in (folder / "stats.jsonl").read_text().splitlines()]
    assert events.count("rollback") == 1
    assert events[-1] == "finish"


def test_updates_that_are_not_finite_are_not_applied(poisoned, tmp_path, capsys):
    flags = [*FLAGS, "--runs", str(tmp_path), "--steps", "20", "--log-every", "1"]
    assert main(["dcgan_digits", *flags]) == 1
    assert "was not finite" in capsys.readouterr().err
    (evidence,) = (tmp_path / "dcgan_digits" / "it").glob("nan-*")
    state = load_file(evidence / "state.safetensors")
    weights = [v for k, v in state.items() if "/network/" in k and "weight" in k]
    assert all(w.isfinite().all() for w in weights)
    assert torch.equal(state["state/generator/optimizer/1.weight/step"], torch.tensor(8.0))
