"""Run, without a container engine, what the images install and what compose.yaml starts: `make docker-check`.

In a clean directory: the files that the Dockerfile copies, install.sh, then the commands of compose.yaml, with the
image's environment, and directories in place of volumes. The service must pass the image's health check,
answer, be scraped, index anew, and end on SIGTERM.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
DOCKERFILE = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
SERVICES = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
SCRAPE = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"][0]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        for name in ("data", "installed", "source"):
            (base / name).mkdir()
        shutil.copytree(ROOT / "examples", base / "examples")
        install(base)
        subprocess.run(command(base, "example"), env=environment(base, "example"), cwd=base / "data", check=True)
        with subprocess.Popen(command(base, "service"), env=environment(base, "service"), cwd=base / "data") as service:
            try:
                check_service(environment(base, "service"))
            finally:
                service.terminate()
    assert service.returncode == 0, f"SIGTERM ended the service with {service.returncode}"
    print("docker-check: what the images run works")


def install(base: Path) -> None:
    """From a copy of what the Dockerfile copies, by the command that it runs, with pip's own choice of PyTorch."""
    for words in re.findall(r"^COPY ([^-\n]+) /source/(\S*)$", DOCKERFILE, re.MULTILINE):
        copy(words[0].split(), base / "source" / words[1])
    torch = re.findall(r"^ARG TORCH=(\S+)", DOCKERFILE, re.MULTILINE)[0]
    subprocess.run(["sh", base / "source/install.sh", base / "source", base / "installed", torch], check=True)


def copy(names: list[str], target: Path) -> None:
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, target)


def environment(base: Path, service: str) -> dict[str, str]:
    """That of the image and of the service, and nothing of this process's own."""
    image = re.findall(r"^ENV (.*)$", DOCKERFILE.split(" AS runtime")[1], re.MULTILINE)[0]
    named = dict(re.findall(r"(\w+)=(\S+)", image)) | SERVICES[service].get("environment", {})
    return named | {"PATH": f"{base}/installed/bin:{os.environ['PATH']}", "HOME": str(base)}


def command(base: Path, service: str) -> list[str]:
    words = [re.sub(r"(^|=)/(data|examples)\b", rf"\1{base}/\2", word) for word in SERVICES[service]["command"]]
    return ["gradtrace", *words]


def check_service(env: dict[str, str]) -> None:
    url = f"http://127.0.0.1:{env['GRADTRACE_PORT']}"
    wait_until_healthy(env)
    assert fetch(f"{url}/influence", {"query_rows": [0], "index": "digits"})["results"]
    assert SCRAPE["static_configs"][0]["targets"] == [f"service:{env['GRADTRACE_PORT']}"]
    with urllib.request.urlopen(url + SCRAPE["metrics_path"]) as metrics:
        assert b"gradtrace_requests_total" in metrics.read()
    job = fetch(f"{url}/reindex", {})
    while job["state"] == "running":
        time.sleep(1)
        job = fetch(f"{url}/jobs/{job['id']}")
    assert job["state"] == "succeeded", job["error"]


def wait_until_healthy(env: dict[str, str]) -> None:
    for _ in range(60):
        if subprocess.run([sys.executable, FOLDER / "healthcheck.py"], env=env, check=False).returncode == 0:
            return
        time.sleep(2)
    sys.exit("the service did not become healthy within two minutes")


def fetch(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        found: dict[str, Any] = json.load(response)
    return found


if __name__ == "__main__":
    main()
