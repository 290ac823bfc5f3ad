"""The model of scaling: its bytes are those of real runs, its times those of the formulas."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from bench.bench_scaling import link, split
from engine import recipe
from engine.describe import cost
from launch import scaling
from launch.links import H100, all_reduce, chain, local, ring, tree
from launch.scaling import communication, compute_seconds, main
from launch.volume import Gradient, Update, Work, trace
from tests.runs import ROOT, environment

pytestmark = pytest.mark.timeout(900)  # the first to ask for real runs waits for all of them
MIB = 2**20
SYNCHRONISED = "dcgan_celeba --sync-bn on"
ACCUMULATED = "dcgan_digits --accumulate 2"
SMALL = "--data.resolution 32 --data.load 32"
NARROW = f"{SMALL} --encoders.width 8 --encoders.side 32 --encoders.words 20"
CHEAP = {
    "attngan_birds": f"{NARROW} --generator.width 4 --discriminators.width 4",
    "cyclegan_horse2zebra": f"{SMALL} --generators.width 8 --discriminators.width 8",
    "dalle_birds": "--autoencoder.width 32 --transformer.depth 2",
    "damsm_birds": NARROW,
    "inpaint_celeba": "--data.resolution 32 --generator.width 8 --discriminator.width 8",
    "pix2pix_facades": f"{SMALL} --generator.width 8 --generator.depth 5",
    "progan_celeba": "--generator.width 64 --generator.base 1024 "
    "--discriminator.width 64 --discriminator.base 1024",
    "srgan_x4": "--generator.blocks 2 --generator.width 16 --discriminator.width 16",
    "style_transfer": f"{SMALL} --styler.width 8",
}
"""What some recipes are cut down by, for the time's sake."""
RUNS = [" ".join([name, *CHEAP.get(name, "").split()]) for name in recipe.names()]
RUNS += [SYNCHRONISED, ACCUMULATED]
IMAGES = 4
"""Of each rank."""


def few() -> list[str]:
    """A run of each algorithm, and what is special; the others are much like them."""
    kinds = {type(recipe.load(run.split()[0]).step): run for run in reversed(RUNS)}
    return [*kinds.values(), "wgan_mnist", SYNCHRONISED, ACCUMULATED]


