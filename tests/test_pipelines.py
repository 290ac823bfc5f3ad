"""Pipelines: do every backend, rank and resumed run give the same batches, in one order?"""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import philox
from pipelines import resident
from pipelines.batch import Batch, Clock
from pipelines.datasets import find
from pipelines.finish import CORNER, FLIP, Finish, smaller
from pipelines.images import BadImage
from pipelines.open import open_pipeline
from pipelines.order import Order
from pipelines.pack import pack_path
from pipelines.settings import Data
from tests.batches import CPU, KEY, clock_of, opened, some


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    """Bit for bit."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.images_NCHW, b.images_NCHW)
        assert torch.equal(a.labels_N, b.labels_N)
        assert torch.equal(a.position_N, b.position_N)


# order and finish


def test_every_epoch_shows_every_row_once_in_its_own_order():
    order = Order(10, seed=1)
    epochs = order.rows(np.arange(40)).reshape(4, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert not np.array_equal(epochs, Order(10, seed=2).rows(np.arange(40)).reshape(4, 10))


def test_rows_depend_on_the_position_alone():
    rows = Order(7, seed=1).rows(np.arange(1000))
    fresh = Order(7, seed=1)
    for start, count in ((900, 50), (3, 1), (13, 2), (0, 30)):
        wanted = rows[start : start + count]
        assert np.array_equal(fresh.rows(np.arange(start, start + count)), wanted)


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 35])
def test_a_window_covers_and_keeps_its_length(count):
    order = Order(10, seed=1)
    rows = order.rows(np.arange(200))
    lengths = set()
    for position in range(60):
        start, window = order.window(position, count)
        assert start <= position and position + count <= start + len(window)
        assert np.array_equal(window, rows[start : start + len(window)])
        lengths.add(len(window))
    assert len(lengths) == 1


def finisher(data: Data, key: torch.Tensor = KEY) -> Finish:
    """The finishing step of a dataset."""
    return Finish(find(data), data, key, CPU)


def finished(images_NHWC: torch.Tensor, data: Data, position_N: torch.Tensor) -> Batch:
    """These very images, finished."""
    finish = finisher(data)
    finish.ready(Clock(len(images_NHWC), CPU, int(position_N[0])))
    return finish(images_NHWC, *[torch.arange(len(images_NHWC))] * 2, position_N)


def test_finish_matches_its_formula(data):
    images_NHWC = torch.randint(0, 256, (20, 12, 12, 3), dtype=torch.uint8)
    position_N = torch.arange(1000, 1020)
    mask_N = philox.uniform(KEY, FLIP, position_N, 1)[:, 0] < 0.5
    assert 4 < int(mask_N.sum()) < 16
    wanted = images_NHWC.clone()
    wanted[mask_N] = wanted[mask_N].flip(2)
    wanted = wanted.permute(0, 3, 1, 2)
    got = finished(images_NHWC, data, position_N).images_NCHW
    assert torch.equal(got, (wanted.float() - 127.5) * (1 / 127.5))
    assert torch.allclose(got, wanted / 127.5 - 1, atol=1e-7)
    assert got.is_contiguous(memory_format=torch.channels_last) and got.dtype == torch.float32
    plain = finished(images_NHWC, replace(data, flip=False), position_N).images_NCHW
    assert torch.equal(plain, (images_NHWC.permute(0, 3, 1, 2).float() - 127.5) * (1 / 127.5))


def test_a_random_square_is_cut_at_the_place_of_its_draw(data):
    data = replace(data, load=17, flip=False)
    images_NHWC = torch.randint(0, 256, (64, 17, 17, 3), dtype=torch.uint8)
    position_N = torch.arange(500, 564)
    finish = finisher(data)
    finish.ready(Clock(64, CPU, 500))
    rows_N = torch.arange(64) % 22
    got = finish(images_NHWC, torch.arange(64), rows_N, position_N).images_NCHW
    corner_N2 = (philox.uniform(KEY, CORNER, position_N, 2) * 6).long()
    assert corner_N2.min() == 0 and corner_N2.max() == 5  # every place is reached, none beyond
    for i, (top, left) in enumerate(corner_N2.tolist()):
        cut = images_NHWC[i, top : top + 12, left : left + 12].permute(2, 0, 1)
        assert torch.equal(got[i], (cut.float() - 127.5) * (1 / 127.5))


def test_a_rollback_draws_anew(data):
    """The session changes the key in place."""
    key, striped_NHWC = KEY.clone(), torch.zeros(20, 12, 12, 3, dtype=torch.uint8)
    striped_NHWC[:, :, 0] = 255
    finish, clock = finisher(data, key), Clock(20, CPU)
    shown = []
    for salt in (0, 1):
        key.copy_(philox.make_key(5, salt))
        finish.ready(clock)
        batch = finish(striped_NHWC, *[torch.arange(20)] * 2, clock.position_N())
        shown.append((batch.images_NCHW[:, 0, 0, 0] < 0).tolist())
        wanted = philox.uniform(philox.make_key(5, salt), FLIP, torch.arange(20), 1)[:, 0] < 0.5
        assert shown[-1] == wanted.tolist()
    assert shown[0] != shown[1]


def test_draws_do_not_depend_on_the_window(data, monkeypatch):
    whole = some(data, 30)
    monkeypatch.setattr("pipelines.finish.WINDOW", 1)
    assert_same(some(data, 30), whole)


def test_the_smaller_image_is_pillows_bicubic():
    ramp = np.random.default_rng(0).integers(0, 256, (1, 24, 24, 3), dtype=np.uint8)
    images_NCHW = torch.from_numpy(ramp).permute(0, 3, 1, 2).float().sub(127.5).div(127.5)
    got = smaller(images_NCHW, 4).mul(127.5).add(127.5).round()[0].permute(1, 2, 0).numpy()
    wanted = np.asarray(Image.fromarray(ramp[0]).resize((6, 6), Image.Resampling.BICUBIC))
    assert np.abs(got - wanted.astype(float)).max() <= 1


# the same batches everywhere


def test_a_batch_shows_the_rows_of_the_order(data):
    dataset, batches = find(data), some(data, 4)
    rows = Order(22, seed=3).rows(np.arange(32)).reshape(4, 8)
    for batch, row_N in zip(batches, rows, strict=True):
        wanted = torch.from_numpy(np.stack([dataset.decode(int(row)) for row in row_N]))
        wanted = finished(wanted, data, batch.position_N)
        assert torch.equal(batch.images_NCHW, wanted.images_NCHW)
        assert batch.labels_N.tolist() == dataset.labels[row_N].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_backends_agree_bit_for_bit(data, workers, monkeypatch):
    reference = some(replace(data, pipeline="torchvision", workers=workers), 7)
    assert_same(some(replace(data, pipeline="resident", workers=3), 7), reference)
    monkeypatch.setattr(resident, "fits", lambda *_: (False, "for the test"))
    assert_same(some(replace(data, pipeline="resident"), 7), reference)


@pytest.mark.parametrize("backend", ["resident", "mapped", "torchvision"])
def test_resume_is_exact_in_mid_epoch(data, backend, monkeypatch):
    if backend == "mapped":
        monkeypatch.setattr(resident, "fits", lambda *_: (False, "for the test"))
    data = replace(data, pipeline="torchvision" if backend == "torchvision" else "resident")
    whole = some(data, 9)
    assert_same(some(data, 5, images=4 * 8), whole[4:])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["resident", "torchvision"])
def test_seek_goes_anywhere_and_ready_may_be_repeated(data, kind, workers, monkeypatch):
    monkeypatch.setattr(resident, "WINDOW", 1)
    data = replace(data, pipeline=kind, workers=workers)
    whole = some(data, 12)
    clock = clock_of(data)
    pipeline = opened(data, clock)
    for place in (0, 9, 3, 4, 4, 11, 0):
        clock.seek(place * 8)
        pipeline.ready(clock)
        pipeline.ready(clock)
        assert_same([pipeline.batch(clock), pipeline.batch(clock)], [whole[place]] * 2)
    pipeline.close()


@pytest.mark.parametrize("kind", ["resident", "torchvision"])
def test_two_ranks_of_4_see_what_one_of_8_sees(data, kind):
    data = replace(data, pipeline=kind)
    halves = zip(some(data, 6, world=2), some(data, 6, rank=1, world=2), strict=True)
    for whole, (first, second) in zip(some(data, 6), halves, strict=True):
        for name in ("images_NCHW", "labels_N", "position_N"):
            both = torch.cat([getattr(first, name), getattr(second, name)])
            assert torch.equal(both, getattr(whole, name))


@pytest.mark.parametrize("kind", ["resident", "torchvision"])
def test_a_batch_may_be_larger_than_the_dataset(data, kind):
    data = replace(data, batch=50, pipeline=kind)
    for i, batch in enumerate(some(data, 3)):
        rows = Order(22, seed=3).rows(np.arange(50 * i, 50 * i + 50))
        assert batch.labels_N.tolist() == find(data).labels[rows].tolist()


def test_ranks_must_divide_the_batch(data):
    with pytest.raises(ValueError, match=r"data\.batch=8 does not divide by 3"):
        opened(data, clock_of(data, world=3))


def test_batch_without_ready_is_refused(data, monkeypatch):
    monkeypatch.setattr(resident, "WINDOW", 1)
    for kind in ("resident", "torchvision"):
        clock = clock_of(data)
        pipeline = opened(replace(data, pipeline=kind), clock)
        clock.seek(8000)
        with pytest.raises(AssertionError, match="call ready"):
            pipeline.batch(clock)


class Recorded(TorchDispatchMode):
    """Writes down the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Tensor:
        self.names.add(str(func).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["resident", "mapped", "torchvision"])
