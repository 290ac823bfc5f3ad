"""What is compiled, in which precision, and why; the rehearsal that leaves no trace."""

import re
import shutil

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from engine import compile as boundary
from engine import session
from engine.compile import CompileError, Compiler, choose_compile, missing_toolchain, rehearse
from engine.describe import cost
from engine.networks import dcgan
from engine.precision import Precision, choose_precision
from engine.recipe import load
from engine.session import Session
from engine.settings import Length, PlayerSettings, Recipe
from engine.steps.adversarial import Adversarial
from engine.world import Ranks
from pipelines.batch import Batch
from pipelines.settings import Data
from tests.runs import QUICK, toy, train

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RANKS = Ranks(0, 0, 1, CPU)
LONG, SHORT = 1e18, 1e6  # FLOPs


@pytest.fixture
def toolchain(monkeypatch):
    """A machine that could compile."""
    monkeypatch.setattr(boundary, "missing_toolchain", lambda: "")


# compile


def test_off_is_off(toolchain):
    compiler = choose_compile("off", CPU, LONG, "")
    assert (compiler.active, compiler.reason) == (False, "as asked")


def test_auto_compiles_a_long_run_and_not_a_short_one(toolchain):
    long, short = (choose_compile("auto", CPU, flops, "") for flops in (LONG, SHORT))
    assert long.active and "min on this CPU" in long.reason
    assert not short.active and "too short to repay compiling" in short.reason


