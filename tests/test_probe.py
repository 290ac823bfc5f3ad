"""The probe: does it choose by what it measured, change nothing, and keep to it on resume?"""

import json
import time
from dataclasses import replace

import pytest
import torch

from engine import checkpoint, probe, session
from engine.compile import Compiler
from engine.precision import Precision
from engine.probe import Choice
from engine.train import main
from engine.world import Ranks
from tests.runs import QUICK, run_folder, toy

CPU = torch.device("cpu")
RANKS, FP32 = Ranks(0, 0, 1, CPU), Precision("fp32", "test", "cpu")


@pytest.fixture(autouse=True)
def a_long_run(monkeypatch):
    monkeypatch.setattr(probe, "WORTHWHILE_S", 0.0)
    monkeypatch.setattr(probe, "ROUNDS", 1)


@pytest.mark.parametrize(
    ("ms", "chosen"),
    [
        ({"usual": 100.0, "other": 99.0}, "usual"),
        ({"usual": 100.0, "other": 95.0}, "usual"),
        ({"usual": 100.0, "other": 80.0}, "other"),
        ({"usual": 100.0, "other": 120.0}, "usual"),
        ({"usual": 100.0, "other": 80.0, "third": 70.0}, "third"),
    ],
)
def test_the_usual_way_is_left_only_for_one_that_is_faster_beyond_noise(ms, chosen):
    assert probe.choice("x", ms).chosen == chosen


def test_ways_take_turns_and_the_first_round_does_not_count(monkeypatch):
    monkeypatch.setattr(probe, "ROUNDS", 3)
    order, pauses = [], {"a": iter([0.2, 0, 0, 0]), "b": iter([0.02] * 4)}

    def way(name: str):
        def run() -> None:
            order.append(name)
            time.sleep(next(pauses[name]))

        return run

    ms = probe.in_turns({"a": way("a"), "b": way("b")}, RANKS)
    assert order == ["a", "b"] * 4
    assert ms["a"] < 15 < ms["b"]


def test_what_takes_long_is_measured_in_few_rounds(monkeypatch):
    monkeypatch.setattr(probe, "ROUNDS", 100)
    calls = []
    probe.in_turns({"a": lambda: (calls.append(1), time.sleep(0.03))}, RANKS, 0.05)
    assert len(calls) == 2


def measured(name: str, **changes: object) -> list[Choice]:
    small = replace(toy(name, 4)[0], **changes)
    said: list[str] = []
    return probe.settings(small, RANKS, FP32, small.step.classes(), 1.0, said.append)


def test_what_is_left_open_is_measured():
    found = measured("dcgan_celeba", convolutions="library")[0]
    assert found.what == "memory_format" and list(found.ms) == ["channels_last", "contiguous"]
    assert all(ms > 0 for ms in found.ms.values())
    settled = {"memory_format": "contiguous", "convolutions": "library"}
    assert not measured("dcgan_celeba", **settled)
    assert not measured("dcgan_celeba", probe="off")


def test_what_makes_no_difference_is_not_measured():
    assert not measured("vae_mnist")  # no convolution
    order = measured("pix2pix_facades", convolutions="library")
    assert not order  # its networks go channel by channel in any case


def test_micro_batches_left_open_are_measured():
    (found,) = measured("vae_mnist", batch_per_rank="auto", accumulate=2)
    assert found.what == probe.PARTS and list(found.ms) == ["2", "4"]  # of 4 images
    small = replace(toy("vae_mnist", 4)[0], batch_per_rank="auto")
    assert probe.applied(small, [Choice(probe.PARTS, {}, "4")]).accumulate == 4
    assert not measured("vae_mnist", batch_per_rank="auto", accumulate=4)  # one image each


def test_a_run_has_the_micro_batches_that_were_measured_and_keeps_them(
    monkeypatch, tmp_path, capsys
):
    times = iter([{"1": 100.0, "2": 50.0, "4": 60.0}])
    monkeypatch.setattr(probe, "in_turns", lambda *_: next(times))
    flags = [*toy("vae_mnist", 8)[1], *QUICK, "--runs", str(tmp_path), "--compile", "off"]
    for steps in "12":
        assert main(["vae_mnist", *flags, "--batch-per-rank", "auto", "--steps", steps]) == 0
    first, second = capsys.readouterr().out.split("micro-batches: 2 (")[1:]
    assert "measured: 1 100 ms, 2 50 ms, 4 60 ms" in first and second.startswith("as when")


def test_a_network_that_is_spread_over_ranks_is_not_measured_by_one():
    small = replace(toy("dcgan_celeba", 4)[0], convolutions="library")
    two = Ranks(0, 0, 2, CPU)
    for way, count in (("fsdp2", 0), ("ddp", 1)):
        found = probe.settings(replace(small, parallel=way), two, FP32, 0, 1.0, [].append)
        assert len(found) == count


