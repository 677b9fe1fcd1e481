"""The example files of schedulers: linted, and those that are scripts run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tiny
from conftest import DigitsRun

FOLDER = Path(__file__).parents[1] / "deploy"
PROGRAMS = Path(sys.executable).parent
ARRAY = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "2"}


@pytest.mark.parametrize("words", [
    ["shellcheck", *sorted(path.name for path in FOLDER.glob("*.sh"))],
    ["kubernetes-validate", "kubernetes-job.yaml"],
], ids=lambda words: words[0])  # fmt: skip
def test_the_linters_have_nothing_to_say(words: list[str]) -> None:
    if not (PROGRAMS / words[0]).exists():
        pytest.skip(f"{words[0]} is not installed")
    done = subprocess.run([PROGRAMS / words[0], *words[1:]], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_pods_of_the_job_are_as_many_as_they_are_told() -> None:
    job = yaml.safe_load((FOLDER / "kubernetes-job.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (worker,) = pod["containers"]
    told = {variable["name"]: variable["value"] for variable in worker["env"]}
    assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert told == {"JOB_COMPLETIONS": str(job["spec"]["completions"])}
    assert pod["restartPolicy"] == "Never"
    assert pod["securityContext"]["runAsNonRoot"]
    assert worker["securityContext"]["capabilities"]["drop"] == ["ALL"]
    assert {mount["name"] for mount in worker["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_every_file_names_options_that_are_there() -> None:
    told = subprocess.run([PROGRAMS / "gradtrace", "build", "--help"], capture_output=True, text=True, check=True)
    for path in FOLDER.iterdir():
        text = path.read_text()
        assert "gradtrace" in text
        options = set(re.findall(r"(?<![\w-])--(?:checkpoints|out|rank|ray|device|workers|world)\b", text))
        assert options
        assert all(option in told.stdout for option in options)


@pytest.mark.long
@pytest.mark.parametrize(("script", "environments"), [
    ("slurm-array.sh", [ARRAY, ARRAY | {"SLURM_ARRAY_TASK_ID": "1"}]),
    ("torchrun.sh", [{"DEVICE": "cpu"}]),
])  # fmt: skip
def test_a_script_builds_the_index(
    digits_index: DigitsRun, tmp_path: Path, script: str, environments: list[dict[str, str]]
) -> None:
    variables = {
        "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
        "TASK": digits_index.task,
        "CHECKPOINTS": str(digits_index.checkpoints),
    }
    words = [FOLDER / script, *(["2"] if script == "torchrun.sh" else [])]
    processes = [
        subprocess.Popen(words, env={**os.environ, **variables, **more, "INDEX": str(tmp_path / "index")})
        for more in environments
    ]
    assert [process.wait(600) for process in processes] == [0 for _ in processes]
    command = ["gradtrace", "build", digits_index.task, "--checkpoints", str(digits_index.checkpoints)]
    subprocess.run([PROGRAMS / command[0], *command[1:], "--out", str(tmp_path / "alone")], check=True)
    assert tiny.files(tmp_path / "index") == tiny.files(tmp_path / "alone")
