"""Small archives of images of one grey."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

from PIL import Image

from pipelines.images import Fit
from pipelines.sources import EncodedSet

FIT = Fit(8, 3)


def png(shade: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A PNG of one grey."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def write_zip(path: Path, members: dict[str, bytes], way: int = zipfile.ZIP_STORED) -> Path:
    """A zip of these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", way) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def shades(dataset: EncodedSet) -> list[int]:
    """The grey of each row's image."""
    return [int(dataset.decode(row)[0, 0, 0]) for row in range(len(dataset))]


def stylegan(labels: object, way: int = zipfile.ZIP_STORED) -> dict[str, bytes]:
    """Members of a dataset as StyleGAN's dataset_tool.py writes it."""
    images = {f"0000{i // 2}/img{i:08}.png": png(10 * i) for i in range(4)}
    return {**images, "dataset.json": json.dumps({"labels": labels}).encode()}


NAMES = [f"0000{i // 2}/img{i:08}.png" for i in range(4)]
