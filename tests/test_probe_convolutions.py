"""Convolutions as matrix products: measured as they are called, chosen by it, kept on resume?"""

import json
from dataclasses import replace

import pytest
import torch

from engine import checkpoint, probe, session
from engine.compile import Compiler
from engine.convolutions import calls
from engine.precision import Precision
from engine.probe import Choice
from engine.train import main
from engine.world import Ranks
from kernels.convolution_module import mappable
from tests.runs import QUICK, run_folder, toy

RANKS = Ranks(0, 0, 1, torch.device("cpu"))
FP32, BF16 = (Precision(name, "test", "cpu") for name in ("fp32", "bf16"))


@pytest.fixture(autouse=True)
def a_long_run(monkeypatch):
    monkeypatch.setattr(probe, "WORTHWHILE_S", 0.0)
    monkeypatch.setattr(probe, "ROUNDS", 1)


def started(name: str, precision: Precision = FP32, products=None, **changes) -> session.Session:
    recipe = replace(toy(name, 4)[0], **{"memory_format": "channels_last"} | changes)
    compiler = Compiler(False, "test")
    return session.start(recipe, RANKS, precision, compiler, 100, recipe.step.classes(), products)


@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["dcgan_celeba", "wgan_gp_cifar10", "srgan_x4"])
def test_each_layer_is_measured_as_it_is_called(name, precision):
    live = started(name, precision)
    found = calls(live, probe._noise(live))
    layers = {
        (player, where): layer
        for player, p in live.players.items()
        for where, layer in mappable(p.network).items()
    }
    assert set(found) == set(layers)
    for place, call in found.items():
        assert call.images == live.clock.batch and call.dtype == getattr(
            torch, {"fp32": "float32", "bf16": "bfloat16"}[precision.name]
        )
        small, large, kernel, _ = layers[place].weight.shape
        assert (call.small, call.large, call.geometry.kernel) == (small, large, kernel)
        for ways in call.ways(RANKS.device).values():
            library, product = (way().float() for way in ways.values())
            spread = float(library.abs().max())
            torch.testing.assert_close(product, library, rtol=0, atol=0.02 * spread)


def by_map(slow: str):
    """In place of a measurement: matrix products win, but for one map and for the whole."""

    def in_turns(ways, _ranks, _patience):
        function = getattr(next(iter(ways.values())), "func", None)
        wins = function is None or function.__name__ != slow
        return {way: 1.0 if (way == "matmul") == wins else 2.0 for way in ways}

    return in_turns


def test_only_what_is_faster_becomes_a_product(monkeypatch):
    monkeypatch.setattr(probe, "in_turns", by_map("up"))
    recipe = replace(toy("dcgan_celeba", 4)[0], memory_format="channels_last")
    found = probe.settings(recipe, RANKS, FP32, 0, 1.0, [].append)
    chosen = probe.products(found)
    assert probe.applied(recipe, found).convolutions == "matmul"
    live = started("dcgan_celeba", products=chosen, convolutions="matmul")
    for player in live.players.values():
        mapped = [m for m in player.network.modules() if hasattr(m, "matmul")]
        assert mapped and all(m.matmul == {"down", "outer"} for m in mapped)


def test_the_library_stays_where_no_map_gains_or_the_whole_does_not(monkeypatch):
    recipe = replace(toy("dcgan_celeba", 4)[0], memory_format="channels_last")
    slower = lambda ways, *_: {way: float(i) for i, way in enumerate(ways, 1)}  # noqa: E731
    monkeypatch.setattr(probe, "in_turns", slower)
    found = probe.settings(recipe, RANKS, FP32, 0, 1.0, [].append)
    assert found and probe.products(found) == {}
    assert probe.applied(recipe, found).convolutions == "auto"

    def whole_is_slower(ways, *rest):
        maps = hasattr(next(iter(ways.values())), "func")
        return (by_map("none") if maps else slower)(ways, *rest)

    monkeypatch.setattr(probe, "in_turns", whole_is_slower)
    found = probe.settings(recipe, RANKS, FP32, 0, 1.0, [].append)
    assert probe.products(found) and found[-1].chosen == "library"
    assert probe.applied(recipe, found).convolutions == "library"


@pytest.mark.parametrize(
    "name", ["dcgan_celeba", "wgan_gp_celeba", "cyclegan_horse2zebra", "vae_celeba"]
)
def test_products_train_as_the_library_does(name):
    states = []
    for way in ("library", "matmul"):
        live = started(name, convolutions=way)
        mapped = [
            m for p in live.players.values() for m in p.network.modules() if hasattr(m, "matmul")
        ]
        assert bool(mapped) == (way == "matmul")
        live.step(replace(probe._noise(live), position_N=live.clock.position_N()))
        states.append(checkpoint.shared_tensors(live))
    for path, value in states[0].items():
        torch.testing.assert_close(states[1][path], value, rtol=1e-3, atol=2e-3, msg=path)


def test_a_run_keeps_to_its_products(tmp_path, capsys, monkeypatch):
    flags = [*toy("dcgan_celeba", 8)[1], *QUICK, "--runs", str(tmp_path), "--compile", "off"]
    assert main(["dcgan_celeba", *flags, "--steps", "1"]) == 0
    folder = run_folder(tmp_path, "dcgan_celeba")
    entries = json.loads((folder / probe.FILE).read_text())
    assert {e["what"].rsplit(" ", 1)[1] for e in entries if e["what"].startswith("map ")} == {
        "down",
        "up",
        "outer",
    }
    one = Choice("map discriminator layers.2 outer", {"library": 2, "matmul": 1}, "matmul")
    probe.write(folder, [one, Choice("convolutions", {"library": 2, "matmul": 1}, "matmul")])
    given = []
    monkeypatch.setattr(session, "map_convolutions", lambda net, forms: given.append(forms) or net)
    assert main(["dcgan_celeba", *flags, "--steps", "2"]) == 0
    assert given == [{}, {"layers.2": frozenset({"outer"})}]
    assert "convolutions: matmul (measured: library 2 ms, matmul 1 ms)" in capsys.readouterr().out