def test_auto_compiles_even_a_short_run_on_a_gpu(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    compiler = choose_compile("auto", CUDA, SHORT, "")
    assert (compiler.active, compiler.reason, compiler.required) == (True, "GPU", False)


def test_required_compiles_even_a_short_run(toolchain):
    compiler = choose_compile("required", CPU, SHORT, "")
    assert (compiler.active, compiler.required) == (True, True)


def test_without_a_compiler_a_run_is_eager_and_says_so_unless_it_is_required(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    compiler = choose_compile("auto", CPU, LONG, "")
    assert (compiler.active, compiler.reason) == (False, "no C++ compiler (install g++)")
    with pytest.raises(CompileError, match=r"compile=required, but no C\+\+ compiler"):
        choose_compile("required", CPU, LONG, "")


def test_without_python_headers_a_run_is_eager_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(boundary.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert missing_toolchain() == "no Python headers (install python3-dev)"
    assert choose_compile("auto", CPU, LONG, "").reason == missing_toolchain()
    (tmp_path / "Python.h").touch()
    assert missing_toolchain() == ""


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_an_obstacle_is_the_reason(device, toolchain):
    assert choose_compile("auto", device, LONG, "it communicates").reason == "it communicates"
    with pytest.raises(CompileError, match="it communicates"):
        choose_compile("required", device, LONG, "it communicates")


def test_an_inactive_compiler_gives_the_function_itself_and_notes_its_name():
    compiler = Compiler(False, "test")
    assert compiler(cost) is cost
    assert list(compiler.units.values()) == ["cost"]


def test_an_active_compiler_compiles_each_function_once_and_whole(monkeypatch):
    asked = []

    def fake(fn, **options):
        asked.append((fn, options))
        return lambda *args: ("compiled", *args)

    monkeypatch.setattr(torch, "compile", fake)
    compiler = Compiler(True, "test")
    assert compiler(cost)(1) == compiler(cost)(1) == ("compiled", 1)
    assert asked == [(cost, {"fullgraph": True, "dynamic": False})]
    compiler.fall_back("it failed")
    assert compiler(cost) is cost and compiler.reason == "it failed"


# precision


def test_fp16_on_a_cpu_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"precision=fp16 is for GPUs only.*--precision bf16"):
        choose_precision("fp16", CPU)
    assert choose_precision("fp16", CUDA).name == "fp16"


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_precision_that_was_asked_for_is_taken(name):
    assert choose_precision(name, CPU) == Precision(name, "as asked", "cpu")


@pytest.mark.parametrize(
    ("amx", "avx512", "name", "reason"),
    [
        (True, True, "bf16", "CPU with AMX"),
        (False, True, "bf16", "CPU with AVX512-BF16"),
        (False, False, "fp32", "CPU without bf16 instructions"),
    ],
)
def test_auto_takes_bf16_where_the_cpu_has_it(amx, avx512, name, reason, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert choose_precision("auto", CPU) == Precision(name, reason, "cpu")


@pytest.mark.parametrize(("has_it", "name"), [(True, "bf16"), (False, "fp32")])
def test_auto_takes_bf16_where_the_gpu_has_it(has_it, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "A GPU")
    assert choose_precision("auto", CUDA) == Precision(name, "A GPU", "cuda")


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_forward_passes_compute_in_the_chosen_dtype(name, dtype):
    precision = Precision(name, "test", "cpu")
    with precision.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
    assert precision.scaler() is None


def test_fp16_alone_scales_its_loss():
    assert Precision("fp16", "test", "cpu").scaler() is not None


# rehearsal


@pytest.fixture
def live() -> Session:
    """A toy adversarial session with BatchNorm and an average."""
    recipe = Recipe(
        data=Data(resolution=16, channels=1, batch=8),
        step=Adversarial(
            generator=PlayerSettings(dcgan.Generator(latent=6, width=4), ema_kimg=1),
            discriminator=PlayerSettings(dcgan.Discriminator(width=4)),
        ),
        length=Length(steps=10),
    )
    precision = Precision("fp32", "test", "cpu")
    return session.start(recipe, RANKS, precision, Compiler(False, "test"), 80)


def batch_of(live: Session) -> Batch:
    images = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(images, None, live.clock.position_N())


def everything(live: Session) -> list[Tensor]:
    """Copies of all tensors that training changes."""
    tensors = [live.clock.device_images, live.key]
    for player in live.players.values():
        tensors += [*player.network.state_dict().values(), player.bad_losses, player.bad_gradients]
        tensors += player.average.network.state_dict().values() if player.average else ()
        tensors += [t for state in player.optimizer.state.values() for t in state.values()]
    return [t.clone() for t in tensors]


def assert_untouched(live: Session, before: list[Tensor]) -> None:
    after = everything(live)
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    for player in live.players.values():
        assert all(p.grad is None and p.requires_grad for p in player.parameters)
        assert not player.rehearsing
        for module in player.network.modules():
            assert getattr(module, "track_running_stats", True)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_rehearsal_runs_both_updates_and_leaves_no_trace(live, steps_before):
    for _ in range(steps_before):
        live.step(batch_of(live))
        live.clock.advance()
    before, ran = everything(live), []
    with live.rehearsing():
        rehearse(
            lambda: ran.append(live.step(batch_of(live))),
            Compiler(True, "test"),
            RANKS,
            pytest.fail,
        )
    assert {"generator/loss", "discriminator/loss"} < set(ran[0])
    assert_untouched(live, before)
    live.step(batch_of(live))
    assert not all(torch.equal(a, b) for a, b in zip(everything(live), before, strict=False))


def failing(live: Session, error: Exception):
    """An iteration that fails within its second update, as a compiler would."""

    def fail(*args):
        raise error

    def iteration() -> None:
        generator = live.players["generator"]
        generator.shared.root.forward = fail
        try:
            live.step(batch_of(live))
        finally:
            del generator.shared.root.forward

    return iteration


def test_where_compilation_fails_the_run_goes_on_eager_and_says_why(live):
    compiler, said, before = Compiler(True, "test"), [], everything(live)
    iteration = failing(live, TorchDynamoException("no such op\nmany\nlines"))
    with live.rehearsing():
        rehearse(iteration, compiler, RANKS, said.append)
    assert not compiler.active
    assert said == ["compile: eager (compilation failed: no such op)"]
    assert_untouched(live, before)


def test_where_compilation_fails_but_is_required_the_run_ends(live):
    compiler = Compiler(True, "test", required=True)
    iteration = failing(live, TorchDynamoException("no such op"))
    with live.rehearsing(), pytest.raises(CompileError, match=r"compile=required.*no such op"):
        rehearse(iteration, compiler, RANKS, pytest.fail)


def test_an_error_that_is_not_the_compilers_is_not_hidden(live):
    iteration = failing(live, KeyError("mine"))
    with live.rehearsing(), pytest.raises(KeyError, match="mine"):
        rehearse(iteration, Compiler(True, "test"), RANKS, pytest.fail)


@pytest.mark.slow
def test_what_dynamo_cannot_trace_falls_back_for_real(live):
    def untraceable(network: nn.Module, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return network(x)

    compiler, said = Compiler(True, "test"), []
    network, x = nn.Linear(2, 2), torch.ones(1, 2)
    rehearse(lambda: compiler(untraceable)(network, x), compiler, RANKS, said.append)
    assert not compiler.active and len(said) == 1
    assert said[0].startswith("compile: eager (compilation failed: ")
    assert compiler(untraceable)(network, x).shape == (1, 2)


# cost


def test_the_cost_of_a_dense_autoencoder_is_two_flops_per_multiply_three_times_over():
    weights = 784 * 400 + 400 * 40 + 20 * 400 + 400 * 784
    counted = cost(load("vae_mnist"))
    forward = 2 * weights
    first = 2 * 784 * 400  # no gradient is taken with respect to the images
    assert counted.flops_per_image == 3 * forward - first
    assert counted.units == ("negative_elbo",)


def test_the_compile_units_of_an_adversarial_recipe_are_its_loss_functions():
    units = cost(load("dcgan_digits")).units
    assert set(units) == {"make_fakes", "discriminator_update", "generator_update"}


@pytest.mark.slow
def test_of_two_local_ranks_one_compiles_and_the_other_takes_its_cache(tmp_path):
    flags = [*toy("vae_mnist")[1], *QUICK, "--compile", "required", "--steps", "2"]
    flags += ["--runs", str(tmp_path)]
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    output = train("vae_mnist", *flags, ranks=2, **cache)
    counted = re.search(r"compiled in \d+ s: (\d+) graphs new, (\d+) from the cache", output)
    assert int(counted[1]) == int(counted[2]) > 0
