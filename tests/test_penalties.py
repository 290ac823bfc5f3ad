"""Gradient penalties: hand-computed values, derivatives of the second order, and their turns."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import session
from engine.compile import Compiler
from engine.networks import dcgan, mlp, residual
from engine.networks.norms import statistics_kept
from engine.networks.spec import ImageSpec, Network
from engine.networks.spectral import spectral_norm
from engine.penalties import gradient_penalty, input_gradient, r1_penalty
from engine.session import Session
from engine.settings import Adam, Length, PlayerSettings, Recipe
from engine.stats import Stats
from engine.steps.adversarial import MIXING, Adversarial, penalised_update
from engine.train import main
from kernels import philox
from kernels.batchnorm_module import BatchNormLeakyReLU, fuse
from pipelines.batch import Batch
from pipelines.settings import Data
from tests import interpreted
from tests.forked import train
from tests.players import BATCH, FP32, RANKS
from tests.runs import QUICK, final_state, run_folder


class Quadratic(nn.Module):
    """D(x) = 1/2 x'Ax per image: its gradient is Ax for a symmetric A."""

    def __init__(self) -> None:
        super().__init__()
        half = torch.tensor([[1.0, 2.0], [0.0, 3.0]], dtype=torch.float64)
        self.matrix = nn.Parameter(half + half.T)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NV = x_NCHW.flatten(1)
        return 0.5 * torch.einsum("nv,vw,nw->n", x_NV, self.matrix, x_NV)


def pictures(dtype: torch.dtype = torch.float32, size: int = 16, seed: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(6, 1, size, size, generator=random).to(dtype)


def built(network: Network) -> nn.Module:
    torch.manual_seed(0)
    return network.build(ImageSpec(1, 16)).to(memory_format=torch.channels_last)


def test_r1_of_a_quadratic_form_is_the_mean_squared_length_of_ax():
    x_NCHW = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64).reshape(2, 1, 1, 2)
    # A = [[2, 2], [2, 6]]: Ax = (6, 14) and (4, 0)
    critic = Quadratic()
    assert input_gradient(critic, x_NCHW).flatten(1).tolist() == [[6, 14], [4, 0]]
    assert r1_penalty(critic, x_NCHW).item() == (36 + 196 + 16) / 2
    r1_penalty(critic, x_NCHW).backward()
    # d/dA of mean |Ax|^2 is mean 2 (Ax) x'; the form's gradient is (A + A')x / 2, hence symmetric
    ax, x = torch.tensor([[6.0, 14], [4, 0]]).double(), x_NCHW.flatten(1)
    outer = torch.einsum("nv,nw->vw", ax, x) / 2 * 2
    torch.testing.assert_close(critic.matrix.grad, (outer + outer.T) / 2)


def test_the_gradient_penalty_of_a_quadratic_form_by_hand():
    real = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64).reshape(2, 1, 1, 2)
    fake = torch.tensor([[3.0, 0.0], [0.0, 0.0]], dtype=torch.float64).reshape(2, 1, 1, 2)
    alpha = torch.tensor([0.5, 0.25], dtype=torch.float64)
    # x = (2, 0) and (0, 0.5): Ax = (4, 4) and (1, 3)
    wanted = ((32**0.5 - 1) ** 2 + (10**0.5 - 1) ** 2) / 2
    assert gradient_penalty(Quadratic(), real, fake, alpha).item() == pytest.approx(wanted)


@dataclass(frozen=True)
class Spectral(mlp.Discriminator):
    """Every weight divided by its largest singular value, which follows it from forward to
    forward."""

    def build(self, images: ImageSpec) -> nn.Module:
        return spectral_norm(super().build(images))


