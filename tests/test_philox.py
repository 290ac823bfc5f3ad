"""Philox: the published vectors, the statistics, and the same numbers from every slice."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import philox

KEY = philox.make_key(3)
MANY = torch.arange(20_000)
ONES = 0xFFFFFFFF
# Random123 1.14, tests/kat_vectors, lines "philox4x32 10": counter, key, result
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def reference(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's whole numbers, which cannot overflow (Salmon et al. 2011, 3.3)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & ONES, (p0 >> 32) ^ c3 ^ k1, p0 & ONES
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return c0, c1, c2, c3


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two sets of numbers of equal size; for independent ones its spread is 1 / sqrt(count)."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


# bits


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS, ids=["zeros", "ones", "pi"])
def test_the_published_vectors_are_met(counter, key, result):
    words = philox.philox([torch.tensor(c) for c in counter], tuple(torch.tensor(k) for k in key))
    assert tuple(int(w) for w in words) == result
    assert reference(counter, key) == result


@pytest.mark.parametrize("index", [0, 7, 2**31, 2**32 - 1, 2**32, 2**45 + 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bits_are_philox_of_index_block_stream_and_key(index, seed):
    key = philox.make_key(seed)
    words = philox.bits(key, 9, torch.tensor([index]), 10)[0].tolist()
    halves = (int(key) & ONES, (int(key) >> 32) & ONES)
    blocks = [reference((index & ONES, index >> 32, b, 9), halves) for b in range(3)]
    assert words == [word for block in blocks for word in block][:10]


def test_some_of_the_keys_that_are_tried_are_negative_as_int64():
    keys = [int(philox.make_key(seed)) for seed in (0, 1, 2)]
    assert min(keys) < 0 < max(keys)


def test_keys_differ_by_seed_and_by_salt():
    keys = {int(philox.make_key(seed, salt)) for seed in range(50) for salt in range(4)}
    assert len(keys) == 200
    assert int(philox.make_key(11, 2)) == int(philox.make_key(11, 2))


def test_every_bit_is_set_half_of_the_time():
    words = philox.bits(KEY, 1, MANY, 4)
    share = torch.stack([(words >> b & 1).double().mean() for b in range(32)])
    assert float((share - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(words.numel())
    assert int(words.min()) >= 0 and int(words.max()) <= ONES


def test_neighbouring_indices_differ_in_half_of_their_bits():
    words = philox.bits(KEY, 1, MANY, 4)
    changed = words[1:] ^ words[:-1]
    count = sum((changed >> b & 1).double().mean() for b in range(32))
    assert abs(float(count) - 16) < 0.05


# distributions


def test_uniform_numbers_are_uniform():
    numbers = philox.uniform(KEY, 1, MANY, 8).flatten().double()
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
    assert abs(float(numbers.mean()) - 0.5) < 4 / math.sqrt(12 * numbers.numel())
    assert abs(float(numbers.var()) - 1 / 12) < 1e-3
    assert stats.kstest(numbers.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("size", [1, 7, 8])
def test_normal_numbers_are_normal(size):
    numbers = philox.normal(KEY, 1, MANY, size).flatten().double().numpy()
    error = 1 / math.sqrt(numbers.size)
    assert abs(numbers.mean()) < 4 * error
    assert abs(numbers.var() - 1) < 4 * math.sqrt(2) * error
    assert abs(stats.skew(numbers)) < 4 * math.sqrt(6) * error
    assert abs(stats.kurtosis(numbers)) < 4 * math.sqrt(24) * error
    assert stats.kstest(numbers, "norm").pvalue > 1e-3


def test_a_shifted_distribution_would_not_pass():
    numbers = philox.normal(KEY, 1, MANY, 8).flatten().double().numpy()
    assert stats.kstest(numbers + 0.02, "norm").pvalue < 1e-3
    assert stats.kstest(numbers * 1.02, "norm").pvalue < 1e-3


@pytest.mark.parametrize("word", [0, 255, 256, ONES - 255, ONES])
def test_the_extreme_words_give_finite_normals_and_uniforms_below_one(word, monkeypatch):
    def extreme(key: Tensor, stream: int, index_N: Tensor, size: int) -> Tensor:
        return torch.full((len(index_N), size), word)

    monkeypatch.setattr(philox, "bits", extreme)
    assert philox.normal(KEY, 1, MANY[:2], 4).isfinite().all()
    numbers = philox.uniform(KEY, 1, MANY[:2], 4)
    assert (numbers >= 0).all() and (numbers < 1).all()


def test_shapes_and_dtypes_are_as_documented():
    for size in (1, 2, 5, 128):
        assert philox.normal(KEY, 1, MANY[:3], size).shape == (3, size)
        assert philox.uniform(KEY, 1, MANY[:3], size).shape == (3, size)
    assert philox.normal(KEY, 1, MANY[:3], 2).dtype == torch.float32
    assert philox.uniform(KEY, 1, MANY[:3], 2).dtype == torch.float32
    assert philox.bits(KEY, 1, MANY[:3], 2).dtype == torch.int64
    assert philox.normal(KEY, 1, MANY[:0], 2).shape == (0, 2)


# independence


@pytest.mark.parametrize("draw", [philox.uniform, philox.normal])
def test_other_streams_seeds_salts_and_indices_are_uncorrelated(draw):
    numbers = draw(KEY, 1, MANY, 4)
    others = {
        "stream": draw(KEY, 2, MANY, 4),
        "seed": draw(philox.make_key(4), 1, MANY, 4),
        "salt": draw(philox.make_key(3, 1), 1, MANY, 4),
        "index": draw(KEY, 1, MANY + 1, 4),
        "high word": draw(KEY, 1, MANY + 2**32, 4),
        "elements": numbers.roll(1, dims=1),
    }
    limit = 4.5 / math.sqrt(numbers.numel())
    for what, other in others.items():
        assert abs(correlation(numbers, other)) < limit, what
        assert abs(correlation(numbers.square(), other.square())) < limit, what
    assert correlation(numbers, draw(philox.make_key(3), 1, MANY, 4)) > 0.999


def test_no_word_of_one_stream_recurs_at_the_same_place_of_another():
    words = philox.bits(KEY, 1, MANY, 4)
    assert int((words == philox.bits(KEY, 2, MANY, 4)).sum()) <= 2


# slices


@pytest.mark.parametrize("draw", [philox.bits, philox.uniform, philox.normal])
@pytest.mark.parametrize("size", [5, 100])
def test_the_slices_of_ranks_are_the_whole(draw, size):
    whole = draw(KEY, 1, torch.arange(1000, 1024), size)
    for world in (2, 3, 4):
        share = 24 // world
        parts = [
            draw(KEY, 1, torch.arange(1000 + r * share, 1000 + (r + 1) * share), size)
            for r in range(world)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_an_image_keeps_its_numbers_wherever_it_stands_in_the_batch():
    order = torch.from_numpy(np.random.default_rng(0).permutation(64))
    whole = philox.normal(KEY, 1, torch.arange(64), 10)
    assert torch.equal(philox.normal(KEY, 1, order, 10), whole[order])


@pytest.mark.parametrize("draw", [philox.bits, philox.uniform])
def test_fewer_bits_or_uniforms_are_the_first_of_more(draw):
    whole = draw(KEY, 1, MANY[:50], 23)
    for size in (1, 4, 6, 22):
        assert torch.equal(draw(KEY, 1, MANY[:50], size), whole[:, :size])


def test_an_odd_number_of_normals_is_one_less_than_the_even_number():
    even = philox.normal(KEY, 1, MANY[:50], 8)
    assert torch.equal(philox.normal(KEY, 1, MANY[:50], 7), even[:, :7])


# devices and compilation


class NoReadback(TorchDispatchMode):
    """Fails where a value is brought to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert torch.Tag.data_dependent_output not in func.tags, f"{func} reads a value back"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_tensors(monkeypatch):
    """As on a GPU and in a compiled graph, where numpy has no part."""
    monkeypatch.setattr(philox, "by_numpy", lambda index_N: False)


