"""Birds with captions: lists, boxes, tokens by hand, pickles that are not to be trusted."""

import colorsys
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import captions
from pipelines.birds import BirdSet, open_birds, read_pickle, square
from pipelines.datasets import find
from pipelines.images import BadImage, Fit
from pipelines.missing import DatasetMissing, NoSplit
from pipelines.settings import Data

REAL = os.environ.get("SADDLE_DATA")
PINNED = [1, 4, 5, 6, 9, 10, 11, 12, 13, 14, 15, 16, 17, 19, 21, 24, 25, 26]
KEYS = {"train": ["002.Jay/Jay_2", "001.Owl/Owl_1"], "test": ["003.Tit/Tit_3"]}
ALL = [*KEYS["train"], *KEYS["test"]]


def lines(key: str, count: int = 10) -> str:
    """Captions of a bird."""
    return "\n".join(f"The {key[4:7]}, number {k}." for k in range(count)) + "\n"


@pytest.fixture
def birds(tmp_path):
    """A set of three birds, 40x30 pixels each, under tmp_path/birds."""
    home = tmp_path / "birds"
    cub = home / "CUB_200_2011"
    for number, key in enumerate(ALL):
        image, text = cub / "images" / f"{key}.jpg", home / "text" / f"{key}.txt"
        image.parent.mkdir(parents=True)
        text.parent.mkdir(parents=True)
        Image.new("RGB", (40, 30), (80 * number,) * 3).save(image)
        text.write_text(lines(key))
    (cub / "images.txt").write_text("".join(f"{i} {key}.jpg\n" for i, key in enumerate(ALL, 7)))
    boxes = ("7 10.0 5.0 8.0 12.0", "8 0.0 0.0 40.0 30.0", "9 30.0 20.0 9.0 9.0")
    (cub / "bounding_boxes.txt").write_text("\n".join(boxes))
    (cub / "train_test_split.txt").write_text("7 1\n8 0\n9 0\n")
    for split, keys in KEYS.items():
        (home / split).mkdir()
        (home / split / "filenames.pickle").write_bytes(pickle.dumps(keys, 2))
        (home / split / "filenames.txt").write_text("\n".join(keys))
    return home


def opened(home: Path, split: str = "train", **settings: object) -> BirdSet:
    """The birds of a split."""
    return open_birds(Data(name="birds", root=home.parent, **settings), split, Fit(8, 3))


def test_images_classes_boxes_and_captions(birds):
    dataset = opened(birds)
    assert dataset.describe(0) == f"{birds}/CUB_200_2011/images/002.Jay/Jay_2.jpg"
    assert dataset.classes == ("001.Owl", "002.Jay") and dataset.labels.tolist() == [1, 0]
    # half-sides int(0.75 * 12) and int(0.75 * 40) round (14, 11) and (20, 15), clipped to 40x30
    assert dataset.boxes.tolist() == [[5, 2, 23, 20], [0, 0, 40, 30]]
    assert dataset.boxes.dtype == np.int32
    assert dataset.decode(1).shape == (8, 8, 3) and abs(int(dataset.decode(1)[4, 4, 0]) - 80) < 3
    found = dataset.captions
    numbers = tuple(str(k) for k in range(1, 10))
    assert found.words == ("<end>", "the", "jay", "number", "0", *numbers, "owl", "tit")
    assert found.tokens_NKL.shape == (2, 10, 18) and found.tokens_NKL.dtype == np.int16
    assert found.tokens_NKL[1, 2, :5].tolist() == [1, 14, 3, 6, 0]
    assert (found.lengths_NK == 4).all() and dataset.note == "subset: 2 of 8,855 images"
    test = opened(birds, "test")
    assert test.captions.words == found.words and test.boxes.tolist() == [[28, 18, 40, 30]]


@pytest.mark.parametrize("where", ["root", "CUB", "path", "CUB path"])
def test_places(birds, where):
    cub = birds / "CUB_200_2011"
    root, path = {
        "root": (birds.parent, None),
        "CUB": (birds, None),
        "path": (None, birds),
        "CUB path": (None, cub),
    }[where]
    assert len(open_birds(Data(name="birds", root=root, path=path), "train", Fit(8, 3))) == 2