def test_where_memory_is_short_the_usual_is_taken(monkeypatch):
    def short(*_args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(probe, "in_turns", short)
    said: list[str] = []
    assert not probe.settings(toy("dcgan_celeba", 4)[0], RANKS, FP32, 0, 1.0, said.append)
    assert "no memory" in said[-1]


def test_a_short_run_is_not_measured(monkeypatch):
    monkeypatch.setattr(probe, "WORTHWHILE_S", 600.0)
    assert not measured("dcgan_celeba")


def test_found_ways_fill_in_what_was_left_to_auto_alone():
    small, found = toy("dcgan_celeba", 4)[0], [Choice("memory_format", {}, "contiguous")]
    assert probe.applied(small, found).memory_format == "contiguous"
    asked = replace(small, memory_format="channels_last")
    assert probe.applied(asked, [*found, Choice("compile x", {}, "eager")]) == asked


@pytest.mark.parametrize("name", ["dcgan_celeba", "wgan_gp_celeba", "srgan_x4", "vae_celeba"])
def test_both_formats_compute_the_same(name):
    states, orders = [], []
    for way in ("channels_last", "contiguous"):
        small = replace(toy(name, 4)[0], memory_format=way)
        live = session.start(small, RANKS, FP32, Compiler(False, "test"), 100)
        batch = probe._noise(live)
        live.step(replace(batch, position_N=live.clock.position_N()))
        states.append(checkpoint.shared_tensors(live))
        weights = [p for x in live.players.values() for p in x.parameters if p.ndim == 4]
        orders.append(all(p.is_contiguous() for p in weights))
    assert orders == [False, True]
    for path, value in states[0].items():
        torch.testing.assert_close(states[1][path], value, rtol=1e-3, atol=2e-3, msg=path)


def slow(seconds: float):
    """In place of torch.compile: the function itself, and some time."""

    def fake(fn, **_options):
        def compiled(*args):
            time.sleep(seconds if "generator" in getattr(fn, "func", fn).__name__ else 0.0)
            return fn(*args)

        return compiled

    return fake


def test_what_is_slower_compiled_runs_eager_and_nothing_else_changes(monkeypatch):
    monkeypatch.setattr(torch, "compile", slow(0.3))
    small = toy("dcgan_celeba", 4)[0]
    compiler = Compiler(True, "test")
    live = session.start(small, RANKS, FP32, compiler, 100)
    batch = replace(probe._noise(live), position_N=live.clock.position_N())
    live.step(batch)
    live.clock.advance()
    before = [t.clone() for t in (*live.state_tensors(), live.clock.device_images)]
    found = probe.compilation(live, compiler, batch)
    assert {c.what: c.chosen for c in found if "generator_update" in c.what} == {
        "compile generator_update": "eager"
    }
    assert "compile discriminator_update" in {c.what for c in found if c.chosen == "compiled"}
    assert found[-1].what == probe.TOGETHER
    assert "generator_update" in compiler.kept_eager == probe.kept_eager(found)
    after = (*live.state_tensors(), live.clock.device_images)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    generator_update = next(f for f, n in compiler.units.items() if n == "generator_update")
    assert compiler(generator_update) is generator_update


def test_all_run_eager_where_that_is_faster_than_what_was_chosen():
    ms = {"compiled": 2.0, "eager": 1.0}
    one, other = Choice("compile a", ms, "eager"), Choice("compile b", ms, "compiled")
    assert probe.kept_eager([one, other]) == {"a"}
    assert probe.kept_eager([one, other, Choice(probe.TOGETHER, ms, "compiled")]) == {"a"}
    assert probe.kept_eager([one, other, Choice(probe.TOGETHER, ms, "eager")]) == {"a", "b"}


def test_a_run_keeps_what_was_measured_when_it_began(tmp_path, capsys):
    flags = [*toy("dcgan_celeba", 8)[1], *QUICK, "--runs", str(tmp_path), "--compile", "off"]
    assert main(["dcgan_celeba", *flags, "--steps", "1"]) == 0
    folder = run_folder(tmp_path, "dcgan_celeba")
    entry = json.loads((folder / probe.FILE).read_text())[0]
    assert "memory format: " + entry["chosen"] in capsys.readouterr().out
    chosen = json.loads((folder / "recipe.json").read_text())["resolved"]["memory_format"]
    assert chosen[0] == entry["chosen"] and "measured" in chosen[1]
    probe.write(
        folder, [Choice("memory_format", {"channels_last": 9, "contiguous": 1}, "contiguous")]
    )
    assert main(["dcgan_celeba", *flags, "--steps", "2"]) == 0
    assert "memory format: contiguous (measured: channels_last 9 ms" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{", '[{"what": 1}]', "[1]"])
def test_a_damaged_table_is_told_and_the_run_goes_on(content, tmp_path, capsys):
    assert probe.read(tmp_path) == []
    flags = [*toy("dcgan_celeba", 8)[1], *QUICK, "--runs", str(tmp_path), "--compile", "off"]
    assert main(["dcgan_celeba", *flags, "--steps", "1"]) == 0
    (run_folder(tmp_path, "dcgan_celeba") / probe.FILE).write_text(content)
    assert main(["dcgan_celeba", *flags, "--steps", "2"]) == 0
    assert "probe.json is damaged: the usual ways" in "".join(capsys.readouterr())
