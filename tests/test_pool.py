"""Image pools: the reference's behaviour in distribution, and by position alone."""

import random

import torch

from engine.pool import exchanged
from kernels import philox

KEY, STREAM = philox.make_key(3), 9


def pooled(size: int, count: int, batch: int) -> tuple[list[int], list[int]]:
    """The numbers shown and those kept when images 0, 1, 2, ... pass in batches."""
    pool, held, shown = torch.full((size, 1, 1, 1), -1.0), torch.tensor(0), []
    for position_N in torch.arange(count).split(batch):
        images = position_N.float()[:, None, None, None]
        shown += exchanged(pool, held, images, KEY, STREAM, position_N).flatten().long().tolist()
        held += len(position_N)
    return shown, pool.flatten().long().tolist()


def reference(size: int, count: int) -> list[int]:
    """util/image_pool.py of the authors, on numbers."""
    pool, shown = [], []
    for image in range(count):
        if len(pool) < size:
            pool.append(image)
            shown.append(image)
        elif random.random() > 0.5:
            place = random.randint(0, size - 1)
            shown.append(pool[place])
            pool[place] = image
        else:
            shown.append(image)
    return shown


def ages(shown: list[int]) -> torch.Tensor:
    """How long ago each was new, once the pool is full: share of new ones, mean, ninth decile."""
    age = (torch.arange(len(shown)) - torch.tensor(shown))[1000:].float()
    return torch.stack([(age == 0).float().mean(), age.mean() / 50, age.quantile(0.9) / 50])


def test_it_shows_what_the_references_does_in_distribution():
    random.seed(0)
    mine, _ = pooled(50, 8_000, 8)
    theirs = ages(reference(50, 8_000))
    torch.testing.assert_close(ages(mine), theirs, rtol=0.1, atol=0.03)


def test_batches_change_nothing():
    assert pooled(10, 200, 1) == pooled(10, 200, 8)


def test_it_fills_first_and_every_image_is_shown_now_or_kept():
    shown, kept = pooled(10, 200, 3)
    assert shown[:10] == list(range(10))
    assert sorted(shown + kept) == sorted([*range(200), *range(10)])  # the first ten are both


def test_none_of_size_zero():
    assert pooled(0, 5, 2) == (list(range(5)), [])