def test_lists_of_names(birds):
    (birds / "train" / "filenames.pickle").unlink()
    assert len(opened(birds)) == 2  # from filenames.txt
    (birds / "train" / "filenames.txt").unlink()
    with pytest.raises(NoSplit, match=r"no train images \(no train/filenames\.pickle\)"):
        opened(birds)  # CUB's own split shares images with AttnGAN's test images
    (birds / "test" / "filenames.pickle").unlink()
    (birds / "test" / "filenames.txt").unlink()
    train, test = opened(birds), opened(birds, "test")
    assert len(train) == 1 and len(test) == 2
    assert train.classes == test.classes == ("001.Owl", "002.Jay", "003.Tit")
    assert train.labels.tolist() == [1] and test.labels.tolist() == [0, 2]


def test_a_missing_set_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(DatasetMissing, match=rf"in: {tmp_path}/birds\n"):
        opened(tmp_path / "birds")


def test_words():
    text = "This bird's\ufffd\ufffdwings: RED-brown, na\u00efve \u9e1f caf\u00e9_2!"
    words = ["this", "bird", "s", "wings", "red", "brown", "nave", "caf_2"]
    assert captions.tokens(text) == words and captions.tokens(" .,! \u9e1f") == []
    assert captions.vocabulary([["b", "a"], ["a", "c"]]) == ("<end>", "b", "a", "c")
    with pytest.raises(ValueError, match="32,767 different words"):
        captions.vocabulary([[str(i) for i in range(32_767)]])


def test_a_users_caption_in_the_words_of_training():
    words = captions.vocabulary([["a", "red", "bird"]])
    tokens_L, length, *left = captions.encode_text("A RED, crimson bird; crimson!", words)
    assert tokens_L.tolist()[:4] == [1, 2, 3, 0] and len(tokens_L) == captions.LENGTH
    assert length == 3 and left == [["crimson"], []]
    tokens_L, length, *left = captions.encode_text("a bird " * 9 + "red bird", words)
    assert tokens_L.tolist() == [1, 3] * 9 and length == 18 and left == [[], ["red", "bird"]]
    for text, message in (("", "has no words"), (" ?!", "has no words"), ("<end>", "no word of")):
        with pytest.raises(ValueError, match=message):
            captions.encode_text(text, words)


def test_long_captions_keep_eighteen_words_in_order():
    sentence = [str(i) for i in range(30)]
    other = [*sentence[:-1], "x"]
    words = captions.vocabulary([sentence, other])
    found = captions.encode([[sentence, other], [other, sentence]], words)
    kept = found.tokens_NKL[0, 0]
    assert (np.diff(kept) > 0).all() and (found.lengths_NK == 18).all()
    assert kept.tolist() == found.tokens_NKL[1, 1].tolist()  # whatever the row
    assert kept.tolist() != found.tokens_NKL[0, 1].tolist()  # other captions lose other words
    # for ever the same: a resumed run must not see other words
    assert kept.tolist() == PINNED


def write_captions(birds: Path, lists: object) -> Path:
    """captions.pickle as Python 2 would have written it."""
    path = birds / "captions.pickle"
    path.write_bytes(pickle.dumps(lists, 2))
    return path


WORDS = {0: "<end>", 1: "the", 2: "bird", 3: "flies"}
NUMBERS = {word: i for i, word in WORDS.items()}


def test_pickled_captions(birds):
    train = [[1, 2, 3]] * 10 + [[1, 2]] * 9 + [[3]]
    path = write_captions(birds, [train, [[2]] * 10, WORDS, NUMBERS])
    found = opened(birds).captions
    assert found.words == ("<end>", "the", "bird", "flies")
    assert found.lengths_NK.tolist() == [[3] * 10, [2] * 9 + [1]]
    assert found.tokens_NKL[1, 9, :2].tolist() == [3, 0]
    assert opened(birds, "test").captions.tokens_NKL[0, 0, :2].tolist() == [2, 0]
    write_captions(birds, [train[:-1], [[2]] * 10, WORDS, NUMBERS])
    with pytest.raises(BadImage, match=r"captions\.pickle: 19 train captions .* 20: move it away"):
        opened(birds)
    for content in ([1, 2], "hello", [train, train, {}, {}], [[[9]] * 20, [], WORDS, NUMBERS]):
        write_captions(birds, content)
        with pytest.raises(BadImage, match=r"captions\.pickle: not AttnGAN's four lists"):
            opened(birds)
    write_captions(birds, [[[]] * 20, [], WORDS, NUMBERS])
    with pytest.raises(BadImage, match=r"captions\.pickle: captions without words"):
        opened(birds)
    path.write_bytes(b"")
    with pytest.raises(BadImage, match=r"captions\.pickle: EOFError"):
        opened(birds)


