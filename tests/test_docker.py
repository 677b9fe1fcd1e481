"""The images and the compose file, without a container engine; `make docker-check` also runs what they install."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import DigitsRun
from gradtrace_service.app import create_service
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings

FOLDER = Path(__file__).parents[1] / "docker"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
RUNTIME = DOCKERFILE.split(" AS runtime\n")[1]  # what is in the images


@pytest.mark.parametrize(
    "words",
    [
        ["hadolint", "Dockerfile"],
        ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"],
    ],
)
def test_the_linters_have_nothing_to_say(words: list[str]) -> None:
    linter = Path(sys.executable).with_name(words[0])
    if not linter.exists():
        pytest.skip(f"{words[0]} is not installed; the extra `dev` has it")
    done = subprocess.run([linter, *words[1:]], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_images_run_as_nobody_and_say_whether_they_are_ready() -> None:
    assert re.findall(r"^USER (\S+)$", RUNTIME, re.MULTILINE) == ["10001:10001"]
    assert "HEALTHCHECK" in RUNTIME
    assert re.search(r"^EXPOSE 8000$", RUNTIME, re.MULTILINE)
    assert re.search(r"^FROM runtime AS cpu$", RUNTIME, re.MULTILINE)
    assert re.search(r"^FROM runtime AS cuda$", RUNTIME, re.MULTILINE)


def test_base_images_are_named_by_version() -> None:
    stages = set(re.findall(r" AS (\S+)$", DOCKERFILE, re.MULTILINE))
    bases = set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) - stages
    bases |= {service["image"] for service in COMPOSE["services"].values() if "build" not in service}
    assert bases
    for base in bases:
        assert re.search(r":v?\d+\.\d+\.\d+", base), f"{base} may be another one tomorrow"


def test_what_the_dockerfile_copies_is_there_and_let_through() -> None:
    allowed = (FOLDER.parent / ".dockerignore").read_text().split()
    for name in " ".join(re.findall(r"^COPY (?!--)(.*) \S+$", DOCKERFILE, re.MULTILINE)).split():
        assert (FOLDER.parent / name).exists()
        assert f"!{name}" in allowed


def test_services_are_given_no_more_than_they_need() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name} is published to other machines"


def test_the_settings_are_settings() -> None:
    named = set(re.findall(r"\bGRADTRACE_(\w+)=", RUNTIME)) | {
        key.removeprefix("GRADTRACE_")
        for service in COMPOSE["services"].values()
        for key in service.get("environment", ())
    }
    assert named <= {name.upper() for name in Settings.model_fields}


def test_the_health_check_asks_the_service(digits_index: DigitsRun) -> None:
    def code(port: str) -> int:
        environment = os.environ | {"GRADTRACE_PORT": port}
        return subprocess.run([sys.executable, FOLDER / "healthcheck.py"], env=environment, check=False).returncode

    hosted = [Hosted("digits", digits_index.index, digits_index.task)]
    with serving(create_service(hosted, Settings(processes=0))) as url:
        port = url.rpartition(":")[2]
        codes = [code(port)]
        while codes[-1] and len(codes) < 50:
            codes.append(code(port))
        assert codes[-1] == 0
    assert code(port) == 1


def test_prometheus_asks_the_service_of_the_compose_file() -> None:
    scrape = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"][0]
    assert scrape["metrics_path"] == "/metrics"
    service, port = scrape["static_configs"][0]["targets"][0].split(":")
    assert service in COMPOSE["services"]
    assert f"GRADTRACE_PORT={port}" in RUNTIME


def test_the_shell_can_read_the_install_steps() -> None:
    subprocess.run(["sh", "-n", FOLDER / "install.sh"], check=True)