def test_batch_is_device_work_only(data, backend, monkeypatch):
    """On the meta device what reads a value, mixes devices or has a data-dependent shape fails."""
    if backend == "mapped":
        monkeypatch.setattr(resident, "fits", lambda *_: (False, "for the test"))
    data = replace(data, pipeline="torchvision" if backend == "torchvision" else "resident")
    clock = Clock(data.batch, torch.device("meta"))
    pipeline = opened(data, clock)
    pipeline.ready(clock)
    with Recorded() as recorded:
        batch = pipeline.batch(clock)
    assert {t.device.type for t in (batch.images_NCHW, batch.labels_N, batch.position_N)} == {
        "meta"
    }
    assert batch.images_NCHW.shape == (8, 3, 12, 12)
    syncs = (
        "_local_scalar_dense",
        "item",
        "nonzero",
        "lift_fresh",
        "copy_",
        "_pin_memory",
        "equal",
    )
    assert recorded.names and not [n for n in recorded.names if n.split(".")[0] in syncs]


def test_the_order_is_refreshed_in_place(data, monkeypatch):
    """A captured graph keeps reading the same addresses."""
    monkeypatch.setattr(resident, "WINDOW", 1)
    clock = clock_of(replace(data, pipeline="resident"))
    pipeline = opened(data, clock)
    before = [t.data_ptr() for t in (pipeline._rows, pipeline._device_start)]
    for _ in range(12):
        pipeline.ready(clock)
        pipeline.batch(clock)
        clock.advance()
    assert before == [t.data_ptr() for t in (pipeline._rows, pipeline._device_start)]
    assert pipeline._start > 0


