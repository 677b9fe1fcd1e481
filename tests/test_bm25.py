"""BM25 as a method: beside bm25s itself, a case by hand, and the library that is not there."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from conftest import serving_when_ready
from gradtrace import Index, open_index
from gradtrace.errors import QueryError
from gradtrace.tasks import TextClassification
from gradtrace_client import Client, InvalidRequestError
from gradtrace_indexer import delete_rows
from gradtrace_service.app import create_app

bm25s = pytest.importorskip("bm25s", reason="bm25s is not installed")
TEXTS = ["the cat sees a dog", "a dog", "The Cat, the cat!", "fish 5", "5 birds see the fish at the river"]
QUERY = "Which cat, the cat or a dog?"


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(128, 4), nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.head((self.embedding(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def task(texts: list[str] = TEXTS) -> TextClassification:
    labels = [number % 2 for number in range(len(texts))]
    return TextClassification(
        Mean, (texts, labels), vocabulary_size=128, encode=lambda text: [ord(c) % 128 for c in text]
    )


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return tiny.build(task(), tmp_path)


def reference(texts: list[str], query: str) -> np.ndarray[Any, Any]:
    """bm25s, asked directly."""
    split = {"token_pattern": r"(?u)\b\w+\b", "stopwords": None, "show_progress": False}
    retriever = bm25s.BM25()
    retriever.index(bm25s.tokenize(texts, **split), show_progress=False)
    return retriever.get_scores(bm25s.tokenize([query], return_ids=False, **split)[0])


def by_hand(texts: list[list[str]], query: list[str]) -> list[float]:
    """Lucene's variant, with k1 = 1.5 and b = 0.75."""
    mean = sum(map(len, texts)) / len(texts)
    idf = {w: math.log(1 + (len(texts) - (n := sum(w in t for t in texts)) + 0.5) / (n + 0.5)) for w in query}
    return [sum(idf[w] * t.count(w) / (t.count(w) + 1.5 * (0.25 + 0.75 * len(t) / mean)) for w in query) for t in texts]


def test_scores_are_those_of_bm25s_and_of_the_formula(index: Index) -> None:
    (scores,) = index.scores([(QUERY, 0)], method="bm25")
    np.testing.assert_allclose(scores, reference(TEXTS, QUERY), rtol=1e-5)
    words = [["the", "cat", "sees", "a", "dog"], ["a", "dog"], ["the", "cat", "the", "cat"], ["fish", "5"],
             ["5", "birds", "see", "the", "fish", "at", "the", "river"]]  # fmt: skip
    asked = ["which", "cat", "the", "cat", "or", "a", "dog"]
    np.testing.assert_allclose(scores, by_hand(words, asked), rtol=1e-5)


def test_hits_are_the_most_and_the_least_alike(index: Index) -> None:
    (result,) = index.influence([(QUERY, 0)], k=2, method="bm25")
    scores = reference(TEXTS, QUERY)
    assert [hit.row for hit in result.proponents] == np.argsort(-scores, kind="stable")[:2].tolist()
    assert [hit.row for hit in result.opponents] == np.argsort(scores, kind="stable")[:2].tolist()
    assert result.opponents[0].score == 0
    assert result.exact
    plain = index.influence([(QUERY, 0)])[0]
    assert (result.target, result.note) == (plain.target, None)
    assert math.isclose(result.loss, plain.loss, rel_tol=1e-5)


def test_several_queries_and_their_mean(index: Index) -> None:
    queries = [(QUERY, 0), ("the fish", 1), ("unheard of", 0)]
    wanted = np.stack([reference(TEXTS, text) for text, _ in queries])
    np.testing.assert_allclose(index.scores(queries, method="bm25"), wanted, rtol=1e-5)
    (mean,) = index.influence(queries, k=5, method="bm25", aggregate="mean", include=["percentiles"])
    for hit in mean.proponents:
        assert math.isclose(hit.score, wanted.mean(0)[hit.row], rel_tol=1e-5, abs_tol=1e-7)
    (none,) = index.influence(queries[2:], method="bm25")
    assert none.note == "no training text has a word of the query, so every score is zero"


def test_filters_and_deleted_rows(index: Index, tmp_path: Path) -> None:
    (result,) = index.influence([(QUERY, 0)], method="bm25", filter={"labels": [1]})
    assert {hit.row for hit in result.proponents} == {1, 3}
    delete_rows(tmp_path / "index", [0])
    again = open_index(tmp_path / "index", task())
    scores = again.scores([(QUERY, 0)], method="bm25")[0]
    np.testing.assert_allclose(scores[1:], reference(TEXTS[1:], QUERY), rtol=1e-5)  # rarity is that of what is left
    assert scores[0] == -np.inf
    (result,) = again.influence([(QUERY, 0)], method="bm25")
    assert 0 not in {hit.row for hit in [*result.proponents, *result.opponents]}


