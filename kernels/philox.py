"""Random numbers that are a function of (key, stream, image index), the same on every device.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3)
written as int64 tensor operations: no generator state, so a rank draws only its slice of the
global batch, a resumed run needs nothing restored, and the code traces into a compiled graph or a
CUDA graph. Products are taken in 16-bit halves, because signed overflow is undefined in the C++
that Inductor writes.

    counter = (index low, index high, block of four elements, stream)    key = (seed low, seed high)
"""

import math
import sys
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_MULTIPLIERS = np.array(MULTIPLIERS, np.uint64)[:, None, None]


def make_key(seed: int, salt: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Key of a run, 64 bits as int64 (), from a seed and a salt that names a fresh set of streams.

    A tensor and not a number: as a constant it would be compiled in, a new graph per seed.
    """
    words = np.random.SeedSequence([seed, salt]).generate_state(1, np.uint64)
    return torch.tensor(int(words.view(np.int64)[0]), dtype=torch.int64, device=device)


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for 32-bit unsigned values held in int64, without overflow."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: list[Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Four words of 32 random bits (int64 tensors) per counter; the tensors broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return [c0, c1, c2, c3]


def bits(key: Tensor, stream: int, index_N: Tensor, size: int) -> Tensor:
    """32 random bits as int64 (N, size) for each image index (int64 (N,)) of a stream."""
    if by_numpy(index_N):
        return torch.from_numpy(_words(key, stream, index_N, size).astype(np.int64))
    block = torch.arange(-(-size // 4), dtype=torch.int64, device=index_N.device)[None]
    index = index_N[:, None]
    zero = torch.zeros_like(index + block)
    counter = [(index & MASK) + zero, (index >> 32) + zero, block + zero, zero + stream]
    words = philox(counter, (key & MASK, (key >> 32) & MASK))
    return torch.stack(words, dim=2).flatten(1)[:, :size]


def by_numpy(index_N: Tensor) -> bool:
    """Whether these are eager draws on a CPU, where there is no graph to be captured."""
    return type(index_N) is Tensor and index_N.is_cpu and not torch.compiler.is_compiling()


def _words(key: Tensor, stream: int, index_N: Tensor, size: int) -> np.ndarray:
    """`bits` as uint32 for an eager draw on a CPU: there the hundreds of small tensor operations
    take ten times as long as the arithmetic."""
    count, blocks = len(index_N), -(-size // 4)
    counter = np.empty((4, count, blocks), np.uint32)
    counter[:2] = _halves(np.ascontiguousarray(index_N.numpy())[:, None])
    counter[2], counter[3] = np.arange(blocks), stream
    words, kept = counter[::2], counter[1::2]
    products = np.empty((2, *words.shape), np.uint64)
    for number, keys in enumerate(_round_keys(int(key))):
        low, high = _halves(np.multiply(words, _MULTIPLIERS, out=products[number % 2]))
        words = high[::-1] ^ kept
        words ^= keys
        kept = low[::-1]
    mixed = np.stack([words[0], kept[0], words[1], kept[1]], axis=2)
    return mixed.reshape(count, 4 * blocks)[:, :size]


def _halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Low and high 32 bits of 64-bit integers, as views."""
    both = x.view(np.uint32).reshape(*x.shape, 2)
    low = int(sys.byteorder == "big")
    return both[..., low], both[..., 1 - low]


@lru_cache(maxsize=16)
def _round_keys(key: int) -> list[np.ndarray]:
    """Of each round, uint32 (2, 1, 1)."""
    pair = np.array([key & MASK, key >> 32 & MASK], np.uint64)[:, None, None]
    step = np.array(WEYL, np.uint64)[:, None, None]
    return [(pair + number * step).astype(np.uint32) for number in range(ROUNDS)]


def uniform(key: Tensor, stream: int, index_N: Tensor, size: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 (N, size), with 24 random bits each."""
    return _integers(key, stream, index_N, size) * 2.0**-24


def _integers(key: Tensor, stream: int, index_N: Tensor, size: int) -> Tensor:
    """Uniform integers below 2**24, float32 (N, size)."""
    if by_numpy(index_N):
        return torch.from_numpy((_words(key, stream, index_N, size) >> 8).astype(np.float32))
    return (bits(key, stream, index_N, size) >> 8).float()


def normal(key: Tensor, stream: int, index_N: Tensor, size: int) -> Tensor:
    """Standard normal numbers, float32 (N, size), by Box and Muller (1958); the first ones of an
    image do not depend on how many are drawn."""
    integers = _integers(key, stream, index_N, size + size % 2)
    # (0, 1] for the logarithm, hence the + 1
    radius = torch.sqrt(-2.0 * torch.log((integers[:, 0::2] + 1) * 2.0**-24))
    angle = integers[:, 1::2] * (2.0 * math.pi * 2.0**-24)
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=2)
    return pairs.flatten(1)[:, :size]
