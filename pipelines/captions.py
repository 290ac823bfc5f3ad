"""How captions become numbers of words, as AttnGAN (Xu et al. 2018) makes them."""

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from pipelines.sources import Captions

END = "<end>"
LENGTH = 18
"""Words of a caption that are kept (WORDS_NUM of AttnGAN's cfg/bird_attn2.yml)."""
WORDS = np.iinfo(np.int16).max
"""Different words, at most: tokens are int16."""


def tokens(text: str) -> list[str]:
    """The words of a text: lower case, \\w+, without what is not ASCII."""
    # some of the birds' captions have two replacement characters where a blank was
    found = re.findall(r"\w+", text.lower().replace("\ufffd\ufffd", " "))
    words = (word.encode("ascii", "ignore").decode() for word in found)
    return [word for word in words if word]


def vocabulary(sentences: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """All words in the order in which they first appear, the end before them."""
    words = (END, *dict.fromkeys(word for sentence in sentences for word in sentence))
    if len(words) > WORDS:
        raise ValueError(
            f"the captions have {len(words) - 1:,} different words, {WORDS - 1:,} are the most: "
            "leave rare words out of the caption files"
        )
    return words


def encode(rows: Sequence[Sequence[Sequence[str]]], words: tuple[str, ...]) -> Captions:
    """Captions of n rows, each of the same number K of sentences, which are lists of words."""
    number = {word: i for i, word in enumerate(words)}
    shape = (len(rows), len(rows[0]) if rows else 0)
    tokens_NKL = np.zeros((*shape, LENGTH), np.int16)
    lengths_NK = np.zeros(shape, np.int16)
    for row, sentences in enumerate(rows):
        for k, sentence in enumerate(sentences):
            chosen = _shorten(sentence)
            tokens_NKL[row, k, : len(chosen)] = [number[word] for word in chosen]
            lengths_NK[row, k] = len(chosen)
    return Captions(tokens_NKL, lengths_NK, words)


def encode_text(text: str, words: tuple[str, ...]) -> tuple[np.ndarray, int, list[str], list[str]]:
    """A user's caption: its first LENGTH words' numbers, int64 (LENGTH,), how many they are; its
    words that are not in the vocabulary, and those that are too many, both of which are left out.
    Raises ValueError where none is in the vocabulary."""
    found, known = tokens(text), set(words[1:])
    if not found:
        raise ValueError(f"the caption {text!r} has no words: describe what is to be drawn")
    kept = [word for word in found if word in known]
    if not kept:
        raise ValueError(
            f"no word of the caption {text!r} stands in the captions that the model was trained on "
            f"({', '.join(words[1:6])}, ...): use other words"
        )
    encoded = encode([[kept[:LENGTH]]], words)
    unknown = [word for word in dict.fromkeys(found) if word not in known]
    tokens_L, length = encoded.tokens_NKL[0, 0].astype(np.int64), int(encoded.lengths_NK[0, 0])
    return tokens_L, length, unknown, kept[LENGTH:]


def _shorten(sentence: Sequence[str]) -> Sequence[str]:
    """At most LENGTH words, in their order.

    AttnGAN draws which ones anew each time a caption is shown. Here the draw is a function of the
    caption itself: the words whose places have the smallest digests. Every pipeline, every rank
    and every resumed run then sees the same, whatever rows were left out.
    """
    if len(sentence) <= LENGTH:
        return sentence
    text = " ".join(sentence)
    places = range(len(sentence))
    drawn = sorted(places, key=lambda i: hashlib.sha256(f"{i} {text}".encode()).digest())
    return [sentence[i] for i in sorted(drawn[:LENGTH])]
