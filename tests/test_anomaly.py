"""f-AnoGAN: its losses, its phases, its score, and the digit that is left out."""

import json
import math
from itertools import pairwise

import pytest
import torch
from PIL import Image
from torch import nn

from engine import checkpoint, recipe, sample
from engine.metrics.auroc import auroc
from engine.networks import anogan
from engine.networks.spec import ImageSpec
from engine.recipe import check, load, parse
from engine.steps.anomaly import critic_update, differences, encoder_update
from engine.stored import Loaded
from kernels import philox
from tests.forked import Run, train
from tests.runs import QUICK, final_state, kill_once_at, run_folder, toy
from tests.runs import differences as different

SMALL = [*toy("anogan_mnist", 8)[1], *QUICK, "--precision", "fp32", "--compile", "off"]
MNIST = ImageSpec(1, 28)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_sizes_are_those_of_wgan_gp_on_mnist():
    """gan_mnist.py of igul222/improved_wgan_training with DIM 64 and 128 latents, layer by layer:
    weights and biases of linear layers and of 5x5 convolutions."""
    up = (128 * 4096 + 4096) + (25 * 256 * 128 + 128) + (25 * 128 * 64 + 64) + (25 * 64 + 1)
    convolutions = (25 * 64 + 64) + (25 * 64 * 128 + 128) + (25 * 128 * 256 + 256)
    assert parameters(anogan.Generator().build(MNIST)) == up == 1_554_177
    # theirs has a bias more, of which no loss of differences has a gradient
    assert parameters(anogan.Critic().build(MNIST)) == convolutions + 4096 == 1_030_145 - 1
    # z_encoding_izif.py of tSchlegl/f-AnoGAN: the critic's body, then linear to the latents
    assert parameters(anogan.Encoder().build(MNIST)) == convolutions + 4096 * 128 + 128


@pytest.mark.parametrize("side", [16, 27, 28, 32])
def test_networks_fit_each_other_at_any_size(side):
    images, small = ImageSpec(3, side), {"width": 4}
    x = torch.randn(2, 3, side, side)
    assert anogan.Generator(8, **small).build(images)(torch.randn(2, 8)).shape == x.shape
    critic = anogan.Critic(**small).build(images)
    assert torch.equal(critic.last(critic.features(x)).flatten(), critic(x))
    assert anogan.Encoder(8, **small).build(images)(x).shape == (2, 8)
    assert not any(isinstance(m, nn.modules.batchnorm._NormBase) for m in critic.modules())


class Linear(nn.Module):
    """D(x) = w . x, whose gradient is w everywhere; its features are the products."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def features(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return (self.weight * x_NCHW).flatten(1)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return self.features(x_NCHW).sum(1)


def test_the_critic_learns_the_distance_and_a_gradient_of_one():
    weight = torch.tensor([[[2.0, -1.0], [0.0, 2.0]]], dtype=torch.float64)  # of norm 3
    real = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]], [[[0.0, 1.0], [0.0, 0.0]]]]).double()
    fake = torch.zeros_like(real) + 0.5
    critic = Linear(weight)
    loss, values = critic_update(
        critic, real, fake, philox.make_key(0), torch.arange(2), penalty=10.0
    )
    assert float(values["distance"]) == pytest.approx((4 - 1) / 2 - 1.5)
    assert float(values["penalty"]) == pytest.approx((3 - 1) ** 2)
    assert loss.item() == pytest.approx(1.5 - 1.5 + 10 * 4)
    loss.backward()
    slope = (fake - real).mean(0) + 10 * 2 * (3 - 1) * weight / 3
    torch.testing.assert_close(critic.weight.grad, slope)


def test_the_encoder_is_fitted_by_izi_f():
    """Means of squares over n = 4 pixels and n_d = 4 features."""
    encoder = Linear(torch.ones(1, 2, 2, dtype=torch.float64))
    encoder.forward = encoder.features
    generator = nn.Unflatten(1, (1, 2, 2))
    shifted = nn.Sequential(generator)
    shifted.forward = lambda z: generator(z) + torch.tensor([[1.0, 0.0], [0.0, -2.0]]).double()
    critic = Linear(torch.tensor([[[3.0, 1.0], [1.0, 0.5]]]).double())
    x = torch.rand(5, 1, 2, 2, dtype=torch.float64)
    pixels, features, z = differences(shifted, critic, encoder, x)
    torch.testing.assert_close(pixels.double(), torch.full((5,), (1 + 4) / 4).double())
    torch.testing.assert_close(features.double(), torch.full((5,), (9 + 1) / 4).double())
    assert torch.equal(z, x.flatten(1))
    loss, values = encoder_update(encoder, shifted, critic, x, kappa=2.0)
    assert loss.item() == pytest.approx(1.25 + 2 * 2.5)
    assert (float(values["pixels"]), float(values["features"])) == pytest.approx((1.25, 2.5))


def test_auroc_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 8, (60,), generator=generator).double()  # with many ties
    positive = torch.rand(60, generator=generator) < 0.3
    above = scores[positive][:, None] - scores[~positive]
    pairs = ((above > 0).double() + (above == 0).double() / 2).mean()
    assert auroc(scores, positive) == pytest.approx(float(pairs))
    assert auroc(torch.arange(4.0), torch.arange(4) > 1) == 1.0
    assert math.isnan(auroc(scores, torch.zeros(60, dtype=torch.bool)))
    assert math.isnan(auroc(scores * math.nan, positive))


def test_figures_are_of_the_classes_left_out():
    step = load("anogan_mnist").step
    values = {n: torch.tensor([0.1, 0.2, 0.3, 0.9]).double() for n in ("score", "pixels")}
    values["features"] = -values["score"]
    found = step.summarise(values, torch.tensor([7, 8, 7, 8]), (8,))
    assert found == pytest.approx(
        {
            "auroc": 0.75,
            "auroc_pixels": 0.75,
            "auroc_features": 0.25,
            "score_normal": 0.2,
            "score_anomaly": 0.55,
        }
    )
    assert step.summarise(values, torch.full((4,), 7), (8,)) == {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.without"], "names the class to be found"),
        (["--encoder.latent", "9"], "must be the generator's"),
        (["--generator.ema-kimg", "5"], "--generator.ema-kimg must be 0"),
        (["--critic.ema-kimg", "5"], "--critic.ema-kimg must be 0"),
        (["--gan-steps", "0"], "at least 1"),
        (["--kappa", "-1"], "must not be negative"),
    ],
)
def test_what_cannot_be_trained_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        check(parse("anogan_mnist", flags).recipe, 1)


PHASES = ["--gan-steps", "3", "--critic-updates", "2"]
OFTEN = ["--checkpoint-every", "0.008", "--keep", "10000"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Five steps, three of the GAN and two of the encoder, with a checkpoint after each."""
    runs = tmp_path_factory.mktemp("anogan")
    train("anogan_mnist", *SMALL, *PHASES, *OFTEN, "--steps", "5", "--runs", str(runs))
    return run_folder(runs, "anogan_mnist")


