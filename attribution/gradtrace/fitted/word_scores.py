"""BM25 of training texts, from how often words are in them: what each word adds to the score of each row."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csc_matrix

from gradtrace.errors import MissingLibraryError
from gradtrace.task import Example, Task
from gradtrace.tasks.hooks import rendered

LIBRARY, EXTRA = "bm25s", "bm25"
_WORD = r"(?u)\b\w+\b"


def text_of(task: Task, example: Example) -> str | None:
    """The text that the task renders an example as; None if it renders it as something else."""
    text = rendered(task, example).get("text")
    return text if isinstance(text, str) else None


def is_installed() -> bool:
    return importlib.util.find_spec(LIBRARY) is not None


@dataclass(frozen=True, slots=True)
class WordScores:
    """The score of a text for some words is the sum of what each of them adds, a repeated one again.

    by_word: float32 [texts, words], sparse
    words: the number of each word
    """

    by_word: Any
    words: dict[str, int]

    def counts(self, texts: Sequence[str]) -> list[dict[int, int]]:
        """How often each of the known words is in each text, by the word's number."""
        counts: list[dict[int, int]] = []
        for text in _split(texts):
            counts.append({})
            for word in text:
                if (number := self.words.get(word)) is not None:
                    counts[-1][number] = counts[-1].get(number, 0) + 1
        return counts


def word_scores(texts: Sequence[str]) -> WordScores:
    """BM25 as in Lucene (k1 = 1.5, b = 0.75), by bm25s (Lù 2024). Words are runs of letters and digits, in lower case.

    Raises:
        MissingLibraryError: bm25s is not installed.
    """
    if not is_installed():
        raise MissingLibraryError(LIBRARY, EXTRA)
    import bm25s

    retriever = bm25s.BM25()
    retriever.index(_split(texts), show_progress=False)
    scores, words = retriever.scores, dict(retriever.vocab_dict)
    arrays = (np.asarray(scores[name]) for name in ("data", "indices", "indptr"))
    shape = (len(texts), len(scores["indptr"]) - 1)
    return WordScores(csc_matrix(tuple(arrays), shape=shape), words)


def _split(texts: Sequence[str]) -> list[list[str]]:
    import bm25s

    words: list[list[str]] = bm25s.tokenize(
        list(texts), token_pattern=_WORD, stopwords=None, return_ids=False, show_progress=False
    )
    return words
