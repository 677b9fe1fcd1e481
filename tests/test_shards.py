"""The shard file: its bytes against an independent reading of the format, and the faults that a writer must survive."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from numpy.typing import NDArray

from gradtrace.durable import final_name
from gradtrace.errors import CorruptIndexError, StoreError
from gradtrace.store.index_files import hash_file
from gradtrace.store.manifest import Precision
from gradtrace.store.precision import decode
from gradtrace.store.shards import Shard, ShardLayout, default_levels
from gradtrace_indexer.writing.shard_writer import ShardWriter

pytestmark = pytest.mark.unit

NAME = "rows/a.pt/000000000.rows"


def normal_rows(count: int, columns: int) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(1)) * 1e-6


def read_independently(
    path: Path, rows: int, levels: list[int], precision: Precision
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Dequantised values [rows, D] (before the columns' scales) and tail norms [rows, levels], by the words of the
    format and numpy alone."""
    data, position = path.read_bytes(), 0

    def block(dtype: str, width: int) -> NDArray[np.float64]:
        nonlocal position
        values = np.frombuffer(data, dtype, rows * width, position).reshape(rows, width)
        end = position + values.nbytes
        position = end + -end % 64
        assert not any(data[end:position])
        return values

    def level(width: int) -> NDArray[np.float64]:
        if precision != "int4":
            return block({"float16": "<f2", "int8": "i1"}[precision], width).astype(np.float64)
        packed = block("u1", -(-width // 2)).astype(int).tolist()
        nibbles = [[half - 8 for byte in row for half in (byte % 16, byte // 16)] for row in packed]
        return np.array([row[:width] for row in nibbles], np.float64)

    parts = [level(width) for width in np.diff([0, *levels]).tolist()]
    scales, tails = block("<f4", 1), block("<f4", len(levels))
    assert position == len(data)
    return np.concatenate(parts, axis=1) * scales, tails.astype(np.float32)


@pytest.mark.parametrize("precision", ["float16", "int8", "int4"])
@pytest.mark.parametrize("levels", [[4, 10, 33], [7], [64, 128]])
def test_the_file_is_the_documented_layout(tmp_path: Path, precision: Precision, levels: list[int]) -> None:
    rows = normal_rows(29, levels[-1])
    layout = ShardLayout(29, tuple(levels), precision)
    scales = torch.linspace(1, 0.01, levels[-1]) if precision == "int4" else None
    with ShardWriter(tmp_path, NAME, layout, scales) as writer:
        for batch in rows.split([1, 20, 0, 8]):
            writer.append(batch)
        entry = writer.commit()
    path = tmp_path / NAME
    values, tails = read_independently(path, 29, levels, precision)
    if scales is not None:
        values = (values.astype(np.float32) * scales.numpy()).astype(np.float64)
    step = 100 / 14 if precision == "int4" else 1 / 254
    assert np.abs(values - rows.numpy()).max() <= np.abs(rows.numpy()).max() * step
    exact = [np.linalg.norm(values[:, start:], axis=1) for start in [0, *levels[:-1]]]
    np.testing.assert_allclose(tails, np.stack(exact, axis=1), rtol=3e-7)
    content = path.read_bytes()
    assert (entry.path, entry.bytes, entry.xxh3) == (NAME, len(content), xxhash.xxh3_128_hexdigest(content))
    shard = Shard(path, layout)
    decoded = [decode(*part) for part in zip(shard.levels, [shard.scales] * 3, by_level(scales, layout), strict=False)]
    np.testing.assert_array_equal(torch.cat(decoded, dim=1), values.astype(np.float32))
    np.testing.assert_array_equal(shard.tails, tails)
    assert list(path.parent.iterdir()) == [path]


def by_level(scales: torch.Tensor | None, layout: ShardLayout) -> Sequence[torch.Tensor | None]:
    return [None] * len(layout.levels) if scales is None else scales.split(layout.widths)


def test_levels_of_an_odd_width_cannot_be_packed() -> None:
    with pytest.raises(StoreError, match="levels must be of even width"):
        ShardLayout(5, (3, 8), "int4")


def test_default_levels_ascend_to_the_dimensions() -> None:
    for dimensions in [1, 31, 32, 33, 64, 256, 300, 1000, 1024, 2048, 8192, 100_000]:
        levels = default_levels(dimensions)
        assert levels == sorted(set(levels))
        assert levels[-1] == dimensions
    assert default_levels(2048) == [32, 256, 1024, 2048]


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    layout = ShardLayout(5, (4,), "float16")
    with ShardWriter(tmp_path, NAME, layout) as writer:
        writer.append(torch.ones(3, 4))
        with pytest.raises(StoreError, match="5 rows of 4 columns, of which 3 are written"):
            writer.append(torch.ones(3, 4))
        with pytest.raises(StoreError, match="do not fit"):
            writer.append(torch.ones(1, 5))
        with pytest.raises(StoreError, match="needs 5 rows, only 3"):
            writer.commit()
    assert not list((tmp_path / NAME).parent.iterdir())


def test_a_failure_inside_the_block_leaves_no_file(tmp_path: Path) -> None:
    with (
        pytest.raises(StoreError, match="NaN"),
        ShardWriter(tmp_path, NAME, ShardLayout(2, (4,), "int8")) as writer,
    ):
        writer.append(torch.full((2, 4), torch.nan))
    assert not list((tmp_path / NAME).parent.iterdir())


def test_a_full_disk_is_reported_and_leaves_no_file(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with (
            pytest.raises(StoreError, match=r"000000000\.rows could not be written: .*space"),
            ShardWriter(tmp_path, NAME, ShardLayout(100, (64,), "float16")) as writer,
        ):
            writer.append(torch.ones(100, 64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / NAME).parent.iterdir())


WRITE_HALF = """
import sys, time, torch
from pathlib import Path
from gradtrace.store.shards import ShardLayout
from gradtrace_indexer.writing.shard_writer import ShardWriter
with ShardWriter(Path(sys.argv[1]), sys.argv[2], ShardLayout(8, (4,), "float16")) as writer:
    writer.append(torch.full((4, 4), 9.0))
    print("half", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITE_HALF, str(tmp_path), NAME], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        os.kill(process.pid, signal.SIGKILL)
    path = tmp_path / NAME
    assert not path.exists()
    layout, rows = ShardLayout(8, (4,), "float16"), normal_rows(8, 4)
    for directory in (tmp_path, tmp_path / "undisturbed"):
        with ShardWriter(directory, NAME, layout) as writer:
            writer.append(rows)
            writer.commit()
    assert path.read_bytes() == (tmp_path / "undisturbed" / NAME).read_bytes()
    assert {final_name(left.name) for left in path.parent.iterdir()} == {path.name}


def test_a_truncated_or_missing_file_is_named(tmp_path: Path) -> None:
    layout = ShardLayout(4, (8,), "float16")
    with pytest.raises(CorruptIndexError, match=r"absent\.rows is missing"):
        Shard(tmp_path / "absent.rows", layout)
    short = tmp_path / "short.rows"
    short.write_bytes(bytes(layout.bytes - 1))
    with pytest.raises(CorruptIndexError, match=rf"short\.rows has {layout.bytes - 1} bytes"):
        Shard(short, layout)


def test_hash_file_is_xxh3_128(tmp_path: Path) -> None:
    content = os.urandom(5_000_000)
    (tmp_path / "file").write_bytes(content)
    assert hash_file(tmp_path / "file") == xxhash.xxh3_128_hexdigest(content)
