"""Reading an index: rows over shard borders, columns, and what is said of damaged files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gradtrace.errors import CorruptIndexError, QueryError
from gradtrace.store.index_files import check_files
from gradtrace.store.manifest import Precision
from gradtrace.store.rows import RowStore
from made_index import make_store, write_index

LEVELS = [2, 6, 12]


def integer_rows(checkpoints: int, count: int) -> NDArray[np.float32]:
    """Rows that float16 holds exactly, [checkpoints, count, 12]."""
    return np.random.default_rng(0).integers(-99, 100, (checkpoints, count, 12)).astype(np.float32)


@pytest.fixture(scope="module", params=[1, 7, 1000], ids=lambda rows: f"{rows}-row-shards")
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RowStore:
    return make_store(tmp_path_factory.mktemp("index"), integer_rows(2, 30), "float16", LEVELS, request.param)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.integers(0, 29), max_size=40), checkpoints=st.lists(st.integers(0, 1), max_size=3))
def test_gather_returns_the_rows_in_the_order_asked_for(
    stored: RowStore, rows: list[int], checkpoints: list[int]
) -> None:
    want = integer_rows(2, 30)[checkpoints][:, rows].transpose(1, 0, 2)
    np.testing.assert_array_equal(stored.gather(checkpoints, rows), want)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.integers(0, 29), max_size=40), level=st.integers(0, 2))
def test_products_of_one_level(stored: RowStore, rows: list[int], level: int) -> None:
    columns = slice([0, *LEVELS][level], LEVELS[level])
    vector = torch.arange(1.0, 13.0)[columns]
    products = stored.products(1, torch.tensor(sorted(rows), dtype=torch.int64), level, vector)
    np.testing.assert_array_equal(products, integer_rows(2, 30)[1, sorted(rows)][:, columns] @ vector.numpy())


@pytest.mark.parametrize("precision", ["float16", "int8", "int4"])
@pytest.mark.parametrize("columns", [12, 13])
def test_gather_blocks_and_products_read_the_same_rows(tmp_path: Path, precision: Precision, columns: int) -> None:
    rows = np.random.default_rng(1).standard_normal((2, 50, columns)).astype(np.float32)
    store = make_store(tmp_path, rows / np.arange(1, columns + 1, dtype=np.float32), precision, [2, 6, columns], 7)
    whole = torch.cat([block for _, block in store.blocks([1, 0], 9)])
    np.testing.assert_array_equal(store.gather([1, 0], range(50)), whole)
    first = torch.cat([values for _, values in store.first_levels(1)])
    np.testing.assert_array_equal(first, whole[:, 0, :2])
    some, vector = torch.arange(3, 50, 4), torch.linspace(-1, 1, columns)
    parts = enumerate(vector.split([2, 4, columns - 6]))
    products = sum(store.products(1, some, level, part) for level, part in parts)
    np.testing.assert_allclose(products, whole[some, 0] @ vector, rtol=1e-4, atol=1e-5)
    at_both = store.inner_products([1, 0], some.numpy(), torch.stack([vector, 1 - vector]))
    np.testing.assert_allclose(at_both, products + whole[some, 1] @ (1 - vector), rtol=1e-4, atol=1e-5)
    tails = torch.stack([store.tails(1, level) for level in range(3)], dim=1)
    exact = torch.stack([whole[:, 0, low:].double().norm(dim=1) for low in (0, 2, 6)], dim=1)
    assert (tails.double() >= exact).all()
    np.testing.assert_allclose(tails, exact, rtol=3e-7)


@pytest.mark.parametrize("block_rows", [1, 4, 30, 99])
@pytest.mark.parametrize("checkpoints", [[0, 1], [1, 0], [1]])
def test_blocks_cover_every_row_once_in_order(stored: RowStore, block_rows: int, checkpoints: list[int]) -> None:
    blocks = list(stored.blocks(checkpoints, block_rows))
    assert [start for start, _ in blocks] == list(range(0, 30, block_rows))
    assert max(len(block) for _, block in blocks) <= block_rows
    want = integer_rows(2, 30)[checkpoints].transpose(1, 0, 2)
    np.testing.assert_array_equal(torch.cat([block for _, block in blocks]), want)


def test_norms_are_those_of_the_rows(stored: RowStore) -> None:
    exact = np.linalg.norm(integer_rows(2, 30)[1].astype(np.float64), axis=1)
    norms = stored.norms(1)
    assert norms.dtype == np.float32
    assert (norms >= exact).all()
    np.testing.assert_allclose(norms, exact, rtol=3e-7)


def test_columns_of_all_shards_with_nulls(stored: RowStore) -> None:
    columns = stored.columns(0)
    assert columns["label"].dtype == np.int64
    np.testing.assert_array_equal(columns["label"], np.arange(30))
    assert columns["correct"].tolist() == [None if row % 5 == 4 else row % 3 == 0 for row in range(30)]


@pytest.mark.parametrize("rows", [[30], [-1], [3, 99, 4]])
def test_rows_that_do_not_exist_are_refused(stored: RowStore, rows: list[int]) -> None:
    with pytest.raises(QueryError, match="rows must lie in 0 to 29"):
        stored.gather([0], rows)


def test_an_empty_index_can_be_read(tmp_path: Path) -> None:
    store = make_store(tmp_path, np.zeros((1, 0, 4), np.float32))
    assert store.gather([0], []).shape == (0, 1, 4)
    assert len(store.norms(0)) == 0
    assert list(store.blocks([0], 8)) == []


@pytest.mark.parametrize("precision", ["float16", "int8", "int4"])
def test_a_flipped_byte_anywhere_is_found_and_its_shard_named(tmp_path: Path, precision: Precision) -> None:
    manifest = write_index(tmp_path, integer_rows(2, 9), precision, LEVELS, 5)
    assert check_files(tmp_path, manifest, deep=True) == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    # Rows and columns of two shards at two checkpoints, basis, curvature, and for int4 the columns' scales.
    assert len(files) == 2 * 2 * 2 + 2 + (precision == "int4")
    for path in files:
        intact = path.read_bytes()
        for position in {0, len(intact) // 2, len(intact) - 1}:
            damaged = bytearray(intact)
            damaged[position] ^= 1
            path.write_bytes(damaged)
            assert bool(check_files(tmp_path, manifest, deep=False)) == (path.suffix != ".rows")
            (problem,) = check_files(tmp_path, manifest, deep=True)
            assert problem.startswith(f"{path.relative_to(tmp_path)} does not match its checksum")
        path.write_bytes(intact)
    assert check_files(tmp_path, manifest, deep=True) == []


@pytest.mark.parametrize("deep", [False, True])
def test_missing_and_truncated_files_are_found(tmp_path: Path, deep: bool) -> None:
    manifest = write_index(tmp_path, integer_rows(2, 9), "float16", LEVELS, 5)
    store = RowStore(tmp_path, manifest)
    (tmp_path / manifest.shards[1].rows.path).unlink()
    damaged = tmp_path / manifest.shards[2].columns.path
    damaged.write_bytes(damaged.read_bytes()[:-1])
    missing, short = check_files(tmp_path, manifest, deep)
    assert missing == f"{manifest.shards[1].rows.path} is missing"
    assert short.startswith(f"{manifest.shards[2].columns.path} has {manifest.shards[2].columns.bytes - 1} bytes")
    with pytest.raises(CorruptIndexError, match=r"c0/000000005\.rows is missing"):
        store.norms(0)
    with pytest.raises(CorruptIndexError, match=r"c1/000000000\.parquet cannot be read"):
        store.columns(1)


def test_shards_that_leave_rows_out_are_refused(tmp_path: Path) -> None:
    manifest = write_index(tmp_path, integer_rows(2, 9), "float16", LEVELS, 5)
    for shards in (manifest.shards[:-1], manifest.shards[1:], [*manifest.shards, manifest.shards[0]]):
        with pytest.raises(CorruptIndexError, match="do not cover"):
            RowStore(tmp_path, manifest.model_copy(update={"shards": shards}))


MEASURE_READS = """
import pathlib, sys
import numpy as np, torch
sys.path.insert(0, sys.argv[2])
from made_index import write_index
from gradtrace.search.scored_rows import exhaustive_scores
from gradtrace.store.rows import RowStore