DISCRIMINATORS = {
    "plain": mlp.Discriminator((4, 6)),
    "batchnorm": dcgan.Discriminator(4),
    "layernorm": residual.Critic(width=2),
    "spectral norm": Spectral((4, 6)),
}
QUICK_TO_COMPILE = ("plain", "batchnorm")
PENALTIES = {
    "wgan-gp": lambda critic, real, fake: gradient_penalty(
        critic, real, fake, torch.linspace(0, 1, len(real), dtype=real.dtype)
    ),
    "r1": lambda critic, real, fake: r1_penalty(critic, real),
    "r2": lambda critic, real, fake: r1_penalty(critic, fake),
}


def penalised_loss(penalty):
    """A whole update's loss: the critic's opinions, and the penalty on their gradient."""

    def loss(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        return critic(fake).mean() - critic(real).mean() + 10 * penalty(critic, real, fake)

    return loss


def exact_loss(name: str, critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """The same in float64, by autograd's own double backward."""
    alpha = torch.linspace(0, 1, len(real)).double()[:, None, None, None]
    x = {"wgan-gp": fake + alpha * (real - fake), "r1": real, "r2": fake}[name]
    x = x.detach().requires_grad_()
    opinions = critic(fake).mean() - critic(real).mean()
    with statistics_kept(critic):
        (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    square_N = gradient.flatten(1).square().sum(1)
    inside = (square_N.sqrt() - 1).square() if name == "wgan-gp" else square_N
    return opinions + 10 * inside.mean()


def check_gradients(name: str, network: Network, compiled: bool, fused: bool) -> None:
    torch._dynamo.reset()
    critic, exact = built(network), built(network).double()
    critic = fuse(critic) if fused else critic
    assert not fused or any(isinstance(m, BatchNormLeakyReLU) for m in critic.modules())
    loss = penalised_loss(PENALTIES[name])
    if compiled:
        loss = torch.compile(loss, fullgraph=True)
    loss(critic, pictures(), pictures(seed=2)).backward()
    exact_loss(name, exact, pictures(torch.float64), pictures(torch.float64, seed=2)).backward()
    largest = max(float(p.grad.abs().max()) for p in exact.parameters())
    for mine, wanted in zip(critic.parameters(), exact.parameters(), strict=True):
        scale = max(float(wanted.grad.abs().max()), 1e-3 * largest)
        torch.testing.assert_close(mine.grad.double(), wanted.grad, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("network", DISCRIMINATORS)
@pytest.mark.parametrize("name", PENALTIES)
def test_every_parameters_gradient_is_that_of_float64_autograd(name, network):
    check_gradients(name, DISCRIMINATORS[network], compiled=False, fused=False)


@pytest.mark.parametrize(
    ("name", "network"),
    [
        *product(PENALTIES, QUICK_TO_COMPILE),
        pytest.param("wgan-gp", "layernorm", marks=pytest.mark.slow),
        pytest.param("r1", "spectral norm", marks=pytest.mark.slow),
    ],
)
def test_compiled_too(name, network):
    check_gradients(name, DISCRIMINATORS[network], compiled=True, fused=False)


def test_the_interpreted_tests_of_this_file_pass():
    interpreted.run(__file__, fewest=6)


@interpreted.only
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", PENALTIES)
def test_with_fused_kernels_too(name, compiled):
    check_gradients(name, dcgan.Discriminator(4), compiled, fused=True)


class Smooth(nn.Module):
    """A layer, LayerNorm, a layer, of given weights: LeakyReLU's kinks are no place for finite
    differences."""

    def __init__(self, first: Tensor, scale: Tensor, second: Tensor) -> None:
        super().__init__()
        self.first, self.scale, self.second = first, scale, second

    def forward(self, x_NCHW: Tensor) -> Tensor:
        hidden = F.softplus(F.conv2d(x_NCHW, self.first, stride=2))
        hidden = F.group_norm(hidden, 1, self.scale)
        return F.conv2d(hidden, self.second).tanh().flatten(1).sum(1)


def smooth_weights() -> list[Tensor]:
    random = torch.Generator().manual_seed(2)
    shapes = (2, 1, 4, 4), (2,), (1, 2, 2, 2)
    return [torch.randn(s, dtype=torch.float64, generator=random).requires_grad_() for s in shapes]


def small_pictures() -> list[Tensor]:
    """Real and fake ones."""
    return [pictures(torch.float64, size=6, seed=seed)[:2] for seed in (1, 2)]


@pytest.mark.parametrize("name", PENALTIES)
def test_its_first_and_second_derivatives_hold_in_finite_differences(name):
    def penalty(*weights: Tensor) -> Tensor:
        return PENALTIES[name](Smooth(*weights), *small_pictures())

    assert torch.autograd.gradcheck(penalty, smooth_weights())
    assert torch.autograd.gradgradcheck(penalty, smooth_weights())


def slopes(critic: nn.Module, x_NCHW: Tensor, h: float = 1e-5) -> Tensor:
    """The critic's gradient at each image, (N, V), by central differences."""
    each = torch.eye(x_NCHW[0].numel(), dtype=x_NCHW.dtype).unflatten(1, x_NCHW.shape[1:])
    with torch.no_grad():
        pairs = [critic(x_NCHW + h * e) - critic(x_NCHW - h * e) for e in each]
    return torch.stack(pairs, 1) / (2 * h)


@pytest.mark.parametrize("name", PENALTIES)
def test_its_value_holds_in_finite_differences(name):
    critic, (real, fake) = Smooth(*smooth_weights()), small_pictures()
    mixed = torch.stack([fake[0], real[1]])  # alpha is 0 for the first image, 1 for the second
    slope_NV = slopes(critic, {"wgan-gp": mixed, "r1": real, "r2": fake}[name])
    square_N = slope_NV.square().sum(1)
    wanted = (square_N.sqrt() - 1).square() if name == "wgan-gp" else square_N
    penalty = PENALTIES[name](critic, real, fake)
    torch.testing.assert_close(penalty, wanted.mean(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", PENALTIES)
def test_it_moves_the_critic_and_not_the_images(name):
    weights, (real, fake) = smooth_weights(), small_pictures()
    PENALTIES[name](Smooth(*weights), real.requires_grad_(), fake.requires_grad_()).backward()
    assert all(float(w.grad.abs().max()) > 0 for w in weights)
    assert real.grad is None and fake.grad is None


def test_running_statistics_stay_and_are_followed_again_afterwards():
    critic = built(dcgan.Discriminator(4))
    before = [b.clone() for b in critic.buffers()]
    r1_penalty(critic, pictures())
    assert all(torch.equal(a, b) for a, b in zip(critic.buffers(), before, strict=True))
    critic(pictures())
    assert not all(torch.equal(a, b) for a, b in zip(critic.buffers(), before, strict=True))


def test_under_autocast_the_norm_and_the_mean_are_float32():
    critic = built(mlp.Discriminator((4, 6)))
    with torch.autocast("cpu", torch.bfloat16):
        penalty = r1_penalty(critic, pictures())
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, r1_penalty(critic, pictures()), rtol=0.03, atol=0)


def test_a_penalised_update_adds_the_weighed_penalty_to_the_loss():
    critic, real, fake = built(mlp.Discriminator((4, 6))), pictures(), -pictures()
    where = (None, philox.make_key(0), torch.arange(len(real)))
    settings = {"loss": "nonsaturating", "joint": False, "kinds": ()}
    plain, _ = penalised_update(critic, real, fake, *where, **settings, r1=0.0, gp=0.0)
    loss, values = penalised_update(critic, real, fake, *where, **settings, r1=7.0, gp=3.0)
    alpha_N = philox.uniform(where[1], MIXING, where[2], 1)[:, 0]
    r1, gp = r1_penalty(critic, real), gradient_penalty(critic, real, fake, alpha_N)
    torch.testing.assert_close(loss, plain + 7 * r1 + 3 * gp)
    torch.testing.assert_close(values["r1"], r1.detach())
    torch.testing.assert_close(values["gp"], gp.detach())


def started(r1: float, every: int) -> Session:
    recipe = Recipe(
        data=Data(resolution=16, channels=1, batch=BATCH),
        step=Adversarial(
            generator=PlayerSettings(dcgan.Generator(latent=6, width=4)),
            discriminator=PlayerSettings(mlp.Discriminator((4, 6)), Adam(lr=1e-3)),
            r1=r1,
            r1_every=every,
        ),
        length=Length(steps=10),
    )
    return session.start(recipe, RANKS, FP32, Compiler(False, "test"), 80)


def test_the_penalty_comes_every_so_many_iterations_and_its_mean_is_over_those():
    live, stats, seen = started(2.0, 3), Stats(RANKS), []
    for i in range(7):
        values = live.step(Batch(pictures()[:BATCH], None, live.clock.position_N()[:6]))
        if "discriminator/r1" in values:
            seen.append((i, float(values["discriminator/r1"])))
        stats.add(values)
        live.clock.advance()
    assert [i for i, _ in seen] == [0, 3, 6]
    assert stats.read()["discriminator/r1"] == pytest.approx(sum(v for _, v in seen) / 3)


def test_rehearsing_shows_both_kinds_of_iteration_from_any_place_of_the_run(monkeypatch):
    live = started(2.0, 4)
    live.clock.seek(2 * BATCH)
    reported = []
    plain = live.step
    live.step = lambda batch: reported.append(plain(batch)) or reported[-1]
    with live.rehearsing():
        live.rehearse(Batch(pictures(), None, torch.arange(6)))
    assert ["discriminator/r1" in values for values in reported] == [True, False]
    assert live.clock.images == int(live.clock.device_images) == 2 * BATCH


NO_CLASSES = ["--generator.classes", "0", "--discriminator.classes", "0"]


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("dcgan_digits", ["--r1", "-1"], "--r1 -1.0 must not be negative"),
        ("dcgan_digits", ["--r1-every", "0"], "--r1-every 0 must be at least 1"),
        ("dcgan_digits", ["--augment", "color", "color"], "name each kind once"),
        ("dcgan_digits", ["--loss", "wasserstein"], "needs a critic that is bounded"),
        ("dcgan_cifar10", ["--gp", "10"], "--gp needs a discriminator without BatchNorm"),
        ("cgan_mnist", NO_CLASSES, "--generator.classes 0 is no size"),
        ("cgan_mnist", ["--data.without", "8"], "is for models that are not told the class"),
        ("cgan_mnist", ["--generator.classes", "5"], "--discriminator.classes alike"),
    ],
)
def test_settings_that_cannot_be_are_refused(name, flags, said, tmp_path, capsys):
    flags = [*flags, "--data.name", "digits", "--runs", str(tmp_path), "--compile", "off"]
    with pytest.raises(SystemExit, match="2"):
        main([name, *flags])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error
    assert not list(tmp_path.rglob("checkpoints"))


@pytest.mark.slow
@pytest.mark.repeated
def test_two_ranks_compile_it_whole_although_ddp_has_many_buckets(tmp_path):
    name, states = "dcgan_digits", []
    flags = ["--r1", "5", "--r1-every", "2", "--steps", "4", "--precision", "fp32", *QUICK]
    flags += ["--discriminator.channels", "64", "256"]  # 1.6 MB: above DDP's first bucket
    for compiled in ("off", "required"):
        runs = ["--runs", str(tmp_path / compiled), "--compile", compiled]
        train(name, *flags, *runs, ranks=2, SADDLE_BUCKET_MB="1")
        states.append(final_state(run_folder(tmp_path / compiled, name)))
    for path, value in states[0].items():
        torch.testing.assert_close(states[1][path], value, rtol=1e-3, atol=1e-4, msg=path)
