"""One iteration of DCGAN-64 at batch 64: the PyTorch tutorial's, ours eager, ours compiled; on a
GPU ours compiled and captured as a CUDA graph too.

    pytest bench/bench_step.py --benchmark-only

They take turns, so that whatever else the machine does falls on all of them; each row gives
images/s and the ratio to the tutorial in the same run. Compilation is excluded from all figures.
"""

import gc
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench.iterating import iterating, on_own_stream
from bench.side_by_side import Beside, interquartile, note, take_turns, timed
from bench.tutorial_dcgan import TutorialDCGAN
from engine import recipe, session, world
from engine.compile import Compiler, missing_toolchain
from engine.describe import cost
from engine.precision import choose_precision
from engine.start import begin
from engine.stats import synchronize
from engine.train import loop
from pipelines.batch import Batch
from pipelines.datasets import find

BATCH, WARM_UP, ROUNDS = 64, 3, 12
VARIANTS = ("tutorial", "eager", "compiled", "captured")


def small_dcgan():
    """dcgan_celeba at batch 64."""
    given = recipe.load("dcgan_celeba")
    return replace(given, data=replace(given.data, batch=BATCH))


def images(device, memory_format):
    """A batch of noise in [-1, 1]."""
    x_NCHW = torch.rand((BATCH, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return x_NCHW.to(device, memory_format=memory_format)


def tutorial(device):
    networks = session.build_networks(small_dcgan())
    baseline = TutorialDCGAN(*(n.to(device) for n in networks.values()))
    real_NCHW = images(device, torch.contiguous_format)
    return lambda: baseline.iteration(real_NCHW)


def ours(device, compiled, captured=False):
    on_own_stream(device, captured)
    ranks = world.Ranks(0, 0, 1, device)
    compiler = Compiler(compiled, "bench", required=True)
    precision = choose_precision("auto", device)
    live = session.start(small_dcgan(), ranks, precision, compiler, 10**6)
    real_NCHW = images(device, torch.channels_last)
    return iterating(live, Batch(real_NCHW, None, live.clock.position_N()), captured)


@pytest.fixture(scope="module")
def iterations(device):
    """The variants, and the seconds of each in rounds that take turns."""
    made = {"tutorial": tutorial(device), "eager": ours(device, False)}
    if device.type == "cuda" or not missing_toolchain():
        made["compiled"] = ours(device, True)
    if device.type == "cuda":
        made["captured"] = ours(device, True, captured=True)
    return made, take_turns("tutorial", made, ROUNDS, partial(timed, device=device), WARM_UP)


@pytest.mark.parametrize("variant", VARIANTS)
def bench_iteration(benchmark, iterations, device, row, variant):
    made, turns = iterations
    if variant not in made:
        pytest.skip(missing_toolchain() or "a CUDA graph needs a GPU")
    speed, ratio = BATCH / turns.median(variant), turns.ratio(variant)
    benchmark.extra_info |= {"images_per_s": speed, "ratio_to_tutorial": ratio}
    note(benchmark, turns.beside(variant, speed, "images/s"))
    row(f"dcgan-64 {variant:9} {speed:8.1f} images/s   {ratio:.2f} x tutorial")
    benchmark.pedantic(lambda: None, rounds=1)  # the figures are those above


def peak_bytes(run, device):
    """Largest amount of tensor memory that one iteration adds to what was held before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    held = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("variant", VARIANTS)
def bench_peak_memory(benchmark, iterations, device, row, variant):
    made, _ = iterations
    if variant not in made:
        pytest.skip(missing_toolchain() or "a CUDA graph needs a GPU")
    peaks = {name: peak_bytes(made[name], device) for name in ("tutorial", variant)}
    ratio = peaks[variant] / peaks["tutorial"]
    benchmark.extra_info |= {"peak_mib": peaks[variant] / 2**20, "ratio_to_tutorial": ratio}
    note(benchmark, Beside("tutorial", variant, "MiB", peaks[variant] / 2**20, 1 / ratio, None))
    row(f"dcgan-64 {variant:9} {peaks[variant] / 2**20:8.1f} MiB peak   {ratio:.2f} x tutorial")
    benchmark.pedantic(lambda: None, rounds=1)


def bench_loop_overhead(benchmark, device, row, tmp_path):
    """Share of the loop's wall time that is spent outside the step: data, clock, statistics,
    logging ticks, stop requests (the pictures and checkpoint at the run's end excluded)."""
    flags = ["--data.name", "synthetic", "--data.batch", str(BATCH), "--compile", "off"]
    flags += ["--runs", str(tmp_path), "--steps", "40", "--log-every", "0.64"]
    command = recipe.parse("dcgan_celeba", flags)
    t = begin(command, "dcgan_celeba", find(command.recipe.data), device, cost(command.recipe))
    inside, stepped, ends = [], t.session.step, []

    def timed_step(batch):
        began = time.perf_counter()
        values = stepped(batch)
        synchronize(device)
        ends.append(time.perf_counter())
        inside.append(ends[-1] - began)
        return values

    t.session.step = timed_step
    with t.exits:
        benchmark.pedantic(lambda: loop(t), rounds=1)
    share = 1 - sum(inside[1:]) / (ends[-1] - ends[0])
    benchmark.extra_info["share_outside_the_step"] = share
    wholes = zip(inside[1:], ends[1:], ends[:-1], strict=True)
    spread = interquartile([step / (end - start) for step, end, start in wholes])
    figures = "the step alone", "loop", "of the time", 1 - share, 1 - share, spread
    note(benchmark, Beside(*figures, floor=0.02))  # both are of the same iterations
    row(f"dcgan-64 loop overhead outside the step: {share:.1%}")
