"""Writes the synchronous client's modules from those of the asynchronous one, by replacing words."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SOURCES = sorted((Path(__file__).parent / "gradtrace_client").glob("_async_*.py"))
BANNER = f"""# Generated from {{}} by {Path(__file__).name}: edit that file and run `make client`.
# ruff: noqa: RUF100, UP028
"""
REPLACEMENTS = {
    r"`?AsyncClient`?: every call of the API\. `make client` generates .*": 'Client: every call of the API."""',
    r" `make client` generates .*": '"""',
    r"\b_async_(\w*)": r"_sync_\1",
    r"import asyncio\n": "",
    r"asyncio\.sleep": "time.sleep",
    r"\bAsync([A-Z]\w*)": r"\1",
    r"\basync (def|with|for)": r"\1",
    r"\bawait ": "",
    r"\ba(connect_sse|iter_sse|read|close)\b": r"\1",
    r"\b__a(enter|exit)__": r"__\1__",
    r"shared by tasks": "shared by threads",
}


def sync_modules() -> dict[Path, str]:
    """The texts of the synchronous client's modules, by their files."""
    texts = [source.read_text() for source in SOURCES]
    for pattern, replacement in REPLACEMENTS.items():
        if not any(re.search(pattern, text) for text in texts):
            raise ValueError(f"nothing in the asynchronous client matches {pattern!r}: remove the replacement")
        texts = [re.sub(pattern, replacement, text) for text in texts]
    targets = [source.with_name(source.name.replace("_async_", "_sync_")) for source in SOURCES]
    banners = [BANNER.format(source.name) for source in SOURCES]
    return {
        target: _formatted(target, banner + text) for target, banner, text in zip(targets, banners, texts, strict=True)
    }


def _formatted(target: Path, text: str) -> str:
    for command in (["check", "--select", "I", "--fix"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--quiet", "--stdin-filename", str(target), "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout
    return text


if __name__ == "__main__":
    for path, text in sync_modules().items():
        path.write_text(text)