# corrupt images


def cut(data: Data, name: str) -> str:
    """Truncate one image of the set; returns its path."""
    path = data.path / name
    path.write_bytes(path.read_bytes()[:200])
    return str(path)


@pytest.mark.parametrize(
    ("kind", "workers"), [("resident", 2), ("torchvision", 0), ("torchvision", 2)]
)
def test_a_corrupt_image_stops_the_run_and_is_named(data, kind, workers):
    name = cut(data, "class1/03.png")
    with pytest.raises(BadImage) as caught:
        some(replace(data, pipeline=kind, workers=workers), 6)
    assert str(caught.value).startswith(f"cannot decode {name}: OSError: ")
    assert caught.value.__cause__ is None or "DataLoader" not in repr(caught.value.__cause__)
    assert not list(data.cache.glob("*.npy*"))


def test_skipped_images_are_counted_and_backends_still_agree(data):
    names = [cut(data, "class0/02.png"), cut(data, "class1/21.png"), cut(data, "class1/19.png")]
    data = replace(data, on_error="skip")
    assert_same(
        some(replace(data, pipeline="torchvision"), 7), some(replace(data, pipeline="resident"), 7)
    )
    for kind in ("resident", "torchvision"):
        lines, clock = [], clock_of(data)
        pipeline = opened(replace(data, pipeline=kind), clock, lines.append)
        for _ in range(6):
            pipeline.ready(clock)
            clock.advance()
        assert pipeline.skipped == 3 and pipeline.images == 22
        told = [line for line in lines if "skipped" in line]
        assert all(sum(name in line for line in told) == 1 for name in names)
    about = json.loads(pack_path(find(data), data).with_suffix(".json").read_text())
    assert list(about["skipped"]) == ["1", "20", "21"] and about["count"] == 22
    with pytest.raises(BadImage, match="cannot decode"):  # the cache does not hide them from `stop`
        opened(replace(data, on_error="stop", pipeline="resident"), clock_of(data))


@pytest.mark.parametrize("kind", ["resident", "torchvision"])
def test_a_set_with_no_good_image_stops_even_so(data, kind):
    for path in data.path.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(BadImage, match="every image of folder is corrupt"):
        some(replace(data, on_error="skip", pipeline=kind), 1)


# the choice of a backend


def test_auto_says_what_it_chose(data, monkeypatch):
    pipeline = opened(data, clock_of(data))
    assert pipeline.name == "resident" and pipeline.choice.startswith("resident: 0.0 MB packed")
    asked = opened(replace(data, pipeline="torchvision"), clock_of(data))
    assert asked.choice == "torchvision: asked for by --data.pipeline torchvision"


# real datasets


@pytest.mark.parametrize("name", ["mnist", "celeba", "cifar10"])
def test_real_sets_through_both_backends(name, tmp_path):
    if not os.environ.get("SADDLE_DATA"):
        pytest.skip("SADDLE_DATA is not set: no real datasets")
    data = Data(name=name, resolution=32, cache=tmp_path, flip=True, workers=2)
    dataset, batches = find(data), []
    for kind in ("resident", "torchvision"):
        clock = clock_of(data, images=64 * 1000)
        one = replace(data, pipeline=kind)
        pipeline = open_pipeline(dataset, one, clock, 3, KEY, say=lambda _: None)
        pipeline.ready(clock)
        batches.append(pipeline.batch(clock))
        pipeline.close()
    assert torch.equal(batches[0].images_NCHW, batches[1].images_NCHW)
    assert batches[0].images_NCHW.std() > 0.2