class Attack:
    """Runs a command when it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def test_pickles_import_nothing_but_arrays(birds, tmp_path):
    (birds / "train" / "filenames.pickle").write_bytes(pickle.dumps([Attack(tmp_path / "owned")]))
    with pytest.raises(BadImage, match=r"filenames\.pickle: .*refused to load posix\.system"):
        opened(birds)
    (birds / "train" / "filenames.pickle").unlink()
    write_captions(birds, [[], [], Attack(tmp_path / "owned"), {}])
    with pytest.raises(BadImage, match=r"captions\.pickle: .*refused to load posix\.system"):
        opened(birds)
    assert not (tmp_path / "owned").exists()
    path = tmp_path / "array.pickle"
    path.write_bytes(pickle.dumps(np.arange(3), 2))
    assert read_pickle(path).tolist() == [0, 1, 2]


@pytest.mark.parametrize("key", ["../x/a", "/etc/passwd", "a/../b", "a", "a/b/c"])
def test_names_that_lead_out_are_refused(birds, key):
    (birds / "train" / "filenames.pickle").write_bytes(pickle.dumps([key]))
    with pytest.raises(BadImage, match=r"train/filenames\.pickle: the name"):
        opened(birds)


def test_missing_and_empty_files_are_named_or_left_out(birds):
    text = birds / "text" / f"{ALL[0]}.txt"
    text.write_text(" \n...\n")
    with pytest.raises(BadImage, match=r"Jay_2\.txt: no captions in it: write one"):
        opened(birds)
    text.unlink()
    with pytest.raises(BadImage, match=r"Jay_2\.txt: the captions are missing"):
        opened(birds)
    dataset = opened(birds, on_error="skip")
    assert dataset.note == "subset: 2 of 8,855 images; 1 left out for want of a file"
    assert len(dataset) == 1 and dataset.describe(0).endswith("Owl_1.jpg")
    assert dataset.classes == ("001.Owl",) and dataset.boxes.tolist() == [[0, 0, 40, 30]]
    text.write_text(lines(ALL[0]))
    (birds / "CUB_200_2011" / "images" / f"{ALL[1]}.jpg").unlink()
    with pytest.raises(BadImage, match=r"Owl_1\.jpg: the image is listed but missing"):
        opened(birds)
    dataset = opened(birds, on_error="skip")
    assert len(dataset) == 1 and dataset.describe(0).endswith("Jay_2.jpg")
    (birds / "CUB_200_2011" / "images" / f"{ALL[0]}.jpg").unlink()
    with pytest.raises(NoSplit, match="none of the 2 train birds"):
        opened(birds, on_error="skip")


def test_few_captions_are_repeated_and_many_are_cut(birds):
    (birds / "text" / f"{ALL[0]}.txt").write_text("one\n\n!\ntwo words\nand three words")
    (birds / "text" / f"{ALL[1]}.txt").write_text(lines(ALL[1], 15))
    dataset = opened(birds)
    assert dataset.captions.lengths_NK.tolist() == [[1, 2, 3, 1, 2, 3, 1, 2, 3, 1], [4] * 10]
    assert "1 images with fewer than 10 captions" in dataset.note


def test_without_any_captions_there_are_images(birds):
    (birds / "text").rename(birds / "away")
    dataset = opened(birds)
    assert dataset.captions is None and len(dataset) == 2
    assert "no captions: neither captions.pickle nor text/" in dataset.note
    assert dataset.fingerprint()


def test_boxes_are_checked(birds):
    assert square((10, 5, 8, 12), (40, 30)) == (5, 2, 23, 20)
    with pytest.raises(ValueError, match="outside the image of 5x5"):
        square((10, 5, 8, 12), (5, 5))
    path = birds / "CUB_200_2011" / "bounding_boxes.txt"
    whole = path.read_text()
    for content, text in (
        (whole.replace("7 10.0", "6 10.0"), r"no box of 002\.Jay/Jay_2\.jpg"),
        (whole.replace(" 12.0", ""), "line 1 has 4 columns and not 5"),
        (whole.replace("10.0", "ten"), r"Jay_2\.jpg: could not convert"),
        (whole.replace("7 10.0", "7 90.0"), r"Jay_2\.jpg: the box .* lies outside"),
    ):
        path.write_text(content)
        with pytest.raises(BadImage, match=rf"bounding_boxes\.txt: .*{text}"):
            opened(birds)
    path.unlink()
    with pytest.raises(BadImage, match=r"bounding_boxes\.txt: missing"):
        opened(birds)


def test_fingerprint_follows_images_boxes_and_captions(birds):
    found = [opened(birds).fingerprint(), opened(birds).fingerprint()]
    text = birds / "text" / f"{ALL[0]}.txt"
    text.write_text(text.read_text().replace("number 3", "numeral 3"))
    found.append(opened(birds).fingerprint())
    boxes = birds / "CUB_200_2011" / "bounding_boxes.txt"
    boxes.write_text(boxes.read_text().replace("7 10.0", "7 11.0"))
    found.append(opened(birds).fingerprint())
    stamp = opened(birds).stamp()
    os.utime(birds / "CUB_200_2011" / "images" / f"{ALL[0]}.jpg", ns=(0, 0))  # as a copy's
    assert opened(birds).fingerprint() == found[-1] and opened(birds).stamp() != stamp
    assert found[0] == found[1] and len(set(found)) == 3


@pytest.mark.skipif(not REAL, reason="SADDLE_DATA is not set: no real datasets")
def test_real_birds():
    try:
        train, test = (open_birds(Data(name="birds"), s, Fit(64, 3)) for s in ("train", "test"))
    except DatasetMissing:
        pytest.skip(f"birds are not in SADDLE_DATA={REAL}")
    assert len(train.boxes) == len(train) and train.captions.lengths_NK.min() > 0
    images = np.stack([train.decode(row) for row in range(0, len(train), 12)])
    assert images.shape[1:] == (64, 64, 3) and images.std() > 30
    assert (train.boxes[:, :2] >= 0).all() and (train.boxes[:, 2:] > train.boxes[:, :2]).all()
    assert not set(train.classes) & set(test.classes)
    words = train.captions.words
    assert words == test.captions.words and len(set(words)) == len(words)
    home = train.folder.parents[1]
    if not (home / "captions.pickle").is_file():
        found = set()
        for path in home.glob("text/*/*.txt"):  # plain English: splitting it is easily said anew
            found |= set("".join(c if c.isalnum() else " " for c in path.read_text()).split())
        assert len(words) == 1 + len({word.lower() for word in found})
        key = bytes(train.names[0]).decode().removesuffix(".jpg")
        line = (home / "text" / f"{key}.txt").read_text().splitlines()[0]
        length = int(train.captions.lengths_NK[0, 0])
        shown = [words[i] for i in train.captions.tokens_NKL[0, 0, :length]]
        assert shown == captions.tokens(line)[:length]


def test_computed_captions_name_the_colours():
    """By their hue in degrees, in [0, 360)."""
    degrees = {"red": 0, "orange": 35, "yellow": 70, "lime": 105, "green": 145, "teal": 180}
    degrees |= {"blue": 215, "violet": 255, "purple": 285, "pink": 325}
    dataset = find(Data(name="synthetic_captions", resolution=16, channels=3))
    told = dataset.captions
    for row in range(10):
        pixels_HWC = dataset.decode(row).astype(int)
        vivid = np.unravel_index((pixels_HWC.max(2) - pixels_HWC.min(2)).argmax(), (16, 16))
        hue = 360 * colorsys.rgb_to_hsv(*pixels_HWC[vivid] / 255)[0]
        numbers = told.tokens_NKL[row, 0, : told.lengths_NK[row, 0]]
        (word,) = {told.words[number] for number in numbers} & degrees.keys()
        assert abs((hue - degrees[word] + 180) % 360 - 180) < 10, (word, hue)
