"""Shards that are Ray's actors: the answers of one searcher, also after an actor was killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shard_questions
import tiny
from conftest import FRAMEWORK_WARNINGS
from gradtrace import CorruptIndexError, open_index
from gradtrace.errors import ShardLostError
from gradtrace.sharded.opening import open_shards
from gradtrace.store.manifest_file import read_manifest
from test_sharded_index import check_result

ray: Any = pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = FRAMEWORK_WARNINGS


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    folders = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent)])
    environment = {"env_vars": {"PYTHONPATH": folders}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


@pytest.mark.long
def test_actors_answer_as_one_searcher_also_after_one_was_killed(tmp_path: Path) -> None:
    task, queries = tiny.ClassTask(tiny.mlp, tiny.classes(30)), tiny.classes(3, seed=2)
    whole = tiny.build(task, tmp_path)
    sharded = open_index(tmp_path / "index", task, shards=2, ray="local")
    assert sharded.contents.shards is not None
    before = sharded.contents.shards.ask_all(lambda window: shard_questions.pid)
    for killed in (None, before[1]):
        if killed is not None:
            os.kill(killed, signal.SIGKILL)
        for method in ("tracin", "cosine", "repsim"):
            include = ["percentiles", "histogram", "clusters", "layers"] if method != "repsim" else ["percentiles"]
            answers = [index.influence(queries, k=4, method=method, include=include) for index in (sharded, whole)]  # type: ignore[arg-type]
            for result, expected in zip(*answers, strict=True):
                check_result(result, expected)
    after = sharded.contents.shards.ask_all(lambda window: shard_questions.pid)
    assert after[0] == before[0]
    assert after[1] != before[1]
    sharded.close()


@pytest.mark.long
def test_what_cannot_be_answered_is_an_error(tmp_path: Path) -> None:
    task = tiny.ClassTask(tiny.mlp, tiny.classes(30))
    tiny.build(task, tmp_path)
    manifest = read_manifest(tmp_path / "index")
    shards = open_shards(tmp_path / "index", manifest, 2, "local")
    with pytest.raises(MemoryError, match="too much"):
        shards.ask({0: shard_questions.pid, 1: shard_questions.fails})
    with pytest.raises(ShardLostError, match="rows 15 to 30"):
        shards.ask({0: shard_questions.pid, 1: shard_questions.dies})
    assert len(shards.ask_all(lambda window: shard_questions.pid)) == 2
    shards.close()
    path = tmp_path / "index" / manifest.shards[0].rows.path
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CorruptIndexError, match="is damaged"):
        open_shards(tmp_path / "index", manifest, 2, "local")
