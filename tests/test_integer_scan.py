"""Scans in integers: estimates are within their bounds, and answers are equal where there are no integer products."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import examples, mostly_long
from gradtrace.search.integer_product import LARGEST_CODE, integer_product, is_usable
from gradtrace.search.integer_scan import round_queries, scan
from gradtrace.store.manifest import Precision
from gradtrace.store.precision import level_widths, norms_of_levels, tail_norms
from made_index import make_store, write_index

needs_products = pytest.mark.skipif(not is_usable(), reason="this processor has no exact and fast integer products")


@needs_products
@pytest.mark.parametrize("code", [-128, -LARGEST_CODE, LARGEST_CODE, None])
@pytest.mark.parametrize("count", [1, 2, 16, 33])
@pytest.mark.parametrize("width", [1, 2, 7, 224, 1025])
def test_products_are_exact(width: int, count: int, code: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-128, 128, (50, width), dtype=torch.int8, generator=generator)
    rows = rows if code is None else torch.full_like(rows, code)
    vectors = torch.randint(-LARGEST_CODE, LARGEST_CODE + 1, (count, width), dtype=torch.int8, generator=generator)
    products = torch.empty(count, 50, dtype=torch.int32)
    integer_product(vectors, rows, products)
    assert np.array_equal(products.numpy(), vectors.numpy().astype(np.int64) @ rows.numpy().astype(np.int64).T)


@needs_products
@settings(max_examples=examples(60), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    precision=st.sampled_from(["int8", "int4"]),
    levels=st.sampled_from([[1], [9], [2, 20], [4, 6, 12, 25], [32, 256, 700]]),
    count=st.sampled_from([1, 2, 17]),
    decay=st.sampled_from([0.0, 1.0, 3.0]),
    white=st.booleans(),
    threads=st.sampled_from([1, 3]),
)
def test_estimates_are_within_their_bounds(
    seed: int, precision: Precision, levels: list[int], count: int, decay: float, white: bool, threads: int
) -> None:
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, levels[-1] + 1) ** -decay
    rows = rng.standard_normal((2, 300, levels[-1])) * spectrum * 10.0 ** rng.uniform(-20, 20, (1, 300, 1))
    rows[:, rng.random(300) < 0.1] = 0
    queries = rng.standard_normal((count, 2, levels[-1])) * (1 / spectrum if white else spectrum)
    queries /= np.linalg.norm(queries, axis=(1, 2), keepdims=True)
    queries = torch.from_numpy(queries.astype(np.float32))
    with tempfile.TemporaryDirectory() as name:
        store = make_store(Path(name), rows.astype(np.float32), precision, levels, 130)
        rounded = round_queries(queries, levels, store.column_scales([1, 0]))
        estimates = scan(store, rounded, [1, 0], threads).double()
        stored = torch.cat([block for _, block in store.blocks([1, 0], 1000)]).double()  # [rows, C, D]
    exact = torch.einsum("rcd,qcd->qr", stored, queries.double())
    missing = torch.einsum("rcd,qcd->qr", stored, rounded.residuals.double())

    def norms(values: torch.Tensor) -> torch.Tensor:
        return torch.stack([columns.norm(dim=2) for columns in values.double().split(level_widths(levels), 2)], dim=2)

    of_rows, of_queries = norms(stored), norms(queries)
    products = torch.einsum("rcl,qcl->qr", of_rows, of_queries)
    assert ((estimates + missing - exact).abs() <= (len(levels) + 2 + 8) * 2.0**-21 * products).all()
    bounds = torch.einsum("rcl,qcl->qr", of_rows, rounded.residual_norms.double())
    assert ((estimates - exact).abs() <= bounds + 2.0**-17 * products).all()
    assert (rounded.residual_norms.double() >= norms(rounded.residuals) * (1 - 1e-6)).all()


@needs_products
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_threads_share_the_rows_of_long_shards(tmp_path: Path, precision: Precision) -> None:
    rows = np.random.default_rng(0).standard_normal((2, 40_001, 40)).astype(np.float32)
    store = make_store(tmp_path, rows, precision, [8, 40], 30_005)
    queries = torch.from_numpy(rows[:, :3].transpose(1, 0, 2).copy()) / 100
    rounded = round_queries(queries, store.levels, store.column_scales([0, 1]))
    alone = scan(store, rounded, [0, 1], 1)
    assert torch.equal(alone, scan(store, rounded, [0, 1], 3))
    stored = torch.cat([block for _, block in store.blocks([0, 1], 10_000)]).double()
    torch.testing.assert_close(alone.double(), torch.einsum("rcd,qcd->qr", stored, queries.double()), rtol=0, atol=0.02)


@settings(max_examples=examples(100), deadline=None)
@given(seed=st.integers(0, 2**32 - 1), decades=st.sampled_from([0, 3, 20, 44]), zeros=st.sampled_from([0.0, 0.5]))
def test_norms_of_levels_are_bounds_and_tight(seed: int, decades: int, zeros: float) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((50, 20)) * 10.0 ** rng.uniform(-decades, min(decades, 20), (50, 20))
    rows[rng.random((50, 20)) < zeros] = 0
    rows = torch.from_numpy(rows.astype(np.float32))
    levels = [1, 4, 12, 20]
    norms = norms_of_levels(tail_norms(rows, levels)).double()
    exact = torch.stack([columns.double().norm(dim=1) for columns in rows.split(level_widths(levels), 1)], dim=1)
    tails = torch.stack([rows[:, start:].double().norm(dim=1) for start in [0, *levels[:-1]]], dim=1)
    assert (norms >= exact).all()
    assert (norms <= exact + 2.0**-10 * tails + 2.0**-140).all()


_SEARCH = """
import json, sys, torch
from pathlib import Path
from gradtrace.search.exact_search import ProgressiveSearcher
from gradtrace.search.integer_product import is_usable
from gradtrace.store.manifest import Manifest
from gradtrace.store.rows import RowStore
path = Path(sys.argv[1])
queries = torch.load(path / "queries.pt")
manifest = Manifest.model_validate_json((path / "described.json").read_bytes())
searcher = ProgressiveSearcher(RowStore(path, manifest), route="scan")
results = searcher.search(queries, [0, 1], 5) + searcher.search(queries[:1, :1], [1], 5)
ends = [end for result in results for end in (result.top, result.bottom)]
print(json.dumps([is_usable(), [[end.rows.tolist(), end.scores.tolist(), end.parts.tolist()] for end in ends]]))
"""


def answers(path: Path, **instructions: str) -> tuple[bool, object]:
    """Whether integer products are usable with the processor's instructions limited so, and the answers."""
    command = [sys.executable, "-c", _SEARCH, str(path)]
    output = subprocess.run(command, env=os.environ | instructions, check=True, capture_output=True, text=True).stdout
    usable, ends = json.loads(output)
    return usable, ends


@pytest.mark.parametrize("precision", mostly_long(["int8", "int4"], "int4"))
def test_answers_are_equal_where_the_processor_lacks_products(tmp_path: Path, precision: Precision) -> None:
    """Older processors saturate sums of products in 16 bits, or multiply one by one."""
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((2, 2000, 64)) / np.arange(1, 65) ** 0.5).astype(np.float32)
    rows[:, 1000:1100] = rows[:, :100]  # ties
    manifest = write_index(tmp_path, rows, precision, [8, 24, 64])
    (tmp_path / "described.json").write_text(manifest.model_dump_json())
    queries = torch.from_numpy(rng.standard_normal((5, 2, 64)).astype(np.float32))
    torch.save(queries, tmp_path / "queries.pt")
    _, expected = answers(tmp_path)
    assert answers(tmp_path, ATEN_CPU_CAPABILITY="default")[1] == expected
    usable, ends = answers(tmp_path, ONEDNN_MAX_CPU_ISA="SSE41", ATEN_CPU_CAPABILITY="default")
    assert ends == expected
    assert not usable or platform.machine() != "x86_64"
