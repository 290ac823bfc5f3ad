"""The front door of the kernels: what serves, what is said of it, and training with and without."""

import pytest
import torch

import kernels
from engine import session
from engine.algorithm import Algorithm
from engine.compile import Compiler
from engine.networks import dcgan, vae
from engine.session import Session
from engine.settings import Adam, Length, PlayerSettings, Recipe
from engine.steps.adversarial import Adversarial
from engine.steps.autoencoder import Variational
from engine.train import main
from kernels import dispatch
from kernels.batchnorm_module import BatchNormLeakyReLU
from pipelines.batch import Batch
from pipelines.settings import Data
from tests import interpreted
from tests.players import BATCH, FP32, RANKS

ADAM = Adam(lr=1e-3)
STEPS: dict[str, Algorithm] = {
    "adversarial": Adversarial(
        generator=PlayerSettings(dcgan.Generator(latent=6, width=4), ADAM),
        discriminator=PlayerSettings(dcgan.Discriminator(width=4), ADAM),
        r1=1.0,
        r1_every=2,
    ),
    "variational": Variational(
        autoencoder=PlayerSettings(vae.Convolutional(latent=6, widths=(4, 4)), ADAM)
    ),
}


@pytest.fixture(autouse=True)
def _setting_as_it_was():
    with dispatch.using("fused"):
        yield


def started(step: Algorithm, setting: dispatch.Setting) -> Session:
    recipe = Recipe(
        data=Data(resolution=16, channels=1, batch=BATCH),
        step=step,
        length=Length(steps=10),
        kernels=setting,
    )
    return session.start(recipe, RANKS, FP32, Compiler(False, "test"), 80)


def trained(step: Algorithm, setting: dispatch.Setting) -> Session:
    live = started(step, setting)
    for i in range(3):
        images = torch.rand(BATCH, 1, 16, 16, generator=torch.Generator().manual_seed(i)) * 2 - 1
        live.step(Batch(images, None, live.clock.position_N()))
        live.clock.advance()
    return live


def fused_modules(live: Session) -> int:
    networks = [p.network for p in live.players.values()]
    return sum(isinstance(m, BatchNormLeakyReLU) for n in networks for m in n.modules())


def test_explain_tells_of_every_operation(capsys):
    kernels.explain("cpu")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(dispatch.OPS)
    assert all("PyTorch" in line and "cpu" in line for line in lines) or dispatch.INTERPRET


@pytest.mark.parametrize("setting", ["auto", "fused", "reference"])
def test_a_dry_run_says_what_serves(setting, capsys):
    assert main(["dcgan_digits", "--kernels", setting, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "gaussian_kl: PyTorch: " in output
    assert ("PyTorch: the setting is reference" in output) == (setting == "reference")


def test_on_a_cpu_networks_stay_as_they_are():
    if not dispatch.INTERPRET:
        assert not fused_modules(started(STEPS["adversarial"], "fused"))


@pytest.mark.skipif(not dispatch.TRITON, reason="Triton is for Linux")
def test_on_a_gpu_auto_takes_what_was_measured_and_fused_everything(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    for setting, taken in (("auto", dispatch.GAINS), ("fused", dispatch.OPS), ("reference", ())):
        dispatch.use(setting)
        assert {op for op in dispatch.OPS if dispatch.choose(op, cuda).fused} == set(taken)
    monkeypatch.setattr(dispatch, "TRITON", False)
    dispatch.use("fused")
    assert dispatch.choose("gan_bce", cuda).reason == "Triton is not installed"


def test_the_interpreted_tests_of_this_file_pass():
    interpreted.run(__file__, fewest=2)


@interpreted.only
@pytest.mark.parametrize("name", STEPS)
def test_training_with_kernels_equals_training_without(name):
    """Three iterations of every update; Adam makes of a rounding error at most a small step."""
    fused, reference = (trained(STEPS[name], setting) for setting in ("fused", "reference"))
    assert fused_modules(fused) and not fused_modules(reference)
    for player, other in zip(fused.players.values(), reference.players.values(), strict=True):
        mine, theirs = player.network.state_dict(), other.network.state_dict()
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            if value.is_floating_point():
                torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=2e-4, msg=key)
