"""A vocabulary of words: texts to token ids."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

PADDING, UNKNOWN = 0, 1

_WORDS = re.compile(r"\w+|[^\w\s]")


class Vocabulary:
    """The most frequent words of the given texts, in lower case, including punctuation marks.

    Id 0 is padding, id 1 any other word. Words follow by frequency, then alphabetically, so that the same texts give
    the same ids. There are at most `size` ids.
    """

    def __init__(self, texts: Iterable[str], size: int) -> None:
        counts = Counter(word for text in texts for word in words(text))
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        self.ids = {word: number for number, word in enumerate(ordered[: size - 2], UNKNOWN + 1)}

    def encode(self, text: str, most: int) -> list[int]:
        """The ids of the first `most` words."""
        return [self.ids.get(word, UNKNOWN) for word in words(text)[:most]]


def words(text: str) -> list[str]:
    return _WORDS.findall(text.lower())
