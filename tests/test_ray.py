"""A build on a Ray cluster that loses a machine and gets another. (Its machines are groups of processes here.)"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import tiny
from conftest import wait_until
from gradtrace.errors import LossError, StoreError
from gradtrace_indexer import build_index
from gradtrace_indexer.work.watching import unfinished_steps
from shared_work import FailingTask, SharedTask, checkpoints, small_steps

assert small_steps  # a fixture
pytestmark = pytest.mark.usefixtures("small_steps")
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install gradtrace[ray]")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Of two machines with one core each; Ray is ended with it."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("SLEEP", "0.1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's own
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        cluster.connect()
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.long  # Ray takes a minute to take a machine for lost
def test_a_machine_that_is_lost_and_another_that_joins_change_no_byte(cluster: Any, tmp_path: Path) -> None:
    found, path = checkpoints(tmp_path / "checkpoints"), tmp_path / "index"
    shared: Any = {"batch_size": 16, "progress": False, "ray": "auto", "workers": 2}
    build_index(SharedTask(), found, tmp_path / "alone", batch_size=16, progress=False)

    def done() -> int:
        return sum(state.is_done for state in unfinished_steps(path))

    with ThreadPoolExecutor(1) as thread:  # Ray adds machines only from the main thread
        built = thread.submit(build_index, SharedTask(), found, path, **shared)
        wait_until(lambda: done() > 2 or built.done())
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        before = done()
        wait_until(lambda: done() > before or built.done())
        assert not built.done()
        cluster.add_node(num_cpus=1)
        built.result()
    assert tiny.files(path) == tiny.files(tmp_path / "alone")
    with pytest.raises(LossError, match=r"row\(s\) 150"):  # what an actor raises is raised here
        build_index(FailingTask(), found, tmp_path / "failed", **shared)


def test_no_cluster_there(tmp_path: Path) -> None:
    found = checkpoints(tmp_path / "checkpoints")
    with pytest.raises(StoreError, match=r"no Ray cluster at '127.0.0.1:1'.*ray start --head"):
        build_index(SharedTask(), found, tmp_path / "index", progress=False, ray="127.0.0.1:1")
