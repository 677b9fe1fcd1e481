"""Claims of steps, which one worker holds at a time, and the ranks that schedulers give to workers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import wait_until
from gradtrace.errors import StoreError
from gradtrace_indexer.work import claims
from gradtrace_indexer.work.claims import Claims
from gradtrace_indexer.work.sharing import Rank, rank_of

# Ranks


@pytest.mark.parametrize("environment", [
    {"RANK": "3", "WORLD_SIZE": "8"},
    {"SLURM_ARRAY_TASK_ID": "11", "SLURM_ARRAY_TASK_COUNT": "8"},
    {"JOB_COMPLETION_INDEX": "3", "JOB_COMPLETIONS": "8"},
], ids=lambda names: next(iter(names)))  # fmt: skip
def test_the_scheduler_says_which_rank_it_is(environment: dict[str, str]) -> None:
    assert rank_of("env", None, environment) == Rank(3, 8)


@pytest.mark.parametrize(("number", "world"), [("4", 4), ("1", None), ("-1", 4), ("one", 4), ("env", None)])
def test_a_rank_that_cannot_be(number: str, world: int | None) -> None:
    with pytest.raises(StoreError, match="--rank"):
        rank_of(number, world, {})


# Claims


def test_a_claim_is_held_by_one(tmp_path: Path) -> None:
    first, second = Claims(tmp_path / "claims", "a"), Claims(tmp_path / "claims", "b")
    with first.claimed("x") as held:
        assert held is not None
        held.advance(5)
        with second.claimed("x") as refused, second.claimed("y") as other:
            assert refused is None
            assert other is not None
            assert {step: holder.worker for step, holder in first.holders().items()} == {"x": "a", "y": "b"}
        wait_until(lambda: first.holders()["x"].units == 5)
        assert not second.is_abandoned("x")
    assert second.is_abandoned("x")
    assert list((tmp_path / "claims").iterdir()) == []


def test_many_processes_claim_and_none_holds_what_another_does(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from gradtrace_indexer.work.claims import Claims\n"
        "claims, seen = Claims(Path(sys.argv[1])), Path(sys.argv[2])\n"
        "for _ in range(60):\n"
        "    with claims.claimed('x') as held:\n"
        "        if held is not None:\n"
        "            seen.touch(exist_ok=False); time.sleep(.002); seen.unlink()\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "claims"), str(tmp_path / "seen")]
    processes = [subprocess.Popen(words) for _ in range(3)]
    assert [process.wait(300) for process in processes] == [0, 0, 0]


def test_the_claim_of_a_process_that_was_killed_is_taken_at_once(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from gradtrace_indexer.work.claims import Claims\n"
        "with Claims(Path(sys.argv[1])).claimed('x'): time.sleep(600)"
    )
    others = Claims(tmp_path)
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) as process:
        wait_until(lambda: "x" in others.holders())
        assert not others.is_abandoned("x")
        process.kill()
    with others.claimed("x") as held:
        assert held is not None


def test_a_claim_of_another_machine_is_taken_when_its_lease_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_machine", lambda: "there")
    there = Claims(tmp_path, "there").claimed("x")
    theirs = there.__enter__()
    assert theirs is not None
    monkeypatch.setattr(claims, "_machine", lambda: "here")
    here = Claims(tmp_path, "here")
    assert not here.is_abandoned("x")
    theirs._ended.set()  # as if that machine had stopped
    monkeypatch.setattr(claims, "LEASE_SECONDS", 0.3)
    wait_until(lambda: here.is_abandoned("x"))
    with here.claimed("x") as held:
        assert held is not None
        there.__exit__(None, None, None)  # it goes on, and leaves alone what is another's now
        assert here.holders()["x"].worker == "here"


def test_a_claim_whose_content_was_lost_is_taken_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.claim").write_bytes(b"")
    here = Claims(tmp_path)
    monkeypatch.setattr(claims, "LEASE_SECONDS", 0.3)

    def taken() -> bool:
        with here.claimed("x") as held:
            return held is not None

    assert not taken()
    wait_until(taken)
