"""Settings by flag, environment and file."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic_settings import TomlConfigSettingsSource

from gradtrace_service.settings import Settings, SettingsError, read_settings

pytestmark = pytest.mark.unit

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text("queue_size = 1\nbatch_size = 1\nport = 1\n")
    return path


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"GRADTRACE_{name.upper()}", raising=False)


def test_every_setting_is_on_the_page() -> None:
    page = (DOCS / "settings.md").read_text()
    for name in Settings.model_fields:
        row = f"| `--{name.replace('_', '-')}` | `GRADTRACE_{name.upper()}` | `{name}` |"
        assert row in page
        assert Settings.model_fields[name].description


def test_the_sample_file_is_read() -> None:
    given = TomlConfigSettingsSource(Settings, DOCS / "gradtrace.toml")()
    read = read_settings(DOCS / "gradtrace.toml")
    assert {name: getattr(read, name) for name in given} == given


def test_flags_go_before_the_environment_and_that_before_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADTRACE_BATCH_SIZE", "2")
    monkeypatch.setenv("GRADTRACE_PORT", "2")
    read = read_settings(file, port=3, host=None)
    assert (read.queue_size, read.batch_size, read.port, read.host) == (1, 2, 3, "127.0.0.1")


def test_lists_are_given_in_each_way(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [Path("/a"), Path("/b")]
    file.write_text('checkpoints = ["/a", "/b"]')
    assert read_settings(file).checkpoints == wanted
    assert read_settings(None, checkpoints=wanted).checkpoints == wanted
    monkeypatch.setenv("GRADTRACE_CHECKPOINTS", "/a,/b")
    monkeypatch.setenv("GRADTRACE_CORS_ORIGINS", "https://a.org")
    read = read_settings(None)
    assert (read.checkpoints, read.cors_origins) == (wanted, ["https://a.org"])


def test_other_variables_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADTRACE_DATA", "/data")
    monkeypatch.setenv("GRADTRACE_API_KEY", "secret")
    assert read_settings(None).model_dump() == Settings().model_dump()
    assert not {"data", "api_key"} & set(Settings.model_fields)


def test_a_flag_that_does_not_fit() -> None:
    with pytest.raises(SettingsError, match=r"--port is 70000: .*less than or equal to 65535.*docs/settings.md"):
        read_settings(None, port=70000)


def test_a_variable_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADTRACE_LOG_FORMAT", "xml")
    with pytest.raises(SettingsError, match=r"GRADTRACE_LOG_FORMAT is 'xml': .*'text' or 'json'"):
        read_settings(None)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("queue_size = 'many'", r"queue_size in .*settings.toml is 'many': .*integer"),
        ("queue_sise = 3", r"settings.toml: queue_sise is not a setting; did you mean queue_size\?"),
        ("data = '/data'", r"settings.toml: data is not a setting"),
        ("[serve]\nport = 1", r"settings.toml: serve is not a setting"),
        ("port 1", r"settings.toml is not TOML: .*line 1"),
    ],
)
def test_a_file_that_does_not_fit(file: Path, text: str, complaint: str) -> None:
    file.write_text(text)
    with pytest.raises(SettingsError, match=complaint):
        read_settings(file)
