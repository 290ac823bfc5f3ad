"""The sampler: rows of skipped images, and classes shown equally often."""

import numpy as np
import pytest
from PIL import Image

from pipelines.datasets import find
from pipelines.images import BadImage
from pipelines.order import Balanced, Order
from pipelines.settings import Data
from tests.batches import clock_of, opened, some


def test_a_bad_row_shows_the_next_good_one():
    plain, order = Order(6, 1), Order(6, 1)
    order.replace({2, 3})
    order.replace({5})
    assert order.shown.tolist() == [0, 1, 4, 4, 4, 0]
    positions = np.arange(40)
    assert np.array_equal(order.rows(positions), order.shown[plain.rows(positions)])
    with pytest.raises(BadImage, match="every image"):
        order.replace({0, 1, 4})


LABELS = np.array([0] * 70 + [1] * 20 + [2] * 3 + [7] * 1)


def test_classes_come_equally_often_in_every_run_of_their_number():
    order = Balanced(LABELS, 4)
    rows = order.rows(np.arange(94 * 5)).reshape(5, 94)
    for epoch in rows:
        blocks = LABELS[epoch][:92].reshape(-1, 4)
        assert (np.sort(blocks, 1) == [0, 1, 2, 7]).all()
        counts = np.bincount(epoch, minlength=94)
        assert counts[:70].max() == 1  # a large class repeats nothing in an epoch
        assert np.ptp(counts[70:90]) <= 1 and np.ptp(counts[90:93]) <= 1
    assert len({tuple(epoch) for epoch in rows}) == 5
    assert len(np.unique(rows[LABELS[rows] == 0])) > 50  # other parts of it in other epochs


def test_it_depends_on_the_position_alone():
    rows = Balanced(LABELS, 4).rows(np.arange(1000))
    fresh = Balanced(LABELS, 4)
    for start, count in ((900, 50), (3, 1), (93, 2)):
        wanted = rows[start : start + count]
        assert np.array_equal(fresh.rows(np.arange(start, start + count)), wanted)


@pytest.mark.parametrize("kind", ["resident", "torchvision"])
def test_a_run_shows_classes_equally_often(data, kind):
    for path in sorted((data.path / "class1").iterdir())[:8]:
        path.unlink()  # 11 of one class, 3 of the other
    balanced = Data(**{**vars(data), "balanced": True, "pipeline": kind})
    shown = np.concatenate([batch.labels_N.numpy() for batch in some(balanced, 7)])
    assert (np.bincount(shown) == 28).all()


def test_without_classes_it_is_refused(tmp_path):
    data = Data(name="tiles", path=tmp_path, resolution=8, balanced=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"--data\.balanced needs classes, which tiles has not"):
        opened(data, clock_of(data))
    assert find(data).labels is None
