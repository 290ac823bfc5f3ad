"""CUB-200-2011 (Wah et al. 2011) with captions, in the layout of AttnGAN (Xu et al. 2018).

    birds/{train,test}/filenames.pickle or filenames.txt
    birds/CUB_200_2011/{images.txt, bounding_boxes.txt, train_test_split.txt, images/<key>.jpg}
    birds/captions.pickle, or birds/text/<key>.txt with a caption on each line

where a key is "<class>/<name>". Pickles are read without importing anything but arrays.
"""

import hashlib
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines import captions, layouts
from pipelines.images import BadImage, Fit, size_of
from pipelines.missing import DatasetMissing, NoSplit, missing_text
from pipelines.settings import Data
from pipelines.sources import FileSet

CAPTIONS = 10
"""Captions of an image (CAPTIONS_PER_IMAGE)."""
IMAGES = {"train": 8855, "test": 2933}
"""Images of AttnGAN's splits."""
Sentences = list[list[str]]


@dataclass
class BirdSet(FileSet):
    """Image files with boxes and captions."""

    def digest(self, times: bool) -> str:
        """Of the images, the boxes, and what is said of them."""
        if self.captions is None:
            return super().digest(times)
        digest = hashlib.sha256(super().digest(times).encode())
        digest.update(self.captions.tokens_NKL.tobytes())
        digest.update("\n".join(self.captions.words).encode())
        return digest.hexdigest()


def open_birds(data: Data, split: str, fit: Fit) -> BirdSet:
    """Birds of a split with boxes, classes and ten captions each.

    Raises DatasetMissing, NoSplit, and BadImage naming the file at fault; with data.on_error=skip
    the images that lack a file or a caption are left out and counted in the note.
    """
    home = _home(data)
    keys = _keys(home, split)
    skip = data.on_error == "skip"
    present = _present(home, keys, skip)
    sentences, words, note = _captions(home, split, skip)
    rows = [row for row, there in enumerate(present) if there and (not words or sentences[row])]
    if not rows:
        raise NoSplit(f"none of the {len(keys):,} {split} birds in {home} can be used")
    kept = [keys[row] for row in rows]
    labels, classes = _classes(home, kept, split)
    count, full = len(keys), IMAGES[split]
    notes = [f"subset: {count:,} of {full:,} images" if count < full else ""]
    notes += [f"{len(keys) - len(rows):,} left out for want of a file"] * (len(rows) < len(keys))
    notes = [text for text in (*notes, note) if text]
    return BirdSet(
        *("birds", split, fit, labels, classes, "; ".join(notes)),
        boxes=_boxes(home, kept),
        captions=captions.encode([sentences[row] for row in rows], words) if words else None,
        folder=_images(home),
        names=np.array([os.fsencode(f"{key}.jpg") for key in kept], np.bytes_),
    )


def _home(data: Data) -> Path:
    """The folder that holds CUB_200_2011/."""
    if data.path is not None:
        path = data.path.absolute()
        places = [path, path.parent] if path.name == "CUB_200_2011" else [path]
    else:
        places = [data.root_folder() / "birds", data.root_folder()]
    for place in places:
        if _images(place).is_dir():
            return place
    looked = ("CUB_200_2011/images/<class>/<name>.jpg", places)
    raise DatasetMissing(missing_text(data, looked=looked))


def _images(home: Path) -> Path:
    return home / "CUB_200_2011" / "images"


# the lists