FEW = tuple(dict.fromkeys(few()))
OTHERS = tuple(run for run in RUNS if run not in FEW)
REPEATED = [pytest.mark.slow, pytest.mark.repeated]
MARKED = [*FEW, *(pytest.param(run, marks=REPEATED) for run in OTHERS)]


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Callable[[str], list[list]]:
    """Of a run: what a period of iterations of two real ranks reduces, [kind, bytes] in order."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

    @cache
    def counted(runs: tuple[str, ...]) -> dict[str, list[list]]:
        done = subprocess.run(
            [
                sys.executable,
                *launch,
                "-m",
                "tests.counted",
                tmp_path_factory.mktemp("runs"),
                *runs,
            ],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=850,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return lambda run: counted(FEW if run in FEW else OTHERS)[run]


def modelled(run: str) -> Work:
    name, *flags = run.split()
    return trace(name, recipe.parse(name, flags).recipe, run == SYNCHRONISED)


@pytest.mark.parametrize("run", MARKED)
def test_bytes_are_those_of_a_real_run(real, run):
    work, found = modelled(run), dict.fromkeys(("moments", "flag"), 0)
    for kind, size in real(run):
        # moments are gathered, their gradients summed; the flag is the sum of 4 bytes
        kind = kind if "all_" not in kind else "flag" if size == 4 else "moments"
        found[kind] = found.get(kind, 0) + size / work.period
    assert found == pytest.approx(work.volume(IMAGES))
    own = recipe.load(run.split()[0])  # a codebook's sums, images for a pool
    shared = own.step.reduced() + own.step.gathered(own.data) > 0
    assert (found["moments"] > 0) == (shared or run == SYNCHRONISED)


@pytest.mark.parametrize("run", [run for run in MARKED if run != ACCUMULATED])
def test_buckets_are_those_of_a_real_run(real, run):
    work = modelled(run)
    for player in {update.player for update in work.updates}:
        buckets = [size for kind, size in real(run) if kind == player]
        updates = [update for update in work.updates if update.player == player]
        assert buckets == [b.size for u in updates for b in u.buckets(25 * MIB)]


def test_each_collective_of_synchronised_batchnorm_is_known(real):
    work = modelled(SYNCHRONISED)
    gathers = sorted(size for kind, size in real(SYNCHRONISED) if kind == "all_gather")
    sums = sorted(size for kind, size in real(SYNCHRONISED) if kind == "all_reduce" and size != 4)
    assert (gathers, sums) == (sorted(work.gathers), sorted(work.sums))


@pytest.mark.parametrize("name", ["dcgan_celeba", "dcgan_mnist", "vae_mnist"])
def test_flops_are_those_of_the_dry_run(name):
    given = recipe.load(name)
    assert trace(name, given).flops_per_image == cost(given).flops_per_image


def test_a_ring_moves_the_bytes_that_theory_says():
    assert ring(2) == (2, 1.0) and ring(8) == (14, 1.75)
    assert tree(16) == (8, 2.0) and chain(8) == (14, 2.0)
    here = local(1e9, 1e-4, 4)
    assert all_reduce(here, 10**9, 2) == pytest.approx(1 + 1e-4)
    assert all_reduce(here, 10**9, 4) == pytest.approx(1.5 + 3e-4)


def test_more_bytes_and_more_ranks_never_cost_less():
    sizes, ranks = [4, 10**3, 10**6, 10**8], [2, 4, 8, 16, 64, 1024]
    table = [[all_reduce(H100, size, n) for n in ranks] for size in sizes]
    for row in (*table, *zip(*table, strict=True)):
        assert list(row) == sorted(row)
    assert all_reduce(H100, 10**6, 1) == 0


def toy(*gradients: tuple[int, float], backward: float = 2.0) -> Work:
    """One update of 3 FLOPs per image, with gradients of (bytes, FLOPs until ready)."""
    update = Update("player", backward, tuple(Gradient(*g) for g in gradients))
    return Work("toy", 8, 1, 3.0, 1, (update,), (), ())


def test_a_bucket_that_is_ready_early_hides_behind_the_backward_pass():
    fast = replace(local(1e6, 0.0, 2), aside=True)
    both = toy((10**6, 1.0), (10**6, 2.0))  # 3 s of compute, so 1 s per FLOP; 1 s per bucket
    assert communication(both, fast, 2, 3.0, 10**6) == pytest.approx((1.0, 1.0))
    assert communication(both, fast, 2, 3.0, 10**7) == pytest.approx((0.0, 2.0))
    shared = replace(fast, aside=False)
    assert communication(both, shared, 2, 3.0, 10**6) == pytest.approx((0.0, 2.0))
    assert communication(both, fast, 1, 3.0, 10**6) == (0.0, 0.0)


def test_reductions_follow_one_another():
    fast = replace(local(1e6, 0.0, 2), aside=True)
    late = toy((3 * 10**6, 0.5), (10**6, 1.0))  # the first ends at 3.5, the backward pass at 2
    assert communication(late, fast, 2, 3.0, 10**6) == pytest.approx((1.5, 2.5))


def test_a_small_batch_meets_the_time_of_kernels():
    work = replace(toy((4, 1.0)), products=100)
    assert compute_seconds(work, 1, 1e12) == pytest.approx(6e-4)
    assert compute_seconds(work, 10**9, 1e12) == pytest.approx(3e-3)


def test_dcgan_64_on_a_node_exposes_less_than_a_twentieth():
    question = scaling.Question(recipes=("dcgan_celeba",), gpus=(8,))
    weak, strong = scaling.answer(question, "dcgan_celeba")
    assert (weak.batch, strong.batch) == (128, 16)
    assert 0 < weak.exposed_share < 0.05 < strong.exposed_share


def test_the_command_writes_table_plot_and_figures(tmp_path, capsys):
    places = [str(tmp_path / name) for name in ("plot.png", "figures.json")]
    names = ["dcgan_digits", "vae_mnist"]
    assert main([*names, "--gpus", "8", "64", "--plot", places[0], "--json", places[1]]) == 0
    assert "No measurement" in capsys.readouterr().out
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads((tmp_path / "figures.json").read_text())["predictions"]
    assert {(p["recipe"], p["gpus"]) for p in found} == {(n, g) for n in names for g in (8, 64)}
    assert all(0 < p["efficiency"] <= 1 for p in found)


@pytest.mark.parametrize(
    "flags", [["--images-per-s", "5"], ["--share", "0"], ["--gpus", "0"], ["no_such_recipe"]]
)
def test_a_wrong_question_is_refused_in_one_line(flags, capsys):
    assert main(flags) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_parts_of_a_measured_iteration_sum_up():
    turn = {
        "reduced": [[[0.1, 5.0]] * 3, [[0.1, 4.9]] * 3],
        "alone": [[[0.1, 4.0]] * 3, [[0.1, 3.0]] * 3],
    }
    found = split(turn)
    assert found["total"] == 5.0 and found["exposed"] == pytest.approx(1.0)
    assert found["idle"] == pytest.approx(0.5) and found["data"] == pytest.approx(0.1)
    parts = ("compute", "exposed", "data", "idle")
    assert sum(found[part] for part in parts) == pytest.approx(found["total"])


def test_a_link_is_found_from_its_times():
    times = {str(size): 1e-4 + size / 1e9 for size in (4, 2**16, 2**20, 2**24)}
    assert link([{"reductions": times}] * 3) == pytest.approx((1e9, 1e-4))