def test_each_phase_trains_its_players_and_no_other(whole_run):
    """Two updates of the critic for one of the generator, then the encoder alone."""
    folders = checkpoint.listing(whole_run / "checkpoints")[::-1]
    states = [dict(Loaded(folder).shared) for folder in folders]
    networks = [path for path in states[0] if "/network/" in path]
    moved = [
        {path.split("/")[0] for path in networks if not torch.equal(a[path], b[path])}
        for a, b in pairwise(states)
    ]
    assert moved == [{"critic"}, {"critic", "generator"}, {"encoder"}, {"encoder"}]


@pytest.mark.parametrize("images", [16, 32])
def test_a_run_killed_in_either_phase_goes_on_bit_for_bit(whole_run, tmp_path, images):
    common = [*SMALL, *PHASES, "--runs", str(tmp_path), "--run", "killed"]
    killed = tmp_path / "anogan_mnist" / "killed"
    kill_once_at(killed, images, Run("anogan_mnist", *common, *OFTEN, "--steps", "3000"))
    train("anogan_mnist", *common, "--steps", "5")
    assert not different(final_state(whole_run), final_state(killed))


def test_a_run_tells_its_auroc_and_shows_reconstructions(whole_run):
    lines = [json.loads(line) for line in (whole_run / "stats.jsonl").read_text().splitlines()]
    last = {k: v for line in lines for k, v in line.get("values", {}).items()}
    assert 0 <= last["test/auroc"] <= 1
    assert last["test/score_normal"] > 0 and last["test/score_anomaly"] > 0
    assert (whole_run / "reconstruction.png").is_file()


def test_heat_maps_are_drawn_with_their_scores(whole_run, tmp_path, capsys):
    out = tmp_path / "anomaly.png"
    arguments = [str(whole_run), "--anomaly", "--num", "12", "--out", str(out)]
    assert sample.main(arguments) == 0
    printed = capsys.readouterr().out
    kinds = ("scores, normal: ", "scores, class blob 8: ")
    for kind in kinds:
        (line,) = [line for line in printed.splitlines() if kind in line]
        assert len(line.split(kind)[1].split()) == 6
    with Image.open(out) as picture:
        assert picture.size[0] == picture.size[1]  # six columns, two times three rows


def test_heat_is_the_distance_of_each_pixel():
    step = load("anogan_mnist").step
    small = recipe.image_spec(load("anogan_mnist"))
    networks = {n: p.network.build(small).eval() for n, p in step.players().items()}
    x = torch.rand(3, 1, 28, 28) * 2 - 1
    with torch.no_grad():
        heat = step.heat(networks, x)
        made = networks["generator"](networks["encoder"](x))
        torch.testing.assert_close(heat, (x - made).abs())
        pixels, features, _ = differences(**networks, images_NCHW=x)
        torch.testing.assert_close(step.scores(networks, x)["score"], pixels + features)


def test_other_models_have_no_heat_maps(tmp_path, capsys):
    train("vae_mnist", *toy("vae_mnist", 8)[1], *QUICK, "--steps", "1", "--runs", str(tmp_path))
    assert sample.main([str(run_folder(tmp_path, "vae_mnist")), "--anomaly"]) == 2
    assert "--anomaly is for detectors such as anogan_mnist" in capsys.readouterr().err


def test_an_encoder_that_has_not_learnt_shows_no_heat_maps(whole_run, capsys):
    assert sample.main([str(whole_run), "--anomaly", "--checkpoint", "24"]) == 1
    assert "learns after 24 images and this is its checkpoint at 24" in capsys.readouterr().err
