"""FAISS and Annoy: what they find against brute force, what is refused, and their files in an index."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import annoy
import faiss
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

import digits_task
import gradtrace as gt
import tiny
from conftest import DigitsRun, mostly_long
from gradtrace.errors import CorruptIndexError, QueryError, StoreError
from gradtrace.search.annoy import AnnoySearcher
from gradtrace.search.by_name import SearcherName
from gradtrace.search.candidates import CandidateSearcher
from gradtrace.search.faiss import FaissSearcher
from gradtrace.search.scored_rows import SearchResult
from gradtrace.store.manifest import MANIFEST_NAME
from gradtrace.store.manifest_file import read_manifest
from gradtrace.store.rows import RowStore
from gradtrace_client import Client
from gradtrace_indexer import add_checkpoints, append_rows, build_index, compact, delete_rows, set_searcher, verify
from gradtrace_indexer.searchers import filled_index, mean_recall, write_searcher
from gradtrace_indexer.writing.files import write_manifest
from gradtrace_service.app import create_app
from gradtrace_service.cli import app
from gradtrace_service.server import serving
from made_index import make_store
from test_search import Brute, brute_force, gradient_like

TASK = digits_task.TASK
CHECKPOINTS = [0, 1, 2]
# With a selector of FAISS: lists, flat; without one: a graph, codes in blocks, a rotation before; and Annoy.
KINDS = [
    "faiss:HNSW16,SQfp16",
    "faiss:IVF16,Flat;nprobe=8",
    "faiss:SQ8",
    "faiss:PQ48x4fs",
    "faiss:RR64,Flat",
    "annoy:20",
]


def opened(store: RowStore, directory: Path, name: str) -> CandidateSearcher:
    """Built, written, and opened from its file."""
    parsed = SearcherName.parse(name)
    file, parameters = write_searcher(directory, "searcher", store, parsed, progress=False)
    kind: Callable[..., CandidateSearcher] = AnnoySearcher if parsed.kind == "annoy" else FaissSearcher
    return kind(store, directory / file.path, parameters)


def recall(results: list[SearchResult], brutes: list[Brute], k: int) -> tuple[float, float]:
    """Shares of the true k best and k worst rows, by their ids."""
    top = [np.isin(brute.end(k, -1), result.top.rows).mean() for result, brute in zip(results, brutes, strict=True)]
    bottom = [
        np.isin(brute.end(k, 1), result.bottom.rows).mean() for result, brute in zip(results, brutes, strict=True)
    ]
    return float(np.mean(top)), float(np.mean(bottom))


def check_scores(result: SearchResult, brute: Brute, k: int) -> None:
    """As many distinct, admitted hits as there can be, in order, each with its exact score."""
    for rows, scores, sign in ((result.top.rows, result.top.scores, -1), (result.bottom.rows, result.bottom.scores, 1)):
        assert rows.dtype == np.int64
        assert len(rows) == len(set(rows.tolist())) == min(k, brute.allowed.sum())
        assert brute.allowed[rows].all()
        np.testing.assert_allclose(scores, brute.scores[rows], rtol=1e-5, atol=1e-6 * np.abs(brute.scores).max())
        assert (np.diff(sign * scores) >= 0).all()
    assert result.rows_searched == brute.allowed.sum()
    assert result.rows_touched <= result.rows_searched


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> RowStore:
    return make_store(tmp_path_factory.mktemp("index"), gradient_like(3000), "float16", [8, 24, 96], 1100)


@pytest.fixture(scope="module")
def queries() -> torch.Tensor:
    return torch.from_numpy(gradient_like(3020)[:, 3000:].transpose(1, 0, 2).copy())  # [20, 3, 96]


@pytest.fixture(scope="module", params=KINDS)
def searcher(
    request: pytest.FixtureRequest, store: RowStore, tmp_path_factory: pytest.TempPathFactory
) -> CandidateSearcher:
    return opened(store, tmp_path_factory.mktemp("searcher"), request.param)


@pytest.mark.parametrize("checkpoints", mostly_long([[0, 1, 2], [2], [2, 0]], [2, 0]))
def test_recall_at_both_ends(
    store: RowStore, queries: torch.Tensor, searcher: CandidateSearcher, checkpoints: list[int]
) -> None:
    some = queries[:, checkpoints]
    results = searcher.search(some, checkpoints, 10)
    brutes = [brute_force(store, query, checkpoints) for query in some]
    for result, brute in zip(results, brutes, strict=True):
        check_scores(result, brute, 10)
        assert not result.exact
        assert result.rows_touched < store.rows / 10
    assert min(recall(results, brutes, 10)) > 0.8


@pytest.mark.parametrize("share", mostly_long([0.95, 0.5, 0.1, 0.02, 0.001], 0.95, 0.02))
def test_filters(store: RowStore, queries: torch.Tensor, searcher: CandidateSearcher, share: float) -> None:
    allowed = np.random.default_rng(0).random(store.rows) < share
    results = searcher.search(queries, CHECKPOINTS, 10, allowed=allowed)
    brutes = [brute_force(store, query, CHECKPOINTS, allowed=allowed) for query in queries]
    for result, brute in zip(results, brutes, strict=True):
        check_scores(result, brute, 10)
        assert not (result.exact and share > 0.9)
    assert min(recall(results, brutes, 10)) > 0.8


def test_a_query_gets_the_same_answer_alone_and_in_a_batch(
    store: RowStore, queries: torch.Tensor, searcher: CandidateSearcher
) -> None:
    for query, batched in zip(queries, searcher.search(queries, CHECKPOINTS, 5), strict=True):
        (alone,) = searcher.search(query[None], CHECKPOINTS, 5)
        np.testing.assert_array_equal(alone.top.rows, batched.top.rows)
        np.testing.assert_array_equal(alone.bottom.scores, batched.bottom.scores)


def test_scaled_rows_are_searched_exactly(store: RowStore, queries: torch.Tensor, searcher: CandidateSearcher) -> None:
    """The rows of largest cosine are not among those of the largest inner products."""
    scale = torch.from_numpy(1 / store.norms(0))
    (result,) = searcher.search(queries[:1, :1], [0], 10, row_scale=scale)
    assert result.exact
    assert result.top.rows.tolist() == brute_force(store, queries[0, :1], [0], scale).end(10, -1)


@pytest.mark.parametrize("k", [1, 700, 5000])
def test_any_number_of_hits(store: RowStore, queries: torch.Tensor, searcher: CandidateSearcher, k: int) -> None:
    (result,) = searcher.search(queries[:1], CHECKPOINTS, k)
    brute = brute_force(store, queries[0], CHECKPOINTS)
    check_scores(result, brute, k)
    if k == 5000:  # more than there are
        assert result.exact
        assert result.top.rows.tolist() == brute.end(k, -1)


def test_queries_that_are_zero_or_not_finite(store: RowStore, searcher: CandidateSearcher) -> None:
    (result,) = searcher.search(torch.zeros(1, 3, 96), CHECKPOINTS, 3, allowed=np.arange(store.rows) > 9)
    assert result.top.rows.tolist() == result.bottom.rows.tolist() == [10, 11, 12]
    with pytest.raises(QueryError, match="NaN"):
        searcher.search(torch.full((1, 3, 96), torch.nan), CHECKPOINTS, 3)
    with pytest.raises(QueryError, match="at least 1"):
        searcher.search(torch.ones(1, 3, 96), CHECKPOINTS, 0)


@pytest.mark.parametrize("name", ["faiss:HNSW16", "annoy:5"])
@pytest.mark.parametrize("case", ["one row", "all zero", "all equal", "tiny", "huge"])
def test_odd_rows(tmp_path: Path, name: str, case: str) -> None:
    rows = gradient_like(300)
    if case == "one row":
        rows = rows[:, :1]
    elif case == "all equal":
        rows[:] = rows[:, :1]
    else:
        rows = (rows.astype(np.float64) * {"all zero": 0, "tiny": 1e-30, "huge": 1e25}[case]).astype(np.float32)
    store = make_store(tmp_path, rows, "float16", [8, 24, 96])
    query = torch.from_numpy(gradient_like(301)[:, 300].copy())
    (result,) = opened(store, tmp_path, name).search(query[None], CHECKPOINTS, 3)
    brute = brute_force(store, query, CHECKPOINTS)
    check_scores(result, brute, 3)
    best = np.sort(brute.scores[brute.allowed])[::-1][:3]
    np.testing.assert_allclose(result.top.scores, best, rtol=1e-5)


def test_exact_search_takes_over_where_too_few_candidates_turn_up(
    store: RowStore, queries: torch.Tensor, tmp_path: Path
) -> None:
    searcher = opened(store, tmp_path, "faiss:IVF300,Flat;nprobe=1")
    (result,) = searcher.search(queries[:1], CHECKPOINTS, 200)
    assert result.exact
    assert result.top.rows.tolist() == brute_force(store, queries[0], CHECKPOINTS).end(200, -1)


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "HNSW16,SQfp16", "IVF16,Flat", "IVF16,SQ8"])
def test_files_are_mapped_and_the_same_every_time(store: RowStore, tmp_path: Path, factory: str) -> None:
    for folder in ("a", "b"):
        searcher = opened(store, tmp_path / folder, f"faiss:{factory}")
    assert str(tmp_path / "b" / "searcher") in Path("/proc/self/maps").read_text()
    assert searcher.search(torch.ones(1, 1, 96), [0], 1)
    assert (tmp_path / "a" / "searcher").read_bytes() == (tmp_path / "b" / "searcher").read_bytes()


def test_annoy_s_files_are_mapped_and_the_same_every_time(store: RowStore, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        searcher = opened(store, tmp_path / folder, "annoy:7")
    assert str(tmp_path / "b" / "searcher") in Path("/proc/self/maps").read_text()
    assert searcher.search(torch.ones(1, 1, 96), [0], 1)
    assert (tmp_path / "a" / "searcher").read_bytes() == (tmp_path / "b" / "searcher").read_bytes()


def test_a_file_is_not_read_into_memory(tmp_path: Path) -> None:
    """Of 16 MB of rows, little comes into memory that no file backs."""
    store = make_store(tmp_path, np.random.default_rng(0).standard_normal((1, 4000, 1024), np.float32))
    kinds: list[tuple[str, Callable[..., CandidateSearcher]]] = [
        ("faiss:Flat", FaissSearcher),
        ("faiss:HNSW4", FaissSearcher),
        ("faiss:IVF4,Flat", FaissSearcher),
        ("annoy:1", AnnoySearcher),
    ]
    for number, (name, kind) in enumerate(kinds):
        file, parameters = write_searcher(tmp_path, str(number), store, SearcherName.parse(name), progress=False)
        before = own_memory()
        searcher = kind(store, tmp_path / file.path, parameters)
        assert own_memory() - before < 4e6, name
        assert searcher.search(torch.ones(1, 1, 1024), [0], 1)


def own_memory() -> int:
    """Bytes of this process that no file backs."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("faiss:HNSW32,PQ16", "IndexHNSWPQ.*small distances"),
        ("faiss:NSG32,PQ16", "small distances"),
        ("faiss:IDMap,Flat", "leave IDMap out"),
        ("faiss:IDMap2,HNSW32", "leave IDMap out"),
        ("faiss:L2norm,Flat", "cosines"),
        ("faiss:PCA32,Flat", "subtracts the mean"),
        ("faiss:BIVF32", "vectors of bits"),
        ("faiss:IVF16,RaBitQfs", "hardly any"),
        ("faiss:PQ17", "multiple of the number of subquantizers"),
        ("faiss:LSH", "cannot make 'LSH'"),
        ("faiss:Flatt", "could not parse"),
        ("faiss:HNSW32;nprobe=8", "cannot be built"),
        ("faiss:", "faiss:FACTORY"),
        ("annoy:0", "annoy:TREES"),
        ("annoy:many", "annoy:TREES"),
        ("annoy:5;efSearch=3", "search_k=NUMBER"),
        ("progressive:5", "choose progressive"),
        ("lucene", "choose progressive"),
    ],
)
def test_searchers_that_are_refused(store: RowStore, tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(StoreError, match=words):
        write_searcher(tmp_path, "searcher", store, SearcherName.parse(name), progress=False)
    assert not list(tmp_path.iterdir())


def test_rabitq_in_blocks_is_refused_above_2048_columns(tmp_path: Path) -> None:
    store = make_store(tmp_path, np.zeros((3, 2, 700), np.float32))
    with pytest.raises(StoreError, match="2,100: use RaBitQ, or fewer"):
        filled_index(store, "RaBitQfs", "", progress=False)


def test_why_some_kinds_are_refused() -> None:
    """The installed FAISS still does what the refusals say."""
    rng = np.random.default_rng(0)
    rows, query = rng.standard_normal((500, 32), np.float32) + 1, rng.standard_normal((1, 32), np.float32)
    rows *= 10 ** rng.uniform(-1, 1, (500, 1)).astype(np.float32)
    best = int((rows @ query[0]).argmax())
    found = {}
    for factory in ("Flat", "L2norm,Flat", "PCA31,Flat", "IVF1,RaBitQ"):
        index = faiss.index_factory(32, factory, faiss.METRIC_INNER_PRODUCT)
        index.train(rows)
        index.add(rows)
        found[factory] = index.search(query, 10)[1][0].tolist()
    assert faiss.index_factory(32, "HNSW32,PQ8", faiss.METRIC_INNER_PRODUCT).metric_type == faiss.METRIC_L2
    assert found["Flat"][0] == best
    assert len(set(found["L2norm,Flat"]) & set(found["Flat"])) < 8
    assert len(set(found["PCA31,Flat"]) & set(found["Flat"])) < 8
    assert len(set(found["IVF1,RaBitQ"]) & set(found["Flat"])) < 5


def test_annoy_s_lowest_are_not_found_from_the_query_itself(store: RowStore, queries: torch.Tensor) -> None:
    """Why opponents are looked up with the negative query: the far end of a long list is no end."""
    forest = annoy.AnnoyIndex(96, "dot")
    forest.set_seed(1)
    rows = store.gather([0], np.arange(store.rows))[:, 0]
    for row, vector in enumerate(rows):
        forest.add_item(row, vector)
    forest.build(20)
    worst = set(brute_force(store, queries[0, :1], [0]).end(10, 1))
    assert len(worst & set(forest.get_nns_by_vector(-queries[0, 0], 100, 20_000))) > 7
    assert len(worst & set(forest.get_nns_by_vector(queries[0, 0], 1000, 20_000)[-100:])) < 3


def test_recall_counts_equals() -> None:
    exact, found = np.array([3, 2, 2], np.float32), np.array([3, 2], np.float32)
    assert mean_recall([(exact, found), (exact, np.array([2, 2, 1], np.float32))]) == round(2 / 3, 4)
    assert mean_recall([(exact, exact), (exact, np.zeros(0, np.float32))]) == 0.5


@pytest.fixture
def index(digits_index: DigitsRun, tmp_path: Path) -> Path:
    """A copy of the index of the digits, for a test to change."""
    shutil.copytree(digits_index.index, tmp_path / "run" / "index")
    shutil.copytree(digits_index.checkpoints, tmp_path / "run" / "checkpoints")
    return tmp_path / "run" / "index"


def test_a_build_with_a_searcher(digits_index: DigitsRun, index: Path) -> None:
    found = build_index(
        TASK,
        gt.load_checkpoints(index.parent / "checkpoints"),
        index,
        dimensions=256,
        searcher="faiss:HNSW32,SQfp16",
        progress=False,
    )
    entry = found.manifest.searcher
    assert entry is not None
    assert (entry.name, entry.parameters, entry.split) == ("faiss:HNSW32,SQfp16", "efSearch=128", "query")
    assert set(entry.recall) == {"tracin", "graddot", "influence", "source"}
    assert min(entry.recall["tracin"].top, entry.recall["tracin"].bottom) > 0.9
    (result,) = found.influence([TASK.query[0]])
    assert not result.exact
    assert result.recall is not None
    assert result.recall.bottom == entry.recall["tracin"].bottom
    exact = gt.open_index(index, TASK, searcher="progressive")
    assert exact.influence([TASK.query[0]])[0].recall is None
    assert exact.influence([TASK.query[0]])[0].exact
    assert found.influence([TASK.query[0]], method="cosine")[0].exact
    assert verify(index) == []


def test_the_recall_that_is_reported_is_that_of_the_queries(index: Path) -> None:
    found = set_searcher(index, TASK, "faiss:IVF40,Flat;nprobe=1", progress=False)
    entry = found.manifest.searcher
    assert entry is not None
    chosen = np.random.default_rng(0).permutation(len(TASK.query))[: entry.queries]
    examples = [TASK.query[row] for row in chosen]
    results, scores = found.influence(examples), found.scores(examples)
    for end, sign, reported in (
        ("proponents", -1, entry.recall["tracin"].top),
        ("opponents", 1, entry.recall["tracin"].bottom),
    ):
        best = np.argsort(sign * scores, axis=1, kind="stable")[:, :10]
        ids = [[hit.row for hit in getattr(result, end)] for result in results]
        share = np.mean([np.isin(want, got).mean() for want, got in zip(best, ids, strict=True)])
        assert reported < 1
        assert share == pytest.approx(reported, abs=0.01)


def test_setting_a_searcher_again_changes_nothing_and_another_replaces_it(index: Path) -> None:
    before = read_manifest(index)
    set_searcher(index, TASK, "annoy:5", progress=False)
    with_annoy = (index / MANIFEST_NAME).read_bytes()
    set_searcher(index, TASK, "annoy:5", progress=False)
    assert (index / MANIFEST_NAME).read_bytes() == with_annoy
    set_searcher(index, TASK, "faiss:Flat", progress=False)
    entry = read_manifest(index).searcher
    assert entry is not None
    assert entry.name == "faiss:Flat"
    set_searcher(index, TASK, "progressive", progress=False)
    after = read_manifest(index)
    assert after.generation == before.generation + 3
    assert after.searcher is None
    assert after.files() == before.files()


def test_a_build_that_is_killed_while_it_makes_the_searcher(digits_index: DigitsRun, index: Path) -> None:
    shutil.copytree(index, index.parent / "other")
    before = {path: path.stat().st_mtime_ns for path in index.rglob("*.rows")}
    words = ["build", digits_index.task, "--checkpoints", str(index.parent / "checkpoints"), "--out", str(index)]
    command = [sys.executable, "-m", "gradtrace_service", *words, "--dimensions", "256"]
    with subprocess.Popen([*command, "--searcher", "annoy:200;search_k=1000"], stderr=subprocess.DEVNULL) as process:
        while not list(index.glob("searchers/*.tmp")) and process.poll() is None:
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert gt.open_index(index, TASK).influence([TASK.query[0]])[0].exact
    for path in (index, index.parent / "other"):
        set_searcher(path, TASK, "annoy:200;search_k=1000", progress=False)
    assert tiny.files(index) == tiny.files(index.parent / "other")
    assert before == {path: path.stat().st_mtime_ns for path in index.rglob("*.rows")}


def test_a_damaged_file_is_named_refused_and_made_again(index: Path) -> None:
    set_searcher(index, TASK, "annoy:5", progress=False)
    whole = read_manifest(index)
    (file,) = (index / "searchers").iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert [f"searchers/{file.name}" in problem for problem in verify(index)] == [True]
    with pytest.raises(CorruptIndexError, match=f"searchers/{file.name} does not match its checksum"):
        gt.open_index(index, TASK)
    file.unlink()
    with pytest.raises(CorruptIndexError, match="missing"):
        gt.open_index(index, TASK)
    set_searcher(index, TASK, "annoy:5", progress=False)
    assert len(read_manifest(index).files()) == len(whole.files())
    assert verify(index) == []


def test_a_file_of_other_content_is_refused_even_unverified(store: RowStore, tmp_path: Path) -> None:
    (tmp_path / "searcher").write_bytes(b"no index" * 100)
    with pytest.raises(CorruptIndexError, match="cannot be opened"):
        FaissSearcher(store, tmp_path / "searcher", "")
    with pytest.raises(CorruptIndexError, match=r"cannot be opened|other rows"):
        AnnoySearcher(store, tmp_path / "searcher", "search_k=5")
    other = make_store(tmp_path / "other", gradient_like(50), "float16", [8, 24, 96])
    file, parameters = write_searcher(tmp_path, "few", other, SearcherName.parse("faiss:Flat"), progress=False)
    with pytest.raises(CorruptIndexError, match="other rows"):
        FaissSearcher(store, tmp_path / file.path, parameters)


def test_a_searcher_of_other_rows_is_passed_over(index: Path) -> None:
    set_searcher(index, TASK, "faiss:Flat", progress=False)
    manifest = read_manifest(index)
    assert manifest.searcher is not None
    stale = manifest.searcher.model_copy(update={"rows": "of an earlier generation"})
    write_manifest(index, "manifest.json", manifest.model_copy(update={"searcher": stale}))
    assert gt.open_index(index, TASK).influence([TASK.query[0]])[0].exact


def test_a_searcher_through_the_life_of_an_index(tmp_path: Path) -> None:
    rows, query = tiny.classes(60), tiny.classes(1, seed=5)
    grown = tiny.ClassTask(tiny.mlp, rows)
    tiny.build(tiny.ClassTask(tiny.mlp, rows[:40]), tmp_path, searcher="faiss:Flat")
    path, later = tmp_path / "index", tiny.checkpoints(grown, tmp_path / "checkpoints", 3)
    for index in (append_rows(path, grown, progress=False), add_checkpoints(path, grown, later, progress=False)):
        best = np.argsort(-index.scores(query)[0])[:5].tolist()
        (result,) = index.influence(query, k=5)
        assert not result.exact  # built again from all rows and checkpoints
        assert [hit.row for hit in result.proponents] == best
    delete_rows(path, best[:1])
    (result,) = gt.open_index(path, grown).influence(query, k=4)
    assert not result.exact
    assert [hit.row for hit in result.proponents] == best[1:]
    compact(path, progress=False)
    assert gt.open_index(path, grown).influence(query)[0].exact  # the searcher is of other positions
    assert set_searcher(path, grown, "faiss:Flat", progress=False).influence(query)[0].exact is False


def test_a_searcher_that_the_index_does_not_have(digits_index: DigitsRun) -> None:
    with pytest.raises(StoreError, match="only progressive: add it with `gradtrace build"):
        gt.open_index(digits_index.index, TASK, searcher="annoy:50")


@pytest.mark.parametrize(("library", "name", "extra"), [("faiss", "faiss:Flat", "cpu"), ("annoy", "annoy:5", "annoy")])
def test_a_missing_library(
    digits_index: DigitsRun, index: Path, monkeypatch: pytest.MonkeyPatch, library: str, name: str, extra: str
) -> None:
    set_searcher(index, TASK, name, progress=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(StoreError, match=rf"pip install gradtrace\[{extra}\]"):
        gt.open_index(index, TASK)
    assert gt.open_index(index, TASK, searcher="progressive").influence([TASK.query[0]])[0].exact
    with pytest.raises(StoreError, match=rf"pip install gradtrace\[{extra}\]"):
        build_index(TASK, gt.load_checkpoints(digits_index.checkpoints), index / "new", searcher=name, progress=False)
    assert not (index / "new").exists()


def test_the_command_line_and_the_service(digits_index: DigitsRun, index: Path) -> None:
    words = ["build", digits_index.task, "--checkpoints", str(index.parent / "checkpoints"), "--out", str(index)]
    shown = CliRunner().invoke(app, [*words, "--dimensions", "256", "--searcher", "faiss:Flat"], catch_exceptions=False)
    assert "recall@10 at the top / bottom on 60 query rows: tracin 1.000 / 1.000" in shown.output
    assert "searcher faiss:Flat" in CliRunner().invoke(app, ["info", str(index)], catch_exceptions=False).output
    with serving(create_app(gt.open_index(index, TASK))) as url, Client(url) as client:
        answer = client.influence(query_rows=[0])
        assert not answer.exact
        assert answer.recall is not None
        assert (answer.recall.top, answer.recall.bottom) == (1, 1)
        assert client.influence(query_rows=[0], method="cosine").recall is None


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or not hasattr(faiss, "StandardGpuResources"), reason="needs a CUDA device, faiss-gpu"
)
@pytest.mark.parametrize("name", ["faiss:Flat", "faiss:IVF16,Flat;nprobe=8", "faiss:HNSW16"])
def test_on_a_gpu(store: RowStore, queries: torch.Tensor, tmp_path: Path, name: str) -> None:
    file, parameters = write_searcher(tmp_path, "searcher", store, SearcherName.parse(name), progress=False)
    allowed: NDArray[np.bool_] = np.random.default_rng(0).random(store.rows) < 0.5
    results = FaissSearcher(store, tmp_path / file.path, parameters, "cuda").search(
        queries, CHECKPOINTS, 10, allowed=allowed
    )
    brutes = [brute_force(store, query, CHECKPOINTS, allowed=allowed) for query in queries]
    assert min(recall(results, brutes, 10)) > 0.8
