"""Archives: StyleGAN's zips, zips of folders, tar shards; what is refused, and how it is named."""

import multiprocessing
import os
import pickle
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipelines import archives
from pipelines.archives import ArchiveSet, holds_archives, open_archive
from pipelines.images import Fit
from pipelines.missing import DatasetMissing, NoSplit
from pipelines.settings import Data
from tests.archives import FIT, NAMES, png, shades, stylegan, write_tar, write_zip


@pytest.fixture
def opened(tmp_path):
    """Opens the archives at a path, with the lists kept in tmp_path/cache."""

    def call(path: Path, split: str = "train", fit: Fit = FIT) -> ArchiveSet:
        data = Data(name="folder", path=path, resolution=8, cache=tmp_path / "cache")
        return open_archive(data, split, fit)

    return call


@pytest.mark.parametrize("way", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_stylegan_zip(tmp_path, opened, way):
    labels = [[name, i % 3] for i, name in enumerate(NAMES)]
    dataset = opened(write_zip(tmp_path / "a.zip", stylegan(labels), way))
    assert dataset.labels.tolist() == [0, 1, 2, 0] and dataset.labels.dtype == np.int64
    assert dataset.classes == ("0", "1", "2") and shades(dataset) == [0, 10, 20, 30]
    assert dataset.describe(1) == f"{tmp_path}/a.zip: {NAMES[1]}" and not dataset.note
    content = dataset.encoded(2)
    assert content == png(20) and dataset.ends(2) == (len(content), content, content[-64:])
    with pytest.raises(NoSplit, match="no test images"):
        opened(tmp_path / "a.zip", "test")


def test_stylegan_zip_without_classes(tmp_path, opened):
    none = opened(write_zip(tmp_path / "none.zip", stylegan(None)))
    assert none.labels is None and none.classes == () and len(none) == 4  # 00000/ is no class
    vectors = [[name, [0.5, 1.0]] for name in NAMES]
    listed = opened(write_zip(tmp_path / "vectors.zip", stylegan(vectors)))
    assert listed.labels is None and "lists of numbers" in listed.note


def test_zip_of_an_image_folder(tmp_path, opened):
    members = {f"pets/{kind}/deep/{i}.png": png(i) for kind in ("cat", "dog") for i in (1, 2)}
    rubbish = {"__MACOSX/pets/cat/._1.png": b"", "pets/.DS_Store": b"", "pets/.t/1.png": b""}
    folders = {"pets/": b"", "pets/notes.txt": b"hello"}
    dataset = opened(write_zip(tmp_path / "a.zip", {**members, **rubbish, **folders}))
    assert dataset.classes == ("cat", "dog") and dataset.labels.tolist() == [0, 0, 1, 1]
    assert shades(dataset) == [1, 2, 1, 2]
    flat = opened(write_zip(tmp_path / "flat.zip", {"b.png": png(2), "a.png": png(1)}))
    assert flat.labels is None and shades(flat) == [1, 2]


def test_splits_by_name_by_folder_and_inside(tmp_path, opened):
    train = {"x/1.png": png(1), "y/2.png": png(2)}
    test = {"x/3.png": png(3), "y/4.png": png(4), "y/5.png": png(5)}
    write_zip(tmp_path / "named" / "train64.zip", train)
    write_zip(tmp_path / "named" / "my-val.zip", test)
    write_zip(tmp_path / "named" / "more.zip", {"6.png": png(6)})
    write_tar(tmp_path / "folders" / "train" / "0.tar", train)
    write_tar(tmp_path / "folders" / "test" / "0.tar", test)
    inside = {f"a/train/{name}": content for name, content in train.items()}
    inside |= {f"a/test/{name}": content for name, content in test.items()}
    write_zip(tmp_path / "inside.zip", inside)
    for path in ("named", "named/train64.zip", "folders", "inside.zip"):
        assert holds_archives(tmp_path / path)
        one, two = opened(tmp_path / path), opened(tmp_path / path, "test")
        assert shades(one) == [1, 2] and one.labels.tolist() == [0, 1], path
        assert shades(two) == [3, 4, 5] and two.labels.tolist() == [0, 1, 1], path
        assert one.classes == two.classes == ("x", "y")
        assert one.fingerprint() != two.fingerprint()
    assert opened(tmp_path / "named").note.startswith("1 archives whose names say neither")
    (tmp_path / "folders" / "train" / "deep").mkdir()
    (tmp_path / "folders" / "train" / "deep" / "1.png").write_bytes(png(1))
    assert not holds_archives(tmp_path / "folders")  # an image folder with its archive in it
    assert not holds_archives(tmp_path / "nothing")


def test_nothing_to_be_found(tmp_path, opened):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetMissing, match=r"looked for: \*\.zip or \*\.tar"):
        opened(tmp_path / "empty")
    with pytest.raises(DatasetMissing, match=r"looked for: images \(\.jpg"):
        opened(write_zip(tmp_path / "a.zip", {"readme.md": b"hello"}))
    with pytest.raises(DatasetMissing, match="looked for: images"):
        opened(write_tar(tmp_path / "a.tar", {}))


