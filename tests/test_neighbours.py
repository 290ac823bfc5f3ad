"""Nearest training images: the right ones, the right figure, cheap, for any data."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.latents import between_pairs
from engine.monitors import Monitors
from engine.neighbours import Neighbours
from engine.originals import originals
from pipelines.datasets import find
from pipelines.pack import open_pack, pack_path
from pipelines.settings import Data
from pipelines.sources import ArraySet, Dataset

CPU = torch.device("cpu")


def opened(data: Data) -> tuple[Dataset, Neighbours]:
    dataset = find(data)
    return dataset, Neighbours(dataset, data, CPU)


def images_of(dataset: Dataset, rows: range) -> torch.Tensor:
    stored_NHWC = np.stack([dataset.decode(r) for r in rows])
    return torch.from_numpy(dataset.fit.shown(stored_NHWC)).float() / 127.5 - 1


@pytest.mark.parametrize(("channels", "resolution"), [(1, 8), (3, 32), (3, 48), (1, 64)])
def test_a_training_image_is_its_own_nearest(channels: int, resolution: int) -> None:
    dataset, neighbours = opened(Data("synthetic", resolution, channels))
    found = neighbours.nearest(images_of(dataset, range(100, 108)))
    assert found.row_NK[:, 0].tolist() == list(range(100, 108))
    assert found.distance_NK[:, 0].tolist() == [0.0] * 8
    assert (found.distance_NK.diff(dim=1) >= 0).all()
    assert neighbours.distance(found) == 0.0


def test_neighbours_are_those_of_a_full_search() -> None:
    dataset, neighbours = opened(Data("synthetic", 16, 3))
    sample_NCHW = torch.rand(5, 3, 16, 16) * 2 - 1
    found = neighbours.nearest(sample_NCHW)
    training_MD = images_of(dataset, range(len(neighbours))).flatten(1)
    quantised_ND = ((sample_NCHW + 1) * 127.5).round().flatten(1) / 127.5 - 1
    distance_NK, row_NK = torch.cdist(quantised_ND, training_MD).topk(4, largest=False)
    assert torch.equal(found.row_NK, row_NK)
    torch.testing.assert_close(found.distance_NK / 127.5, distance_NK, rtol=1e-4, atol=1e-4)


def test_unseen_images_measure_one_and_noise_more() -> None:
    data = Data("synthetic", 16, 3)
    _, neighbours = opened(data)
    unseen_NCHW = images_of(find(data, "test"), range(200, 264))
    assert 0.8 < neighbours.distance(neighbours.nearest(unseen_NCHW)) < 1.25
    noise_NCHW = torch.rand(8, 3, 16, 16) * 2 - 1
    assert neighbours.distance(neighbours.nearest(noise_NCHW)) > 2


def test_a_mirrored_copy_is_found_where_images_are_flipped() -> None:
    data = Data("synthetic", 16, 3, flip=True)
    dataset, neighbours = opened(data)
    copy_NCHW = images_of(dataset, range(7, 8)).flip(-1)
    found = neighbours.nearest(copy_NCHW)
    assert (found.row_NK[0, 0], found.distance_NK[0, 0], found.mirrored_NK[0, 0]) == (7, 0, True)
    unflipped = Neighbours(dataset, replace(data, flip=False), CPU)
    assert unflipped.nearest(copy_NCHW).distance_NK[0, 0] > 0


def test_the_packed_cache_serves_where_there_is_one(tmp_path: Path) -> None:
    data = Data("synthetic", 16, 3, cache=tmp_path)
    dataset = find(data)
    assert len(Neighbours(dataset, data, CPU)) == 2000  # decoded: only some
    open_pack(dataset, data, pack_path(dataset, data), say=print, progress=False)
    assert len(Neighbours(dataset, data, CPU)) == 4000


def test_no_figure_without_held_out_images() -> None:
    dataset, neighbours = opened(Data("digits", 8, 1))
    found = neighbours.nearest(images_of(dataset, range(8)))
    assert neighbours.distance(found) is None
    assert neighbours.picture(images_of(dataset, range(8)), found).size[0] > 300
    images_NCHW, label = originals(Data("digits", 8, 1), 0, 4)
    assert (tuple(images_NCHW.shape), label.split()[0]) == ((4, 1, 8, 8), "training")


def test_samples_that_are_not_finite_do_not_stop_a_run() -> None:
    _, neighbours = opened(Data("synthetic", 16, 3))
    found = neighbours.nearest(torch.full((8, 3, 16, 16), torch.nan))
    assert not np.isfinite(neighbours.distance(found))


def test_a_search_is_cheap(monkeypatch) -> None:
    monkeypatch.setattr("engine.neighbours.DECODED", 20_000)
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (20_000, 32, 32, 1), dtype=np.uint8)
    fit = find(Data("synthetic", 32, 1)).fit
    dataset = ArraySet("synthetic", "train", fit, None, (), "", pixels_NHWC)
    neighbours = Neighbours(dataset, Data("synthetic", 32, 1), CPU)
    assert len(neighbours) == 20_000
    took = []
    for _ in range(3):
        start = time.process_time()
        neighbours.nearest(torch.rand(64, 1, 32, 32))
        took.append(time.process_time() - start)
    assert min(took) < 0.3  # 0.04 s where this was written


def test_monitors_warn_once_of_memorising() -> None:
    monitors = Monitors()
    near, far = {"monitor/neighbour_distance": 0.4}, {"monitor/neighbour_distance": 0.9}
    assert monitors.warnings(1000, near) == []  # too early to tell
    (text,) = monitors.warnings(30_000, near)
    assert "memorising" in text and "40%" in text
    assert monitors.warnings(31_000, near) == []
    assert monitors.warnings(32_000, far) == []
    assert len(monitors.warnings(33_000, near)) == 1


def test_rows_between_pairs_have_both_ends() -> None:
    z_NL = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    path_NL = between_pairs(z_NL, 5)
    torch.testing.assert_close(path_NL[[0, 4, 5, 9]], z_NL, rtol=1e-4, atol=1e-5)


def test_a_test_split_that_cannot_be_used_costs_only_the_figure(monkeypatch) -> None:
    def fail(data: Data, split: str = "train") -> Dataset:
        raise OSError("the disk is gone")

    data = Data("synthetic", 16, 3)
    dataset = find(data)
    monkeypatch.setattr("engine.neighbours.find", fail)
    assert Neighbours(dataset, data, CPU).unseen is None
