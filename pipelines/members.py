"""What is in an archive: the images of a zip or a tar, where they lie, their labels and captions.

An archive is listed once; its arrays are kept in the cache folder, and every image is then read
by its place.
"""

import json
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipelines.images import BadImage
from pipelines.kept import Arrays, kept
from pipelines.layouts import SUFFIXES

PLACE = np.dtype(
    [
        *(("archive", "i4"), ("offset", "i8"), ("stored", "i8")),
        *(("size", "i8"), ("crc", "i8"), ("deflated", "?")),
    ]
)
"""Where a member lies: number of its archive, first byte, bytes there, bytes when inflated, CRC-32
(-1 in a tar, which has no checksums), and whether it is deflated."""
LARGEST = 1 << 30
"""Bytes of a member, at most."""
TEXT = 1 << 20
"""Bytes of a label or a caption, at most."""
LABELS = 65_536
"""Classes, at most."""
BROKEN = (
    *(tarfile.TarError, zipfile.BadZipFile, EOFError),
    *(struct.error, zlib.error, ValueError, NotImplementedError),
)
"""What tarfile and zipfile raise at a broken archive, or one of another kind."""
NONE, VECTOR = -1, -2
"""Labels of an image that has none, or a list of numbers."""
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7z": "xz", b"(\xb5/\xfd": "zstd"}


@dataclass(frozen=True)
class Members:
    """The images of an archive, in the order of a tar, or of the names of a zip.

    names: bytes (n,). places: PLACE (n,). labels: int64 (n,). texts: bytes of all captions, one
    after the other, uint8; ends: int64 (n,), where each ends. captioned: bool (n,). lacking: int64
    (), samples without an image. bare: bool (), no list of labels was there, so that folders may be
    classes.
    """

    names: np.ndarray
    places: np.ndarray
    labels: np.ndarray
    texts: np.ndarray
    ends: np.ndarray
    captioned: np.ndarray
    lacking: np.ndarray
    bare: np.ndarray

    def captions(self) -> list[str]:
        """Each image's caption."""
        whole, ends = self.texts.tobytes(), [0, *self.ends.tolist()]
        return [whole[a:b].decode("utf-8", "replace") for a, b in pairwise(ends)]


def list_members(path: Path, folder: Path) -> Members:
    """What is in the archive `path`; `folder` keeps the list for the next time.

    Raises BadImage that names the archive and the member at fault, and OSError.
    """
    read, kind = (_read_zip, "zip-1") if path.suffix.lower() == ".zip" else (_read_tar, "tar-1")
    try:
        return Members(**kept(folder, kind, path, lambda: read(path)))
    except BROKEN as error:
        raise BadImage.of(path, f"a broken or truncated archive: {error}") from error


def _arrays(rows: list[tuple], lacking: int, bare: bool) -> Arrays:
    """The arrays of Members from (name, place, label, caption) of each image."""
    texts = [row[3] or b"" for row in rows]
    values = (
        np.array([os.fsencode(row[0]) for row in rows], dtype=np.bytes_),
        np.array([(0, *row[1]) for row in rows], dtype=PLACE),
        np.array([row[2] for row in rows], dtype=np.int64),
        np.frombuffer(b"".join(texts), np.uint8),
        np.cumsum([len(text) for text in texts], dtype=np.int64),
        np.array([row[3] is not None for row in rows], dtype=bool),
        np.array(lacking),
        np.array(bare),
    )
    return {field.name: value for field, value in zip(fields(Members), values, strict=True)}


def _clean(name: str, path: Path) -> str | None:
    """A member's name; None if it is hidden. BadImage if it leads out of the archive."""
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or name[:1] in ("/", "\\") or re.match(r"[A-Za-z]:[\\/]", name):
        text = "the member's name leads out of the archive: this archive is not to be trusted"
        raise BadImage.of(f"{path}: {name}", text)
    parts = [part for part in name.split("/") if part not in ("", ".")]
    hidden = not parts or any(p.startswith(".") or p == "__MACOSX" for p in parts)
    return None if hidden else "/".join(parts)


def _label(text: object, name: str) -> int:
    """A class from a .cls member or from StyleGAN's list."""
    whole = isinstance(text, int) and not isinstance(text, bool)
    if not whole and not (isinstance(text, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", text)):
        raise BadImage.of(name, f"the label {repr(text)[:60]} is not a whole number")
    label = int(text)
    if not 0 <= label < LABELS:
        raise BadImage.of(name, f"the label {label} is not between 0 and {LABELS - 1:,}")
    return label


# zip: StyleGAN's datasets, and any zip of images


def _read_zip(path: Path) -> Arrays:
    with zipfile.ZipFile(path) as archive, path.open("rb", buffering=0) as file:
        infos: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            name = _clean(info.filename, path)
            if name is None or info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
                continue
            if name in infos:
                raise BadImage.of(f"{path}: {name}", "the archive has two members of this name")
            infos[name] = info
        listed = _stylegan_labels(archive, infos, path)
        names = sorted(name for name in infos if name.lower().endswith(SUFFIXES))
        end = path.stat().st_size
        rows = [
            (name, _zip_place(infos[name], file.fileno(), end, f"{path}: {name}"), label, None)
            for name in names
            for label in [(listed or {}).get(name, NONE)]
        ]
    return _arrays(rows, 0, listed is None)


def _zip_place(info: zipfile.ZipInfo, descriptor: int, end: int, name: str) -> tuple[int, ...]:
    """PLACE of a member, less the archive's number; its local header is read and checked."""
    if info.flag_bits & 1:
        raise BadImage.of(name, "the member is encrypted: write the zip without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        way = zipfile.compressor_names.get(info.compress_type, info.compress_type)
        raise BadImage.of(name, f"compressed by {way}: write the zip stored or deflated")
    if max(info.file_size, info.compress_size) > LARGEST:
        raise BadImage.of(name, f"over {LARGEST:,} bytes: a decompression bomb?")
    head = os.pread(descriptor, 30, info.header_offset)
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise BadImage.of(name, "no header where the zip's list says: a broken archive")
    offset = info.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
    if offset + info.compress_size > end:
        raise BadImage.of(name, "the zip ends before this member does: a truncated archive")
    deflated = info.compress_type == zipfile.ZIP_DEFLATED
    return offset, info.compress_size, info.file_size, info.CRC, deflated


def _stylegan_labels(
    archive: zipfile.ZipFile, infos: dict[str, zipfile.ZipInfo], path: Path
) -> dict[str, int] | None:
    """Labels by name from dataset.json, {} if it says null; None if there is no such member."""
    if "dataset.json" not in infos:
        return None
    place = f"{path}: dataset.json"
    if infos["dataset.json"].flag_bits & 1:
        raise BadImage.of(place, "the member is encrypted: write the zip without a password")
    if infos["dataset.json"].file_size > LARGEST:
        raise BadImage.of(place, f"over {LARGEST:,} bytes")
    try:
        pairs = json.loads(archive.read(infos["dataset.json"])).get("labels") or []
        found = {str(name).removeprefix("./"): label for name, label in pairs}
    except (ValueError, TypeError, AttributeError, NotImplementedError, RecursionError) as error:
        text = f'not a list of labels ("labels": [["name", class], ...] or null): {error}'
        raise BadImage.of(place, text) from error
    return {
        name: VECTOR if isinstance(label, list) else _label(label, f"{place}: {name}")
        for name, label in found.items()
    }


# tar: WebDataset's shards


def _read_tar(path: Path) -> Arrays:
    """Members of the same name up to the first dot are one sample: an image, .cls, .txt."""
    with path.open("rb") as file:
        start = file.read(4)
        packed = next((way for magic, way in PACKED.items() if start.startswith(magic)), None)
        if packed:
            raise BadImage.of(
                path,
                f"packed by {packed}, so no image can be read by its place: "
                f"unpack the {packed} first, the .tar may stay",
            )
        file.seek(0)
        samples: dict[str, dict[str, tuple]] = {}
        with tarfile.open(fileobj=file, mode="r:", errorlevel=1) as archive:
            while (info := archive.next()) is not None:
                _add_member(samples, info, file, path)
                archive.members.clear()  # it would keep them all
            _check_end(file, archive.offset, path)
    rows, lacking = [], 0
    for key, parts in samples.items():
        images = [suffix for suffix in parts if f".{suffix}".lower().endswith(SUFFIXES)]
        if len(images) > 1:
            text = f"the sample has {len(images)} images ({', '.join(images)}), one is expected"
            raise BadImage.of(f"{path}: {key}", text)
        lacking += not images
        if images:
            label = parts["cls"][1] if "cls" in parts else NONE
            text = parts["txt"][1] if "txt" in parts else None
            rows.append((f"{key}.{images[0]}", parts[images[0]][0], label, text))
    return _arrays(rows, lacking, not any("cls" in parts for parts in samples.values()))


def _add_member(samples: dict, info: tarfile.TarInfo, file: BinaryIO, path: Path) -> None:
    """Put a member's place, and its content if it is a label or a caption, into its sample."""
    name = _clean(info.name, path)
    if name is None or "." not in os.path.basename(name):
        return
    key, suffix = re.fullmatch(r"((?:.*/)?[^./]+)\.(.*)", name).groups()
    full, image = f"{path}: {name}", name.lower().endswith(SUFFIXES)
    if image and (info.islnk() or info.issparse()):
        kind = "hard link" if info.islnk() else "sparse file"
        raise BadImage.of(full, f"the image is stored as a {kind}: write the tar with plain files")
    if not info.isreg() or not (image or suffix in ("cls", "txt")):
        return
    parts = samples.setdefault(key, {})
    if suffix in parts:
        raise BadImage.of(full, "the archive has two members of this name")
    if info.size > (LARGEST if image else TEXT):
        raise BadImage.of(full, f"{info.size:,} bytes are too many for a member of this kind")
    content = b"" if image else os.pread(file.fileno(), info.size, info.offset_data)
    if suffix == "cls":
        content = _label(content.decode("ascii", "replace").strip(), full)
    parts[suffix] = ((info.offset_data, info.size, info.size, -1, False), content)


def _check_end(file: BinaryIO, offset: int, path: Path) -> None:
    """Nothing but zeros must follow the last member: tarfile stops silently at anything else."""
    file.seek(offset)
    rest = file.read(512)
    if len(rest) < 512:
        raise BadImage.of(path, "the tar has no end: a truncated archive, write or fetch it again")
    while rest:
        if rest.count(0) != len(rest):
            text = f"a broken header, or another tar put behind this one, at byte {offset:,}"
            raise BadImage.of(path, text)
        rest = file.read(1 << 20)
