"""Archives that are not to be read: each is refused in one sentence that names file and member."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from pipelines.archives import ArchiveSet, holds_archives, open_archive
from pipelines.images import BadImage, Fit
from pipelines.settings import Data
from tests.archives import FIT, NAMES, png, stylegan, write_tar, write_zip


@pytest.fixture
def opened(tmp_path):
    """Opens the archives at a path, with the lists kept in tmp_path/cache."""

    def call(path: Path, split: str = "train", fit: Fit = FIT) -> ArchiveSet:
        data = Data(name="folder", path=path, resolution=8, cache=tmp_path / "cache")
        return open_archive(data, split, fit)

    return call


@pytest.mark.parametrize("write", [write_zip, write_tar])
@pytest.mark.parametrize("name", ["../a.png", "x/../../a.png", "/a.png", "C:\\a.png", "x\\..\\a"])
def test_names_that_lead_out_are_refused(tmp_path, opened, write, name):
    kind = "zip" if write is write_zip else "tar"
    path = write(tmp_path / f"bad.{kind}", {"ok.png": png(1), name: png(2)})
    with pytest.raises(BadImage, match=rf"bad\.{kind}: .*a.*: .* leads out of the archive"):
        opened(path)


TARS = {
    "two members of this name": {"a.png": png(1), "./a.png": png(2)},
    "the sample has 2 images": {"a.png": png(1), "a.jpg": png(2)},
    r"a\.cls: the label 'cat' is not a whole number": {"a.png": png(1), "a.cls": b"cat"},
    r"a\.cls: the label '' is not": {"a.png": png(1), "a.cls": b""},
    r"a\.cls: the label '1\.5' is not": {"a.png": png(1), "a.cls": b"1.5"},
    r"a\.cls: the label -1 is not between": {"a.png": png(1), "a.cls": b"-1"},
    r"b\.png: no label": {"a.png": png(1), "a.cls": b"1", "b.png": png(2)},
    r"b\.png: no caption": {"a.png": png(1), "a.txt": b"hi", "b.png": png(2)},
    r"a\.png: its caption \(\.txt\) has no words": {"a.png": png(1), "a.txt": b" \n"},
}


@pytest.mark.parametrize("text", TARS)
def test_refused_tars(tmp_path, opened, text):
    with pytest.raises(BadImage, match=rf"bad\.tar: .*{text}"):
        opened(write_tar(tmp_path / "bad.tar", TARS[text]))


LABELS = {
    r"img00000003\.png: no label": [[name, 1] for name in NAMES[:3]],
    r"img00000000\.png: the label 'cat'": [[name, "cat"] for name in NAMES],
    r"img00000000\.png: the label 1\.5": [[name, 1.5] for name in NAMES],
    r"img00000000\.png: the label True": [[name, True] for name in NAMES],
    r"img00000000\.png: the label None": [[name, None] for name in NAMES],
    r"dataset\.json: not a list of labels": [1, 2, 3],
    "a list of numbers for a label": [[NAMES[0], [1.0]], *([name, 1] for name in NAMES[1:])],
}


@pytest.mark.parametrize("text", LABELS)
def test_refused_lists_of_labels(tmp_path, opened, text):
    with pytest.raises(BadImage, match=rf"bad\.zip: .*{text}"):
        opened(write_zip(tmp_path / "bad.zip", stylegan(LABELS[text])))


def test_refused_zips(tmp_path, opened):
    path = write_zip(tmp_path / "a.zip", {"a.png": png(1)})
    content = path.read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[:-30])
    with pytest.raises(BadImage, match=r"cut\.zip: a broken or truncated archive"):
        opened(tmp_path / "cut.zip")
    locked = bytearray(content)
    locked[content.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(locked)
    with pytest.raises(BadImage, match=r"locked\.zip: a\.png: the member is encrypted"):
        opened(tmp_path / "locked.zip")
    moved = content[:2] + b"XX" + content[4:]
    (tmp_path / "moved.zip").write_bytes(moved)
    with pytest.raises(BadImage, match=r"moved\.zip: a\.png: no header"):
        opened(tmp_path / "moved.zip")
    write_zip(tmp_path / "lzma.zip", {"a.png": png(1)}, zipfile.ZIP_LZMA)
    with pytest.raises(BadImage, match=r"lzma\.zip: a\.png: compressed by lzma"):
        opened(tmp_path / "lzma.zip")
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("a.png", png(1))
        archive.writestr("a.png", png(2))
    with pytest.raises(BadImage, match=r"twice\.zip: a\.png: .* two members of this name"):
        opened(tmp_path / "twice.zip")
    (tmp_path / "text.zip").write_text("hello")
    with pytest.raises(BadImage, match=r"text\.zip: a broken or truncated archive"):
        opened(tmp_path / "text.zip")


@pytest.mark.parametrize("end", ["in a member", "after a member", "in a header", "empty"])
def test_truncated_tars_are_refused(tmp_path, opened, end):
    path = write_tar(tmp_path / "cut.tar", {"a.png": png(1), "b.png": png(2)})
    with tarfile.open(path) as archive:
        first, second = archive.getmembers()
    places = {"in a member": second.offset_data + 9, "after a member": second.offset}
    places |= {"in a header": second.offset + 100, "empty": 0}
    assert first.offset_data < places["in a header"]
    path.write_bytes(path.read_bytes()[: places[end]])
    with pytest.raises(BadImage, match=r"cut\.tar: .*(truncated|broken)"):
        opened(path)


def test_tars_that_go_on_after_their_end_are_refused(tmp_path, opened):
    path = write_tar(tmp_path / "two.tar", {"a.png": png(1)})
    whole = path.read_bytes()
    path.write_bytes(whole + whole)
    with pytest.raises(BadImage, match=r"two\.tar: .* another tar put behind"):
        opened(path)
    path.write_bytes(whole[:1024] + b"rubbish".ljust(512) + whole[1024:])
    with pytest.raises(BadImage, match=r"two\.tar: a broken header"):
        opened(path)


@pytest.mark.parametrize("way", ["gz", "bz2", "xz"])
def test_packed_tars_are_refused(tmp_path, opened, way):
    path = tmp_path / f"a.tar.{way}"
    with tarfile.open(path, f"w:{way}"):
        pass
    kind = {"gz": "gzip", "bz2": "bzip2", "xz": "xz"}[way]
    assert holds_archives(tmp_path)
    with pytest.raises(BadImage, match=rf"a\.tar\.{way}: .*unpack the {kind} first"):
        opened(tmp_path)


def test_damage_inside_a_zip_is_found_when_read(tmp_path, opened):
    for way in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = write_zip(tmp_path / f"{way}.zip", {"a.png": png(1), "b.png": png(2)}, way)
        place = opened(path).places[1]
        content = bytearray(path.read_bytes())
        content[int(place["offset"]) + int(place["stored"]) // 2] ^= 255
        path.write_bytes(content)
        dataset = opened(path)
        assert dataset.decode(0).shape == (8, 8, 3)
        with pytest.raises(BadImage, match=rf"{way}\.zip: b\.png: "):
            dataset.decode(1)


def sparse_tar(path: Path) -> None:
    """A tar of a sparse image file, as GNU tar --sparse writes it."""
    info = tarfile.TarInfo("hole.png")
    info.type = tarfile.GNUTYPE_SPARSE
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


def linked_tar(path: Path, kind: bytes) -> None:
    """A tar whose second member is a link to the first."""
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("a.png")
        info.size = len(png(1))
        archive.addfile(info, io.BytesIO(png(1)))
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = kind, "a.png"
        archive.addfile(link)


def test_links(tmp_path, opened):
    linked_tar(tmp_path / "soft.tar", tarfile.SYMTYPE)
    assert len(opened(tmp_path / "soft.tar")) == 1
    linked_tar(tmp_path / "hard.tar", tarfile.LNKTYPE)
    with pytest.raises(BadImage, match=r"hard\.tar: b\.png: the image is stored as a hard link"):
        opened(tmp_path / "hard.tar")
    sparse_tar(tmp_path / "sparse.tar")
    with pytest.raises(BadImage, match=r"sparse\.tar: hole\.png: .* a sparse file"):
        opened(tmp_path / "sparse.tar")
    link = zipfile.ZipInfo("b.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "soft.zip", "w") as archive:
        archive.writestr("a.png", png(1))
        archive.writestr(link, "/etc/passwd")
    assert len(opened(tmp_path / "soft.zip")) == 1
