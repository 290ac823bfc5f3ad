"""Holes: as the authors' code draws them, functions of the position alone, never empty."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from engine import masks
from kernels import philox

KEY = philox.make_key(3)
STREAM = 12
LARGER = 8


def drawn(count: int, side: int, boxes: float, first: int = 0) -> torch.Tensor:
    position_N = torch.arange(first, first + count)
    return masks.draw(KEY, STREAM, position_N, (side, side), boxes)


def plain_strokes(rng: np.random.Generator, side: int) -> np.ndarray:
    """A mask by algorithm 1 with the ranges of the authors' code, drawn eight times larger by PIL,
    whose pen is up to a pixel wider than asked."""
    side *= LARGER
    picture = Image.new("L", (side, side))
    pen = ImageDraw.Draw(picture)
    mean = math.hypot(side, side) / 8
    for _ in range(rng.integers(1, 4)):
        least = 2 * math.pi / 5 - rng.uniform(0, 2 * math.pi / 15)
        largest = 2 * math.pi / 5 + rng.uniform(0, 2 * math.pi / 15)
        brush = rng.uniform(12 / 256, 40 / 256) * side
        x, y = rng.uniform(0, side, 2)
        for i in range(rng.integers(4, 12)):
            angle = rng.uniform(least, largest)
            angle = 2 * math.pi - angle if i % 2 == 0 else angle
            length = np.clip(rng.normal(mean, mean / 2), 0, 2 * mean)
            before = x, y
            x = float(np.clip(x + length * math.cos(angle), 0, side))
            y = float(np.clip(y + length * math.sin(angle), 0, side))
            pen.line([before, (x, y)], fill=1, width=round(brush))
            for cx, cy in (before, (x, y)):
                pen.ellipse(
                    [cx - brush / 2, cy - brush / 2, cx + brush / 2, cy + brush / 2], fill=1
                )
    hole = np.asarray(picture)[LARGER // 2 :: LARGER, LARGER // 2 :: LARGER] > 0
    hole = hole[:, ::-1] if rng.random() < 0.5 else hole
    return hole[::-1] if rng.random() < 0.5 else hole


def test_strokes_have_the_distribution_of_a_plain_reference():
    """Area, its deviation, and how often each part of the image is in a hole."""
    count, side = 600, 32
    rng = np.random.default_rng(0)
    plain = np.stack([plain_strokes(rng, side) for _ in range(count)]).astype(np.float64)
    ours = drawn(count, side, 0.0)[:, 0].double().numpy()
    area, wanted = ours.mean((1, 2)), plain.mean((1, 2))
    assert area.mean() == pytest.approx(wanted.mean(), rel=0.1)
    assert area.std() == pytest.approx(wanted.std(), rel=0.1)
    parts, wanted = (m.mean(0).reshape(4, 8, 4, 8).mean((1, 3)) for m in (ours, plain))
    assert np.abs(parts - wanted).max() < 0.04


def test_a_line_is_all_that_is_within_half_a_brush():
    """By hand, in float64: the distance of a pixel's middle from a line."""
    place = [torch.tensor([[v]]) for v in (3.2, 4.0, 11.7, 9.5)]
    y, x = torch.arange(16).view(-1, 1) + 0.5, torch.arange(16) + 0.5
    found = masks.squared_distance(x, y, (place[0], place[1]), (place[2], place[3]))[0, 0]
    start, end = np.array([3.2, 4.0]), np.array([11.7, 9.5])
    for row in range(16):
        for column in range(16):
            pixel = np.array([column + 0.5, row + 0.5])
            share = np.clip((pixel - start) @ (end - start) / ((end - start) @ (end - start)), 0, 1)
            wanted = ((pixel - start - share * (end - start)) ** 2).sum()
            assert found[row, column].item() == pytest.approx(wanted, abs=1e-4)


def test_boxes_have_sides_of_three_eighths_to_a_half_anywhere():
    holes = drawn(400, 64, 1.0)[:, 0]
    rows, columns = holes.any(2), holes.any(1)
    assert torch.equal(holes, rows[:, :, None] & columns[:, None, :])
    for axis in (rows, columns):
        sides = axis.sum(1)
        assert sides.min() == 24 and sides.max() == 32
        first = axis.float().argmax(1)
        assert first.min() <= 1 and (first + sides).max() >= 63
    turns = (rows[:, 1:] != rows[:, :-1]).sum(1)
    assert turns.max() <= 2  # one piece


def test_a_share_of_the_images_has_boxes():
    def are_boxes(holes):
        filled = holes.any(3, keepdim=True) & holes.any(2, keepdim=True)
        return (filled == holes).flatten(1).all(1).float().mean().item()

    assert are_boxes(drawn(800, 32, 0.5)) == pytest.approx(0.5, abs=0.06)
    assert are_boxes(drawn(800, 32, 0.25)) == pytest.approx(0.25, abs=0.06)
    assert are_boxes(drawn(100, 32, 0.0)) < 0.05


def test_a_hole_is_a_function_of_the_position():
    """So it is the same on any number of ranks, in any batch, and after a resume."""
    whole = drawn(16, 32, 0.5)
    assert torch.equal(torch.cat([drawn(8, 32, 0.5), drawn(8, 32, 0.5, first=8)]), whole)
    assert torch.equal(drawn(1, 32, 0.5, first=11)[0], whole[11])
    other = masks.draw(philox.make_key(4), STREAM, torch.arange(16), (32, 32), 0.5)
    assert not torch.equal(other, whole)
    assert whole.flatten(1).unique(dim=0).shape[0] == 16


def test_the_draws_of_a_graph_are_those_of_an_eager_cpu(monkeypatch):
    eager = drawn(8, 32, 0.5)
    monkeypatch.setattr(philox, "by_numpy", lambda index_N: False)
    assert torch.equal(drawn(8, 32, 0.5), eager)


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (12, 40)])
@pytest.mark.parametrize("boxes", [0.0, 1.0])
def test_no_image_is_without_a_hole_or_all_hole(size, boxes):
    holes = masks.draw(KEY, STREAM, torch.arange(500), size, boxes)
    assert holes.shape == (500, 1, *size) and holes.dtype == torch.bool
    assert holes.flatten(1).any(1).all()
    assert not holes.flatten(1).all(1).any()
