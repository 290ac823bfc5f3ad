"""LSUN: folders and LMDBs of categories."""

import multiprocessing
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipelines.images import BadImage, Fit
from pipelines.lsun import LmdbSet, open_lsun
from pipelines.missing import DatasetMissing, NoSplit
from pipelines.settings import Data
from pipelines.sources import EncodedSet
from tests.archives import png, shades


@pytest.fixture
def opened(tmp_path):
    """Opens tmp_path/lsun, or a path, with the lists kept in tmp_path/cache."""

    def call(split: str = "train", path: Path | None = None, fit: Fit | None = None) -> EncodedSet:
        data = Data(name="lsun", root=tmp_path, path=path, cache=tmp_path / "cache")
        return open_lsun(data, split, fit or Fit(8, 3))

    return call


def folder(path: Path, shades: list[int]) -> None:
    """Images in hashed folders."""
    for shade in shades:
        place = path / f"{shade % 3:x}" / f"{shade:x}" / f"{shade:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png(shade))


def database(path: Path, shades: list[int]) -> Path:
    """An LMDB of images, as LSUN is published."""
    lmdb = pytest.importorskip("lmdb")
    path.mkdir(parents=True)
    environment = lmdb.open(str(path), map_size=1 << 24)
    with environment, environment.begin(write=True) as transaction:
        for shade in shades:
            transaction.put(b"%040x" % shade, png(shade))
    return path


MAKERS = {"folders": (folder, ""), "databases": (database, "_lmdb")}


@pytest.mark.parametrize("kind", MAKERS)
def test_one_category_has_no_labels(tmp_path, opened, kind):
    make, end = MAKERS[kind]
    make(tmp_path / "lsun" / f"dining_room_train{end}", [1, 2, 3, 4, 5])
    make(tmp_path / "lsun" / f"dining_room_val{end}", [7])
    train = opened()
    assert sorted(shades(train)) == [1, 2, 3, 4, 5] and train.labels is None
    assert train.classes == () and train.note == "" and train.name == "lsun"
    assert shades(opened("test")) == [7]
    single = opened(path=tmp_path / "lsun" / f"dining_room_train{end}")
    assert single.fingerprint() == train.fingerprint() != opened("test").fingerprint()


@pytest.mark.parametrize("kind", MAKERS)
def test_several_categories_are_classes(tmp_path, opened, kind):
    make, end = MAKERS[kind]
    make(tmp_path / "lsun" / f"cat_train{end}", [1, 2])
    make(tmp_path / "lsun" / f"tower_train{end}", [3])
    make(tmp_path / "lsun" / f"tower_val{end}", [4, 5])
    (tmp_path / "lsun" / "test_lmdb").mkdir()
    train, test = opened(), opened("test")
    assert train.classes == test.classes == ("cat", "tower")
    assert sorted(zip(shades(train), train.labels.tolist(), strict=True)) == [
        (1, 0),
        (2, 0),
        (3, 1),
    ]
    assert test.labels.tolist() == [1, 1] and test.labels.dtype == np.int64
    assert test.note == "no test images of cat"
    alone = opened(path=tmp_path / "lsun" / f"cat_train{end}")
    assert alone.labels is None and len(alone) == 2


def test_nothing_to_be_found(tmp_path, opened):
    with pytest.raises(DatasetMissing, match="looked for: <category>_train/"):
        opened()
    (tmp_path / "lsun" / "cat_train").mkdir(parents=True)
    with pytest.raises(DatasetMissing, match=r"looked for: images .*\n.*lsun/cat_train"):
        opened()
    with pytest.raises(NoSplit, match="no <category>_val"):
        opened("test")
    (tmp_path / "lsun" / "cat_train").rename(tmp_path / "lsun" / "cat_train_lmdb")
    with pytest.raises(DatasetMissing, match=r"data\.mdb"):
        opened()


def test_folders_beside_databases_are_refused(tmp_path, opened):
    folder(tmp_path / "lsun" / "cat_train", [1])
    path = database(tmp_path / "lsun" / "cat_train_lmdb", [1])
    with pytest.raises(ValueError, match=r"cat_train, cat_train_lmdb.*move one kind away"):
        opened()
    assert isinstance(opened(path=path), LmdbSet) and len(opened(path=path.parent / "cat_train"))


def test_without_the_package_the_command_is_named(tmp_path, opened, monkeypatch):
    path = tmp_path / "lsun" / "cat_train_lmdb"
    path.mkdir(parents=True)
    (path / "data.mdb").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match=r"pip install 'saddle\[lsun\]'"):
        opened()


def test_damaged_databases_are_named(tmp_path, opened):
    path = database(tmp_path / "lsun" / "cat_train_lmdb", [1])
    (path / "data.mdb").write_bytes(b"hello" * 2000)
    with pytest.raises(BadImage, match=r"cat_train_lmdb/data\.mdb: .*"):
        opened()
    database(tmp_path / "lsun" / "dog_train_lmdb", [])
    with pytest.raises(BadImage, match="dog_train_lmdb: the database is empty"):
        opened(path=tmp_path / "lsun" / "dog_train_lmdb")


def contents(dataset: EncodedSet) -> list[bytes]:
    """All content, in another process."""
    return [dataset.encoded(row) for row in range(len(dataset))]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_processes_and_threads_read_the_same(tmp_path, opened, start):
    path = database(tmp_path / "lsun" / "cat_train_lmdb", list(range(50)))
    before = {p.name: p.stat().st_mtime_ns for p in path.iterdir()}
    dataset = opened()
    here = contents(dataset)
    assert here == [png(shade) for shade in range(50)]
    with multiprocessing.get_context(start).Pool(2) as pool:
        assert pool.map(contents, [dataset, dataset]) == [here, here]
    copy = pickle.loads(pickle.dumps(dataset))
    rows = np.random.default_rng(0).integers(0, 50, 1000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy.encoded, rows)) == [png(row) for row in rows]
    assert {p.name: p.stat().st_mtime_ns for p in path.iterdir()} == before  # nothing was written


def test_keys_are_kept_and_made_anew(tmp_path, opened, monkeypatch):
    database(tmp_path / "lsun" / "cat_train_lmdb", [1, 2, 3])
    first = opened().fingerprint()
    (place,) = (tmp_path / "cache").iterdir()

    def forbidden(*_args: object) -> None:
        raise AssertionError("listed again")

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.lsun._list_keys", forbidden)
        assert opened().fingerprint() == first
    place.write_bytes(place.read_bytes()[:-100])
    assert opened().fingerprint() == first


def test_a_database_that_changes_under_a_run_is_named(tmp_path, opened):
    path = database(tmp_path / "lsun" / "cat_train_lmdb", [1, 2, 3])
    dataset = opened()
    os.utime(path / "data.mdb", ns=(0, 0))
    with pytest.raises(OSError, match="cat_train_lmdb has changed since this run listed it"):
        dataset.decode(0)
    assert shades(opened()) == [1, 2, 3] and opened().stamp() != dataset.stamp()


@pytest.mark.parametrize("kind", MAKERS)
def test_an_impossible_crop_is_found_at_once(tmp_path, opened, kind):
    make, end = MAKERS[kind]
    make(tmp_path / "lsun" / f"cat_train{end}", [1])
    with pytest.raises(ValueError, match=r"data\.crop=9 is larger than .*cat_train"):
        opened(fit=Fit(8, 3, crop=9))