def test_a_prefilters_candidates_are_scored_exactly(index: Index) -> None:
    (exact,) = index.influence([(QUERY, 0)], k=10, rescore=True)
    scores = {hit.row: hit.score for hit in [*exact.proponents, *exact.opponents]}
    alike = np.argsort(-reference(TEXTS, QUERY), kind="stable")[:3].tolist()
    (result,) = index.influence([(QUERY, 0)], k=10, prefilter="bm25", candidates=3)
    hits = [*result.proponents, *result.opponents]
    assert sorted(hit.row for hit in hits) == sorted(alike)
    assert (result.rows_rescored, result.exact) == (3, False)
    for hit in hits:
        assert math.isclose(hit.score, scores[hit.row], rel_tol=1e-5)
    (mean,) = index.influence([(QUERY, 0), ("the fish", 1)], k=10, prefilter="bm25", candidates=5, aggregate="mean")
    assert mean.rows_rescored == 5
    for asked, words in (
        ({"prefilter": "tracin"}, "give bm25 or repsim"),
        ({"candidates": 0}, "with 0 candidates"),
        ({"method": "trak"}, "trak"),
    ):
        with pytest.raises(QueryError, match=words):
            index.influence([(QUERY, 0)], **{"prefilter": "bm25", **asked})  # type: ignore[arg-type]


def test_texts_of_the_same_words_are_near_duplicates(tmp_path: Path) -> None:
    index = tiny.build(task([*TEXTS, "A dog.", "the dog"]), tmp_path)
    delete_rows(tmp_path / "index", [0])
    index = open_index(tmp_path / "index", task([*TEXTS, "A dog.", "the dog"]))
    (result,) = index.influence([("a dog", 0)], k=3, method="bm25", include=["clusters"])
    assert [(hit.row, hit.cluster) for hit in result.proponents] == [(1, 1), (5, 1), (6, 6)]


def test_texts_are_read_once(index: Index) -> None:
    index.scores([(QUERY, 0)], method="bm25")
    read = index.contents.word_scores
    index.influence([("the fish", 0)], method="bm25")
    assert index.contents.word_scores is read


def test_what_bm25_does_not_do_is_refused(index: Index) -> None:
    query = [(QUERY, 0)]
    for asked, words in (
        ({"target": {"label": 1}}, "compares words, whatever the label"),
        ({"rescore": True}, "leave rescore out"),
        ({"include": ["layers"]}, "compares no gradients"),
        ({"damping": 0.1}, "takes no damping"),
    ):
        with pytest.raises(QueryError, match=words):
            index.influence(query, method="bm25", **asked)  # type: ignore[arg-type]
    with pytest.raises(QueryError, match="texts of the index alone"):
        index.pairs(query, query, method="bm25")
    with pytest.raises(QueryError, match="no row has an influence on itself"):
        index.self_influence(method="bm25")


def test_an_index_without_texts_has_no_bm25(tmp_path: Path) -> None:
    index = tiny.build(tiny.ClassTask(tiny.mlp, tiny.classes(20)), tmp_path)
    assert "bm25" not in index.methods
    with pytest.raises(QueryError, match="defines no render"):
        index.scores(tiny.classes(1), method="bm25")


def test_without_the_library_it_is_not_offered(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "bm25" in index.methods
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bm25s" else find(name))
    assert "bm25" not in Index(index.contents).methods
    with pytest.raises(QueryError, match=r"pip install 'gradtrace\[bm25\]'"):
        index.scores([(QUERY, 0)], method="bm25")


def test_a_service_answers_and_says_what_the_score_is(index: Index) -> None:
    with serving_when_ready(create_app(index)) as url, Client(url, retries=0) as client:
        answer = client.influence({"text": QUERY}, method="bm25", k=2)
        assert "BM25" in answer.convention
        assert "not an influence" in answer.convention
        assert [hit.score for hit in answer.results[0].proponents] == pytest.approx(
            sorted(reference(TEXTS, QUERY), reverse=True)[:2]
        )
        assert "bm25" in client.index().methods
        rescored = client.influence({"text": QUERY}, prefilter="bm25", candidates=2)
        assert (rescored.rescored, rescored.exact, rescored.results[0].rows_rescored) == (True, False, 2)
        assert "full gradients" in rescored.convention
        with pytest.raises(InvalidRequestError, match="whatever the label"):
            client.influence({"text": QUERY}, method="bm25", target={"label": 1})
