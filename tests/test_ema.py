"""Moving average: a float64 hand computation, and a half-life that counts images."""

import pytest
import torch
from torch import nn

from engine.ema import Average


class Cell(nn.Module):
    """One weight, one float buffer and one integer buffer."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]))
        self.register_buffer("mean", torch.tensor([value]))
        self.register_buffer("count", torch.tensor(0))


def set_to(cell: Cell, value: float, count: int = 0) -> None:
    with torch.no_grad():
        cell.weight.fill_(value)
        cell.mean.fill_(-value)
        cell.count.fill_(count)


def follow(average: Average, images: int, batch: int) -> None:
    average.follow(torch.tensor(images), batch)


def test_it_matches_a_hand_computation_through_ramp_and_plateau():
    cell, batch = Cell(1.0), 16
    average = Average(cell, half_life_kimg=0.02)
    shadow, mean, images = 1.0, 1.0, 0
    for i in range(60):
        value = (i * 7 % 11) - 3.0
        set_to(cell, value, i)
        follow(average, images, batch)
        half_life = min(0.05 * (images + batch), 20.0)
        keep = 0.5 ** (batch / half_life)
        shadow = keep * shadow + (1 - keep) * value
        mean = keep * mean + (1 - keep) * -value
        images += batch
        assert average.network.weight.item() == pytest.approx(shadow, rel=1e-5, abs=1e-5)
        assert average.network.mean.item() == pytest.approx(mean, rel=1e-5, abs=1e-5)
        assert average.network.count.item() == i
    assert 0.05 * images > 20 > 0.05 * batch


def test_half_a_life_of_images_after_a_jump_the_shadow_is_half_way():
    cell = Cell(0.0)
    average = Average(cell, half_life_kimg=0.5)
    set_to(cell, 1.0)
    start = 20 * 500
    for images in range(start, start + 500, 10):
        follow(average, images, 10)
    assert average.network.weight.item() == pytest.approx(0.5, abs=1e-4)
    for images in range(start + 500, start + 1000, 10):
        follow(average, images, 10)
    assert average.network.weight.item() == pytest.approx(0.75, abs=1e-4)


def test_early_on_the_half_life_is_a_twentieth_of_the_images_seen():
    cell = Cell(0.0)
    average = Average(cell, half_life_kimg=100)
    set_to(cell, 1.0)
    follow(average, 990, 10)
    assert average.network.weight.item() == pytest.approx(1 - 0.5 ** (10 / 50), rel=1e-5)


def test_two_small_batches_weigh_as_much_as_one_large():
    cell = Cell(0.0)
    small, large = Average(cell, 0.5), Average(cell, 0.5)
    set_to(cell, 1.0)
    start = 20 * 500
    follow(small, start, 50)
    follow(small, start + 50, 50)
    follow(large, start, 100)
    assert small.network.weight.item() == pytest.approx(large.network.weight.item(), rel=1e-5)
    assert large.network.weight.item() == pytest.approx(1 - 0.5**0.2, rel=1e-5)


@pytest.mark.parametrize(("batch", "kimg"), [(64, 10), (64, 500), (8, 1000)])
def test_a_long_half_life_is_right_to_a_thousandth_in_float32(batch, kimg):
    cell = Cell(0.0)
    average = Average(cell, kimg)
    set_to(cell, 1.0)
    follow(average, 100_000_000, batch)
    exact = 1 - 0.5 ** (batch / (kimg * 1000))
    assert average.network.weight.item() == pytest.approx(exact, rel=1e-3)


def test_the_first_batch_of_a_run_takes_nearly_all_of_the_network():
    cell = Cell(0.0)
    average = Average(cell, 10)
    set_to(cell, 1.0)
    follow(average, 0, 64)
    assert average.network.weight.item() == pytest.approx(1 - 0.5**20, rel=1e-6)


def test_the_shadow_is_a_separate_network_in_eval_mode_without_gradients():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    average = Average(network, 1)
    assert network.training and not average.network[1].training
    assert not any(p.requires_grad for p in average.network.parameters())
    assert all(p.requires_grad for p in network.parameters())
    ours = {t.data_ptr() for t in average.network.state_dict().values()}
    assert not ours & {t.data_ptr() for t in network.state_dict().values()}


def test_running_statistics_are_averaged_and_their_count_is_copied():
    norm = nn.BatchNorm1d(2).train()
    average = Average(norm, 1)
    norm(torch.randn(8, 2) + 5)
    follow(average, 100_000, 500)
    weight = 1 - 0.5**0.5
    torch.testing.assert_close(average.network.running_mean, norm.running_mean * weight)
    torch.testing.assert_close(
        average.network.running_var, 1 + (norm.running_var - 1) * weight, rtol=1e-5, atol=1e-6
    )
    assert int(average.network.num_batches_tracked) == 1