sys.path.insert(0, str(pathlib.Path(sys.argv[2]).parent))
from benchmarks.memory import peak

directory = pathlib.Path(sys.argv[1])
manifest = write_index(directory, np.ones((1, 30, 4096), np.float32), "float16", [16, 4096])
entry = manifest.shards[0]
size = 60_000 * (4096 * 2 + 4 + 8)
shard = entry.model_copy(update={"stop": 60_000, "rows": entry.rows.model_copy(update={"bytes": size})})
big = manifest.model_copy(update={"rows": 60_000, "shards": [shard]})
path = directory / entry.rows.path
with path.open("r+b") as file:
    file.truncate(size)  # 470 MB of zeros, most of them holes
big_store = RowStore(directory, big)
start = peak()
big_store.gather([0], torch.arange(0, 60_000, 600))
gathered = peak()
exhaustive_scores(big_store, torch.ones(1, 1, 4096), [0])
print(gathered - start, peak() - gathered)
"""


def test_a_gather_maps_little_and_a_scan_holds_one_block(tmp_path: Path) -> None:
    tests = str(Path(__file__).parent)
    command = [sys.executable, "-c", MEASURE_READS, str(tmp_path), tests]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    gather, scan = map(float, output.split())
    assert gather < 30
    # The mapped file itself counts while it is cached (470 MB); the float32 rows would be 940 MB on top of it.
    assert scan < 470 + 150