class _Plain(pickle.Unpickler):
    """Reads pickles of plain containers and numpy arrays; refuses to import anything else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in layouts.ARRAY_PARTS:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_pickle(path: Path) -> object:
    """What a pickle of Python 2 or 3 holds; BadImage if it is broken or would import something."""
    with path.open("rb") as file:
        try:
            return _Plain(file, encoding="latin1").load()
        except OSError:
            raise
        except Exception as error:  # a broken pickle can make the unpickler raise anything
            raise BadImage.of(path, error) from error


def _list_of(home: Path, split: str) -> Path | None:
    """The file that lists a split: AttnGAN's, or, if there is none of either split, CUB's own."""
    ends = ("pickle", "txt")
    lists = {s: [home / s / f"filenames.{end}" for end in ends] for s in ("train", "test")}
    for path in lists[split]:
        if path.is_file():
            return path
    # CUB's split shares images with AttnGAN's other one
    if any(path.is_file() for paths in lists.values() for path in paths):
        return None
    return home / "CUB_200_2011" / "train_test_split.txt"


def _keys(home: Path, split: str) -> list[str]:
    """ "<class>/<name>" of each image of a split, in the order that the captions are in."""
    source = _list_of(home, split)
    if source is None:
        raise NoSplit(f"birds in {home} has no {split} images (no {split}/filenames.pickle)")
    if source.suffix == ".pickle":
        keys = read_pickle(source)
        if not isinstance(keys, list | tuple | np.ndarray):
            raise BadImage.of(source, "not a list of names")
    else:
        by_cub = source.name == "train_test_split.txt"
        keys = _keys_by_cub(home, split) if by_cub else source.read_text().split()
    keys = [str(key).removesuffix(".jpg") for key in keys]
    for key in keys:
        if key.startswith("/") or ".." in key.split("/") or "\0" in key:
            raise BadImage.of(source, f"the name {key!r} leads out of the folder of images")
        if key.count("/") != 1:
            raise BadImage.of(source, f"the name {key!r} is not <class>/<name>")
    if not keys:
        raise NoSplit(f"birds in {home} has no {split} images ({source} lists none)")
    return keys


def _table(path: Path, columns: int) -> dict[str, list[str]]:
    """A list of CUB's: the other columns by the first, which is the image's number."""
    if not path.is_file():
        raise BadImage.of(path, "missing: it comes with CUB-200-2011, copy it there")
    rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) != columns:
            raise BadImage.of(path, f"line {number} has {len(row)} columns and not {columns}")
    return {row[0]: row[1:] for row in rows}


def _keys_by_cub(home: Path, split: str) -> list[str]:
    """Names by CUB's own split, in which train and test share their classes."""
    folder = home / "CUB_200_2011"
    for_training = _table(folder / "train_test_split.txt", 2)
    wanted = "1" if split == "train" else "0"
    names = _table(folder / "images.txt", 2)
    return [name for i, (name,) in names.items() if for_training.get(i) == [wanted]]


def _present(home: Path, keys: list[str], skip: bool) -> list[bool]:
    """Which images are there; BadImage at the first that is not, unless `skip`."""
    present = []
    for key in keys:
        path = _images(home) / f"{key}.jpg"
        present.append(path.is_file())
        if not present[-1] and not skip:
            text = "the image is listed but missing: copy it there, or --data.on-error=skip"
            raise BadImage.of(path, text)
    return present


def _classes(home: Path, keys: list[str], split: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels and class folders. AttnGAN's splits share no class, so each numbers its own."""
    names = [key.split("/")[0] for key in keys]
    classes = sorted(set(names))
    if _list_of(home, split).name == "train_test_split.txt":
        listed = _table(home / "CUB_200_2011" / "images.txt", 2).values()
        classes = sorted({name.split("/")[0] for (name,) in listed})
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[name] for name in names], np.int64), tuple(classes)


def _boxes(home: Path, keys: list[str]) -> np.ndarray:
    """int32 (n, 4) left, top, right, bottom: the square round each bird as get_imgs of AttnGAN's
    datasets.py cuts it, of half-side 0.75 max(width, height), clipped to the image."""
    folder = home / "CUB_200_2011"
    found = _table(folder / "bounding_boxes.txt", 5)
    names = {name: i for i, (name,) in _table(folder / "images.txt", 2).items()}
    boxes = np.empty((len(keys), 4), np.int32)
    for row, key in enumerate(keys):
        box = found.get(names.get(f"{key}.jpg", ""))
        if box is None:
            raise BadImage.of(folder / "bounding_boxes.txt", f"no box of {key}.jpg")
        size = size_of(_images(home) / f"{key}.jpg")  # None: no image, as decoding it will say
        try:
            boxes[row] = square(tuple(int(float(v)) for v in box), size or (1 << 20, 1 << 20))
        except (ValueError, OverflowError) as error:
            raise BadImage.of(folder / "bounding_boxes.txt", f"{key}.jpg: {error}") from error
    return boxes


