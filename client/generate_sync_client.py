"""Writes the synchronous client from the asynchronous one, by replacing words."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent / "gradtrace_client" / "_async_client.py"
TARGET = SOURCE.with_name("_sync_client.py")
BANNER = f"""# Generated from {SOURCE.name} by {Path(__file__).name}: edit that file and run `make client`.
# ruff: noqa: UP028
"""
REPLACEMENTS = {
    r'""".* `make client` generates .*"""': '"""Client: every call of the API."""',
    r"import asyncio\n": "",
    r"asyncio\.sleep": "time.sleep",
    r"\bAsync([A-Z]\w*)": r"\1",
    r"\basync (def|with|for)": r"\1",
    r"\bawait ": "",
    r"\ba(connect_sse|iter_sse|close)\b": r"\1",
    r"\b__a(enter|exit)__": r"__\1__",
    r"shared by tasks": "shared by threads",
}


def sync_client() -> str:
    """The text of the synchronous client's module."""
    text = BANNER + SOURCE.read_text()
    for pattern, replacement in REPLACEMENTS.items():
        text, count = re.subn(pattern, replacement, text)
        if count == 0:
            raise ValueError(f"nothing in {SOURCE.name} matches {pattern!r}: remove the replacement")
    for command in (["check", "--select", "I", "--fix"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--quiet", "--stdin-filename", str(TARGET), "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout
    return text


if __name__ == "__main__":
    TARGET.write_text(sync_client())