def test_no_value_is_brought_to_the_host(on_tensors):
    with NoReadback():
        philox.normal(KEY, 1, MANY[:9], 7)
        philox.uniform(KEY, 1, MANY[:9], 7)
        with pytest.raises(AssertionError, match="reads a value back"):
            float(MANY[3])


def test_it_runs_on_the_meta_device():
    key = philox.make_key(1, device="meta")
    numbers = philox.normal(key, 1, torch.arange(6, device="meta"), 5)
    assert numbers.device.type == "meta" and numbers.shape == (6, 5)


@pytest.mark.parametrize("size", [1, 4, 10, 100])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("draw", [philox.bits, philox.uniform, philox.normal])
def test_numpy_and_tensors_give_the_same(monkeypatch, draw, seed, size):
    key, index_N = philox.make_key(seed), torch.cat([MANY[:9], 2**31 + MANY[:9], 2**45 + MANY[:9]])
    by_numpy = draw(key, 9, index_N, size)
    monkeypatch.setattr(philox, "by_numpy", lambda index_N: False)
    monkeypatch.setattr(philox, "_words", None)
    assert torch.equal(draw(key, 9, index_N, size), by_numpy)


def test_positions_need_not_lie_side_by_side():
    every, second = philox.bits(KEY, 9, MANY[:8], 5), philox.bits(KEY, 9, MANY[:8:2], 5)
    assert torch.equal(second, every[::2])


@pytest.mark.slow
def test_compiled_bits_equal_eager_ones_and_normals_nearly_so():
    def draw(key: Tensor, index_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bits = philox.bits(key, 1, index_N, 10)
        return bits, philox.uniform(key, 2, index_N, 10), philox.normal(key, 3, index_N, 10)

    compiled = torch.compile(draw, fullgraph=True, dynamic=False)
    for seed, first in ((3, 0), (4, 2**33)):
        key, index_N = philox.make_key(seed), torch.arange(first, first + 512)
        wanted, got = draw(key, index_N), compiled(key, index_N)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
        assert torch.allclose(got[2], wanted[2], rtol=0, atol=1e-6)