def webdataset(start: int, count: int) -> dict[str, bytes]:
    """Members of a shard: images with labels, captions and other things."""
    members: dict[str, bytes] = {}
    for i in range(start, start + count):
        members[f"./s{i:03}.cls"] = b"%d\n" % (i % 2)
        members[f"./s{i:03}.PNG"] = png(i)
        members[f"./s{i:03}.txt"] = f"Image number {'one' if i % 2 else 'two'}!".encode()
        members[f"./s{i:03}.json"] = b"{}"
    return members


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_shards(tmp_path, opened, form):
    write_tar(tmp_path / "set" / "a-train-000000.tar", webdataset(0, 3), form)
    write_tar(tmp_path / "set" / "a-train-000001.tar", webdataset(3, 2), form)
    extra = {"lone.cls": b"0", "s.d/" + 95 * "n" + ".jpg": png(200), "Makefile": b""}
    last = {**webdataset(5, 2), **extra, "s.d/" + 95 * "n" + ".cls": b"4"}
    last["s.d/" + 95 * "n" + ".txt"] = b"new"
    write_tar(tmp_path / "set" / "a-test-000000.tar", last, form)
    train, test = opened(tmp_path / "set"), opened(tmp_path / "set", "test")
    assert shades(train) == [0, 1, 2, 3, 4] and train.labels.tolist() == [0, 1, 0, 1, 0]
    assert shades(test) == [5, 6, 200] and test.labels.tolist() == [1, 0, 4]
    assert test.note == "1 samples without an image are left out" and len(test.classes) == 5
    assert train.describe(3).endswith("a-train-000001.tar: s003.PNG")
    assert train.captions.words == ("<end>", "image", "number", "two", "one", "new")
    assert test.captions.words == train.captions.words
    assert train.captions.tokens_NKL[1, 0, :4].tolist() == [1, 2, 4, 0]
    assert train.captions.tokens_NKL.shape == (5, 1, 18)
    assert test.captions.lengths_NK.tolist() == [[3], [3], [1]]


def test_an_archive_that_changes_under_a_run_is_named(tmp_path, opened):
    path = write_tar(tmp_path / "a.tar", {"a.png": png(1), "b.png": png(2)})
    dataset = opened(path)
    dataset.decode(0)
    os.utime(path, ns=(0, 0))
    with pytest.raises(OSError, match=r"a\.tar has changed since this run listed it"):
        dataset.decode(1)
    path.unlink()
    assert pickle.loads(pickle.dumps(dataset))._open == {}
    with pytest.raises(FileNotFoundError, match=r"a\.tar"):
        pickle.loads(pickle.dumps(dataset)).decode(0)


def test_an_impossible_crop_is_found_at_once(tmp_path, opened):
    path = write_zip(tmp_path / "a.zip", {"a.png": png(1)})
    with pytest.raises(ValueError, match=r"data\.crop=9 is larger than .*a\.zip: a\.png \(8x8\)"):
        opened(path, fit=Fit(8, 3, crop=9))


def digests(dataset: ArchiveSet) -> list[bytes]:
    """All content, in another process."""
    return [dataset.encoded(row) for row in range(len(dataset))]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_other_processes_read_the_same(tmp_path, opened, start):
    for i in range(3):
        write_tar(tmp_path / "set" / f"{i}.tar", {f"{j}.png": png(10 * i + j) for j in range(4)})
    dataset = opened(tmp_path / "set")
    here = digests(dataset)  # opens the files before the fork
    with multiprocessing.get_context(start).Pool(2) as pool:
        assert pool.map(digests, [dataset, dataset]) == [here, here]


def test_many_threads_and_more_shards_than_open_files(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(archives, "OPEN_FILES", 3)
    for i in range(12):
        write_zip(tmp_path / "set" / f"{i:02}.zip", {f"{j}.png": png(10 * i + j) for j in range(4)})
    dataset = opened(tmp_path / "set")
    rows = np.random.default_rng(0).integers(0, len(dataset), 2000).tolist()
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(dataset.encoded, rows))
    assert contents == [png(10 * (row // 4) + row % 4) for row in rows]
    dataset.encoded(0)
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_lists_are_kept_and_made_anew(tmp_path, opened, monkeypatch):
    path = write_tar(tmp_path / "a.tar", webdataset(0, 3))
    first = opened(path)
    (place,) = (tmp_path / "cache").iterdir()
    assert place.name.startswith("tar-1-") and place.suffix == ".npz"

    def forbidden(*_args: object) -> None:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.members._read_tar", forbidden)
        again = opened(path)
        assert again.fingerprint() == first.fingerprint() and shades(again) == [0, 1, 2]
        assert np.array_equal(again.captions.tokens_NKL, first.captions.tokens_NKL)
    whole = place.read_bytes()
    middle = len(whole) // 2
    broken = (
        whole[:middle],
        b"",
        whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
    )
    for content in broken:
        place.write_bytes(content)
        assert opened(path).fingerprint() == first.fingerprint()
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_fingerprint_follows_the_content(tmp_path, opened):
    labels = [[name, 0] for name in NAMES]
    path = write_zip(tmp_path / "a.zip", stylegan(labels))
    found = {opened(path).fingerprint(), opened(path).fingerprint()}
    assert len(found) == 1
    path = path.rename(tmp_path / "b.zip")
    found.add(opened(path).fingerprint())
    stamp = opened(path).stamp()
    os.utime(path, ns=(0, 9))  # as a copy's
    found.add(opened(path).fingerprint())
    assert opened(path).stamp() != stamp
    labels[0][1] = 1  # the size stays
    write_zip(path, stylegan(labels))
    found.add(opened(path).fingerprint())
    assert len(found) == 3


def test_sets_pickle_small(tmp_path, opened):
    members = {f"{i:05}.png": b"x" for i in range(2000)}
    dataset = opened(write_zip(tmp_path / "a.zip", members))
    assert len(pickle.dumps(dataset)) < 2000 * 60