def square(box: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) round a box (left, top, width, height) in an image of `size`
    (width, height); ValueError if nothing of it is inside."""
    x, y, width, height = box
    half = int(0.75 * max(width, height))
    middle_x, middle_y = (2 * x + width) // 2, (2 * y + height) // 2
    left, top = max(0, middle_x - half), max(0, middle_y - half)
    right, bottom = min(size[0], middle_x + half), min(size[1], middle_y + half)
    if right <= left or bottom <= top:
        raise ValueError(f"the box {box} lies outside the image of {size[0]}x{size[1]} pixels")
    return left, top, right, bottom


# the captions


def _captions(home: Path, split: str, skip: bool) -> tuple[list[Sentences], tuple[str, ...], str]:
    """CAPTIONS sentences of each image of the split (none where `skip` passed over a bad file), the
    words of both splits, and a note. Without any captions: ([], (), note)."""
    splits = [s for s in ("train", "test") if _list_of(home, s)]
    keys = {s: _keys(home, s) for s in splits}
    if (home / "captions.pickle").is_file():
        return _pickled(home / "captions.pickle", split, len(keys[split]))
    if not (home / "text").is_dir():
        return [], (), f"no captions: neither captions.pickle nor text/ in {home}"
    texts = {s: [_text(home, key, skip or s != split) for key in keys[s]] for s in splits}
    words = captions.vocabulary(line for s in splits for lines in texts[s] for line in lines)
    few = [lines for lines in texts[split] if 0 < len(lines) < CAPTIONS]
    note = f"{len(few):,} images with fewer than {CAPTIONS} captions: theirs are repeated"
    sentences = [
        [lines[k % len(lines)] for k in range(CAPTIONS)] if lines else [] for lines in texts[split]
    ]
    return sentences, words, note if few else ""


def _text(home: Path, key: str, skip: bool) -> Sentences:
    """The first CAPTIONS captions of an image that have words."""
    path = home / "text" / f"{key}.txt"
    try:
        content = path.read_text("utf-8", errors="replace")
    except FileNotFoundError:
        if skip:
            return []
        text = "the captions are missing: copy them there, or --data.on-error=skip"
        raise BadImage.of(path, text) from None
    lines = [words for line in content.split("\n") if (words := captions.tokens(line))]
    if not lines and not skip:
        text = "no captions in it: write one on each line, or --data.on-error=skip"
        raise BadImage.of(path, text)
    return lines[:CAPTIONS]


def _pickled(path: Path, split: str, images: int) -> tuple[list[Sentences], tuple[str, ...], str]:
    """As `_captions`, from [train captions, test captions, words by number, numbers by word], where
    caption k of image i is the (10 i + k)th of its list."""
    content = read_pickle(path)
    try:
        lists, by_number = content[:2], content[2]
        words = tuple(str(by_number[i]) for i in range(len(by_number)))
        found = [[words[number] for number in line] for line in lists[split == "test"]]
    except (TypeError, KeyError, IndexError, ValueError) as error:
        text = f"not AttnGAN's four lists: {type(error).__name__}: {error}"
        raise BadImage.of(path, text) from error
    if len(found) != CAPTIONS * images:
        text = (
            f"{len(found):,} {split} captions where {images:,} images need {CAPTIONS * images:,}: "
            "move it away, and it is made anew from text/"
        )
        raise BadImage.of(path, text)
    if len(words) > captions.WORDS or not all(found):
        raise BadImage.of(path, "captions without words, or too many different words")
    return [found[i : i + CAPTIONS] for i in range(0, len(found), CAPTIONS)], words, ""
