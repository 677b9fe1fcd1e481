"""Who may ask, how much, and what an answer gives away: over real HTTP."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import os
import re
import shutil
import socket
import stat
import struct
import sys
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from conftest import DigitsRun, serving_when_ready
from gradtrace_client import AuthenticationError, BusyError, Client, ForbiddenError
from gradtrace_client.service_schemas import Problem
from gradtrace_service import cli
from gradtrace_service.app import create_app, create_service
from gradtrace_service.http.access import OPEN, RateLimit, network
from gradtrace_service.http.api_keys import KeyFile, Scope, add_key, read_keys
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.server import answer_local_names_alone, refuse_public, serving
from gradtrace_service.settings import Settings, SettingsError, read_settings

ASKED = {"query_rows": [0], "k": 1}


@dataclass(frozen=True)
class Guarded:
    """A service with keys."""

    url: str
    keys: Path
    audit: Path
    query: str
    admin: str


@pytest.fixture(scope="module")
def guarded(digits_index: DigitsRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    out = tmp_path_factory.mktemp("guarded")
    keys, audit = out / "keys", out / "audit"
    query, admin = add_key(keys, "reader", [Scope.query]), add_key(keys, "keeper", [Scope.admin])
    shutil.copytree(digits_index.index, out / "index")
    hosted = [Hosted("index", out / "index", digits_index.task, [digits_index.checkpoints])]
    with serving_when_ready(create_service(hosted, Settings(processes=0, api_key_file=keys, audit_log=audit))) as url:
        yield Guarded(url, keys, audit, query, admin)


@pytest.fixture(scope="module")
def url(digits_index: DigitsRun) -> Iterator[str]:
    """A service without keys."""
    with serving(create_app(digits_index.open())) as address:
        yield address


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=30) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def problem(response: httpx.Response, status: int) -> Problem:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    found = Problem.model_validate_json(response.content)
    assert found.request_id == response.headers["x-request-id"]
    return found


def operations(http: httpx.Client, url: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path and description of everything that OpenAPI names."""
    for path, verbs in http.get(f"{url}/openapi.json").json()["paths"].items():
        for verb, operation in verbs.items():
            yield verb.upper(), path, operation


def test_every_operation_but_health_needs_a_key_and_says_so(http: httpx.Client, guarded: Guarded) -> None:
    found = list(operations(http, guarded.url))
    assert len(found) > 9
    for verb, path, operation in found:
        response = http.request(verb, guarded.url + path)
        if path in OPEN:
            assert response.status_code == 200
            assert "security" not in operation
        else:
            problem(response, 401)
            assert response.headers["www-authenticate"].startswith("Bearer")
            assert operation["security"] == [{"HTTPBearer": []}]
            assert {"401", "403", "429"} <= set(operation["responses"])


def test_a_key_opens_what_its_scope_names(http: httpx.Client, guarded: Guarded) -> None:
    for verb, path, _ in operations(http, guarded.url):
        admin = path.startswith(("/reindex", "/rows", "/retrain", "/jobs"))
        for key, may in ((guarded.query, not admin), (guarded.admin, admin)):
            with http.stream(verb, guarded.url + path, headers=bearer(key)) as response:  # /events has no end
                assert (response.status_code == 403) == (not may and path not in OPEN | {"/whoami"}), path
                if response.status_code == 403:
                    response.read()
                    assert ("admin" if admin else "query") in problem(response, 403).detail
                    assert "insufficient_scope" in response.headers["www-authenticate"]
    with Client(guarded.url, guarded.query) as client:
        assert len(client.influence(**ASKED).results) == 1
    assert http.get(f"{guarded.url}/jobs", headers=bearer(guarded.admin)).json() == {"jobs": []}


@pytest.mark.parametrize("header", ["Bearer {}x", "Bearer x{}", "Bearer", "Bearer é", "Basic {}", "{}", "Bearer {} {}"])
def test_nothing_but_the_key_is_taken(guarded: Guarded, http: httpx.Client, header: str) -> None:
    given = header.replace("{}", guarded.query).encode("latin-1")
    problem(http.get(f"{guarded.url}/index", headers={"Authorization": given}), 401)
    assert http.get(f"{guarded.url}/index", headers={"authorization": f"bearer {guarded.query}"}).status_code == 200


@pytest.mark.parametrize("path", ["/influence/", "//jobs", "/./jobs", "/%6aobs", "/jobs/../jobs", "/JOBS", "/nowhere"])
def test_no_spelling_of_an_address_goes_around_the_keys(guarded: Guarded, path: str) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    for key, statuses in (("none", {401}), (guarded.query, {403, 404, 307})):
        with httpx.Client() as client:
            request = client.build_request("GET", guarded.url, headers=bearer(key))
            request.url = httpx.URL(scheme="http", host=host, port=int(port), raw_path=path.encode())
            assert client.send(request).status_code in statuses


def test_an_address_without_a_path_goes_around_no_key(guarded: Guarded) -> None:
    with socket.create_connection((httpx.URL(guarded.url).host, httpx.URL(guarded.url).port or 0)) as connection:
        connection.sendall(b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 401")


def test_a_body_is_not_waited_for_without_a_key(guarded: Guarded) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /influence HTTP/1.1\r\nHost: any\r\nContent-Length: 1000000\r\n\r\n{")
        assert connection.recv(100).startswith(b"HTTP/1.1 401")


def test_the_sdk_tells_of_keys(guarded: Guarded) -> None:
    refusals = ((None, AuthenticationError), ("wrong", AuthenticationError), (guarded.admin, ForbiddenError))
    for key, error in refusals:
        with Client(guarded.url, key) as client, pytest.raises(error) as refused:
            client.influence(**ASKED)
        assert refused.value.problem.request_id


def test_keys_come_and_go_while_the_service_runs(
    http: httpx.Client, guarded: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    kept = guarded.keys.read_bytes()
    later = add_key(guarded.keys, "later", [Scope.query])
    status = lambda key: http.get(f"{guarded.url}/index", headers=bearer(key)).status_code  # noqa: E731
    assert (status(later), status(guarded.query)) == (200, 200)
    guarded.keys.write_bytes(kept)
    assert (status(later), status(guarded.query)) == (401, 200)
    guarded.keys.write_bytes(kept + guarded.query.encode())
    assert status(guarded.query) == 200
    assert "line 3" in caplog.text
    assert guarded.query not in caplog.text
    guarded.keys.write_bytes(kept)
    assert status(guarded.query) == 200


def test_admin_calls_are_audited(http: httpx.Client, guarded: Guarded) -> None:
    before = len(guarded.audit.read_text().splitlines())
    headers = {**bearer(guarded.admin), "X-Request-ID": "from-the-gateway"}
    begun = http.post(f"{guarded.url}/reindex", json={"roll_back_to": 7}, headers=headers)
    http.post(f"{guarded.url}/reindex", content=b"{", headers=headers)
    http.post(f"{guarded.url}/reindex", json={}, headers=bearer(guarded.query))
    http.post(f"{guarded.url}/reindex", json={}, headers=bearer("wrong"))
    http.get(f"{guarded.url}/index", headers=bearer(guarded.query))
    told = [json.loads(line) for line in guarded.audit.read_text().splitlines()[before:]]
    seen = [(line["key"], line["method"], line["path"], line["status"]) for line in told]
    call = ("POST", "/reindex")
    assert seen == [("keeper", *call, 202), ("keeper", *call, 422), ("reader", *call, 403), (None, *call, 401)]
    assert told[0]["location"] == begun.headers["location"]
    assert told[0]["request_id"] == begun.headers["x-request-id"] == "from-the-gateway"
    assert told[0]["client"] == "127.0.0.1"


def test_secrets_are_in_no_log_and_no_answer(
    http: httpx.Client, guarded: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong, answers = "gradtrace_a-key-of-another-service", []
    for key in (guarded.query, guarded.admin, wrong):
        for verb, path, _ in operations(http, guarded.url):
            if not path.endswith("events"):
                answers.append(http.request(verb, guarded.url + path, headers=bearer(key), content=b"{").text)
    written = caplog.text + "".join(answers) + guarded.audit.read_text()
    for secret in (guarded.query, guarded.admin, wrong, *(entry.blake2b for entry in read_keys(guarded.keys))):
        assert secret not in written


def test_a_key_is_printed_once_and_only_its_hash_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    words = ["key", "new", "--scope", "query", "--scope", "admin", "--name", "ci", "--file", str(file)]
    made = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    key = made.stdout.strip()
    assert len(base64.urlsafe_b64decode(key.removeprefix("gradtrace_") + "=")) == 32
    assert key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    found = KeyFile(file).find(key)
    assert found is not None
    assert (found.name, found.scopes) == ("ci", (Scope.query, Scope.admin))
    assert KeyFile(file).find(key + "x") is None
    with pytest.raises(SettingsError, match="already"):
        add_key(file, "ci", [Scope.query])
    with pytest.raises(SettingsError, match="not a name"):
        add_key(file, "a b", [Scope.query])
    file.write_text(file.read_text().rstrip("\n"))  # as an editor may leave it
    assert KeyFile(file).find(add_key(file, "other", [Scope.query]))
    assert KeyFile(file).find(key) == found


def test_what_is_asked_in_process_needs_no_key_of_the_service_that_is_configured(
    digits_index: DigitsRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_key(tmp_path / "keys", "any", [Scope.query])
    monkeypatch.setenv("GRADTRACE_API_KEY_FILE", str(tmp_path / "keys"))
    words = ["query", str(digits_index.index), "--task", digits_index.task, "--query-row", "0", "--json"]
    assert CliRunner().invoke(cli.app, words, catch_exceptions=False).exit_code == 0


@pytest.mark.parametrize("changeable", ["file", "folder", "folder above", "folder of a link", "file behind a link"])
def test_a_file_of_keys_that_others_may_write_is_refused(tmp_path: Path, changeable: str) -> None:
    folder = tmp_path / "above" / "folder"
    folder.mkdir(parents=True)
    add_key(file := folder / "keys", "any", [Scope.query])
    (tmp_path / "links").mkdir()
    (link := tmp_path / "links" / "keys").symlink_to(file)
    asked, opened = {
        "file": (file, file),
        "folder": (file, folder),
        "folder above": (file, tmp_path / "above"),
        "folder of a link": (link, tmp_path / "links"),
        "file behind a link": (link, file),
    }[changeable]
    assert [key.name for key in read_keys(asked)] == ["any"]
    opened.chmod(opened.stat().st_mode | stat.S_IWOTH)
    with pytest.raises(SettingsError, match=f"chmod go-w {asked if opened == file else opened}"):
        KeyFile(asked)
    with pytest.raises(SettingsError, match=r"may be (written|replaced) by others"):
        add_key(asked, "other", [Scope.query])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to other groups")
def test_a_group_that_holds_nobody_but_the_owner_may_write(tmp_path: Path) -> None:
    add_key(file := tmp_path / "keys", "any", [Scope.query])
    file.chmod(0o660)
    assert [key.name for key in read_keys(file)] == ["any"]  # root's own group
    os.chown(file, -1, 1)
    with pytest.raises(SettingsError, match="chmod go-w"):
        read_keys(file)


def test_a_folder_in_which_others_may_replace_nothing_is_taken(tmp_path: Path) -> None:
    (shared := tmp_path / "shared").mkdir()
    shared.chmod(0o1777)
    add_key(shared / "keys", "any", [Scope.query])
    assert [key.name for key in read_keys(shared / "keys")] == ["any"]


def test_keys_that_others_may_read_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_key(file := tmp_path / "keys", "any", [Scope.query])
    read_keys(file)
    assert not caplog.records
    file.chmod(0o644)
    assert [key.name for key in read_keys(file)] == ["any"]
    assert f"chmod go-rwx {file}" in caplog.text


def test_a_file_of_keys_that_others_may_write_from_now_on_lets_nobody_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = add_key(file := tmp_path / "keys", "any", [Scope.query])
    keys = KeyFile(file)
    file.chmod(0o666)
    planted = add_key(tmp_path / "others", "planted", [Scope.admin])
    with file.open("a") as lines:
        lines.write((tmp_path / "others").read_text())
    assert keys.find(planted) is None
    assert keys.find(key) is not None
    assert f"chmod go-w {file}" in caplog.text


def test_a_file_that_holds_no_keys_is_refused_at_the_start(digits_index: DigitsRun, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="key new"):
        create_app(digits_index.open(), Settings(api_key_file=tmp_path / "none"))
    (tmp_path / "keys").write_text('{"name": "a", "scopes": [], "blake2b": "a secret"}')
    with pytest.raises(SettingsError, match="line 1") as refused:
        create_app(digits_index.open(), Settings(api_key_file=tmp_path / "keys"))
    assert "secret" not in str(refused.value)
    hosted = [Hosted("none", tmp_path / "none", "none:TASK")]
    with pytest.raises(SettingsError, match="key new"):  # before the index is opened, which takes longer
        create_service(hosted, Settings(api_key_file=tmp_path / "none"))


def test_a_client_that_asks_too_often_is_told_when_to_come_back(
    http: httpx.Client, digits_index: DigitsRun, tmp_path: Path
) -> None:
    first, second = (add_key(tmp_path / "keys", name, [Scope.query]) for name in ("first", "second"))
    settings = Settings(api_key_file=tmp_path / "keys", rate_limit=2)  # the third is let in after 30 s
    with serving(create_app(digits_index.open(), settings)) as url:
        got = [http.get(f"{url}/index", headers=bearer(first)) for _ in range(4)]
        assert [response.status_code for response in got] == [200] * 2 + [429] * 2
        assert "send this one again in" in problem(got[-1], 429).detail
        assert 1 <= int(got[-1].headers["retry-after"]) <= 30
        assert http.get(f"{url}/index", headers=bearer(second)).status_code == 200
        assert http.get(f"{url}/healthz").status_code == 200
        strangers = [http.get(f"{url}/index", headers=bearer(f"guess {n}")).status_code for n in range(3)]
        assert strangers == [401] * 2 + [429]
        with Client(url, first, retries=0) as client, pytest.raises(BusyError) as busy:
            client.index()
        assert busy.value.retry_after is not None


def test_without_keys_the_limit_is_the_address_s(http: httpx.Client, digits_index: DigitsRun) -> None:
    with serving(create_app(digits_index.open(), Settings(rate_limit=3))) as url:
        assert [http.get(f"{url}/index").status_code for _ in range(4)] == [200] * 3 + [429]


@given(st.integers(1, 500), st.lists(st.floats(0, 90), min_size=1, max_size=300))
def test_the_rate_holds_over_any_time(per_minute: int, pauses: list[float]) -> None:
    """No more than a bucket and what flows into it meanwhile; and whoever waits as told is let in."""
    now, taken = 0.0, []
    limit = RateLimit(per_minute, lambda: now)
    for pause in pauses:
        now += pause
        wait = limit.take("one")
        if wait:
            now += wait
            assert limit.take("one") == 0
        taken.append(now)
        for earlier in taken:
            assert sum(1 for one in taken if one >= earlier) <= per_minute * (1 + (now - earlier) / 60) + 1e-3


def test_the_addresses_of_a_client_share_a_limit() -> None:
    assert network("2001:db8::1") == network("2001:db8::ffff:0:0:1") != network("2001:db8:0:1::1")
    assert len({network(address) for address in ("192.0.2.1", "192.0.2.2", "::ffff:192.0.2.3", "", "::1")}) == 5


class Name(str):
    """Unlike a plain string, it tells when it is dropped."""


def test_clients_that_left_are_forgotten() -> None:
    now = 0.0
    limit = RateLimit(10, lambda: now)
    clients = [Name(number) for number in range(1000)]
    remembered = [weakref.ref(client) for client in clients]
    for client in clients:
        limit.take(client)
    del client, clients
    assert all(client() for client in remembered)
    now = 61.0
    limit.take("last")
    assert not any(client() for client in remembered)


def test_answers_carry_the_headers_of_security(http: httpx.Client, url: str) -> None:
    for path in ("/index", "/nowhere", "/healthz", "/docs", "/openapi.json"):
        headers = http.get(url + path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-request-id"]
        assert "server" not in headers


def test_the_page_of_the_api_needs_no_other_server_and_no_other_script(http: httpx.Client, url: str) -> None:
    docs = http.get(f"{url}/docs")
    policy = dict(part.split(" ", 1) for part in docs.headers["content-security-policy"].split("; "))
    (script,) = re.findall(r"<script>(.*?)</script>", docs.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == f"'self' 'sha256-{digest}'"
    assert policy["style-src"] == "'self'"
    assert "://" not in docs.text
    files = re.findall(r'(?:src|href)="([^"]+)"', docs.text)
    assert len(files) == 3
    for file in files:
        answer = http.get(f"{url}/{file}")
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "public, max-age=86400")
        assert len(answer.content) > 1000
    assert "SwaggerUIBundle" in http.get(f"{url}/{files[-1]}").text
    assert http.get(f"{url}/openapi.json").json()["openapi"].startswith("3.")
    for name in ("nothing", "..%2f__init__.py", "redoc.standalone.js"):
        assert http.get(f"{url}/docs/{name}").status_code == 404


def test_other_origins_are_refused_unless_named(http: httpx.Client, url: str, digits_index: DigitsRun) -> None:
    origin = {"Origin": "https://page.example"}
    asked = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert "access-control-allow-origin" not in http.get(f"{url}/index", headers=origin).headers
    assert http.options(f"{url}/influence", headers=asked).status_code == 405
    settings = Settings(cors_origins=["https://page.example"])
    with serving(create_app(digits_index.open(), settings)) as named:
        preflight = http.options(f"{named}/influence", headers=asked)
        assert preflight.headers["access-control-allow-origin"] == "https://page.example"
        for path in ("/index", "/nowhere"):
            got = http.get(named + path, headers=origin).headers
            assert got["access-control-allow-origin"] == "https://page.example"
            assert "X-Request-ID" in got["access-control-expose-headers"]
        other = http.get(f"{named}/index", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_several_origins_are_given_by_flag_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["https://a.example", "http://127.0.0.1:3000"]
    assert read_settings(None, cors_origins=wanted).cors_origins == wanted
    monkeypatch.setenv("GRADTRACE_CORS_ORIGINS", ",".join(wanted))
    assert read_settings(None).cors_origins == wanted


def test_a_failure_outside_of_the_routes_has_its_headers_too(
    http: httpx.Client, digits_index: DigitsRun, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(digits_index.open())

    @app.get("/broken")
    async def broken() -> None:
        raise OSError("a secret place")

    with serving(app) as url:
        failed = http.get(f"{url}/broken")
    assert "secret" not in problem(failed, 500).model_dump_json()
    assert failed.headers["x-content-type-options"] == "nosniff"


def test_without_keys_no_name_that_leads_here_is_answered(digits_index: DigitsRun) -> None:
    app = create_app(digits_index.open())
    answer_local_names_alone(app, "127.0.0.1")
    with serving(app) as url:
        port = httpx.URL(url).port
        for host, status in (("127.0.0.1", 200), ("localhost", 200), ("[::1]", 200), ("evil.example", 400)):
            assert httpx.get(f"{url}/index", headers={"Host": f"{host}:{port}"}).status_code == status


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_public_address_needs_keys(host: str, digits_index: DigitsRun, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--api-key-file"):
        refuse_public(host)
    for command in (["serve", str(digits_index.index), "--task", digits_index.task], ["demo", "--once"]):
        refused = CliRunner().invoke(cli.app, [*command, "--host", host])
        assert isinstance(refused.exception, SettingsError)


def test_an_address_of_this_machine_alone_needs_none() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
        refuse_public(host)


def chunk(kind: bytes, body: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, data: bytes) -> str:
    """A PNG whose header says so; `data` is its compressed content."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return base64.b64encode(whole).decode()


@contextmanager
def little_work(seconds: float = 3.0) -> Iterator[None]:
    """What the service does meanwhile, in this process, takes so much of the processor's time at most."""
    started = time.process_time()
    yield
    assert time.process_time() - started < seconds


@pytest.mark.parametrize(("width", "height"), [(2000, 2000), (12_000, 12_000), (65_535, 65_535)])
def test_an_image_that_unpacks_to_another_size_is_refused_before(
    http: httpx.Client, url: str, width: int, height: int
) -> None:
    bomb = png_of(width, height, zlib.compress(bytes(4_000_000), 9))
    with little_work():
        response = http.post(f"{url}/influence", json={"example": {"image": bomb}})
    assert problem(response, 422).errors[0].field == "example"


def test_an_image_of_the_right_size_with_endless_content_costs_nothing(http: httpx.Client, url: str) -> None:
    bomb = png_of(8, 8, zlib.compress(bytes(64_000_000), 9))
    with little_work():
        response = http.post(f"{url}/influence", json={"example": {"image": bomb}, "k": 1})
    assert response.status_code in (200, 422)


def jpeg_of(scans: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times more."""
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    return whole[:-2] + whole[whole.rindex(b"\xff\xda") : -2] * scans + whole[-2:]


def png_with(profiles: int) -> bytes:
    """A PNG with so many colour profiles of a megabyte each, packed."""
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**20), 9))
    plain = base64.b64decode(png_of(8, 8, zlib.compress(bytes(72))))
    return plain[:33] + profile * profiles + plain[33:]


@pytest.mark.parametrize("make", [jpeg_of, png_with])
def test_a_small_file_that_takes_long_is_refused_before(
    http: httpx.Client, url: str, make: Callable[[int], bytes]
) -> None:
    """Of either kind, a body of the size that is allowed would keep the worker busy for half a minute and more."""

    def asked(content: bytes) -> httpx.Response:
        example = {"image": base64.b64encode(content).decode()}
        return http.post(f"{url}/influence", json={"example": example, "k": 1})

    assert asked(make(1)).status_code == 200
    for many in (200, 5_000):
        content = make(many)
        with little_work():
            refused = asked(content)
        assert "save it" in problem(refused, 422).detail


def test_a_gif_is_no_png(http: httpx.Client, url: str) -> None:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "GIF")
    example = {"image": base64.b64encode(buffer.getvalue()).decode()}
    problem(http.post(f"{url}/influence", json={"example": example}), 422)


class Watch:
    """What Python tells of the files, addresses and pickles that this process touches."""

    def __init__(self) -> None:
        self.on, self.seen = False, list[str]()
        sys.addaudithook(self.hear)  # for good: a hook cannot be taken away

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event.startswith(("open", "os.", "shutil.", "socket.", "urllib.", "pickle.", "subprocess.")):
            self.seen.append(f"{event} {arguments!r}")


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.mark.parametrize(
    "text",
    [
        "file:///etc/hostname-of-marker",
        "http://marker.invalid/image.png",
        "../../marker",
        "/etc/marker",
        "data:image/png;base64,http://marker.invalid/",
        base64.b64encode(b"cos\nsystem\n(S'touch marker'\ntR.").decode(),
        "${marker}",
        "__import__('os').system('touch marker')",
    ],
)
def test_nothing_that_a_client_sends_is_a_path_an_address_or_code(guarded: Guarded, watch: Watch, text: str) -> None:
    both = {"query_rows": [0]}
    bodies: list[dict[str, Any]] = [
        *({"example": {key: text}} for key in ("image", "label", "path", "url", "text")),
        {"example": {"image": [[0] * 8] * 8, "label": text}},
        *(both | {key: text} for key in ("index", "method", "weights", "aggregate", "target", "colour")),
        both | {"checkpoints": [text]},
        both | {"filter": {"labels": [text]}},
        both | {"filter": {"where": {text: {"min": 0}}}},
        both | {"filter": {"where": {"label": {"in": [text]}}}},
    ]
    watch.seen.clear()
    watch.on = True
    with httpx.Client(base_url=guarded.url, headers=bearer(guarded.query)) as client:
        answers = [client.post("/influence", json=body).status_code for body in bodies]
        asked = [client.get(path, params={"index": text}).status_code for path in ("/index", "/self-influence")]
        quoted = text.replace("/", "%2F")
        shown = [client.get(f"/examples/{quoted}/0").status_code, client.get(f"/examples/train/{quoted}").status_code]
        admin = bearer(guarded.admin)
        jobs = [
            client.post("/reindex", json={"index": text}, headers=admin),
            client.get(f"/jobs/{quoted}", headers=admin),
        ]
    watch.on = False
    assert set(answers + asked) == {422}
    assert set(shown) <= {404, 422}
    assert {response.status_code for response in jobs} <= {404, 422}
    touched = [line for line in watch.seen if "marker" in line or line.startswith(("pickle", "subprocess", "urllib"))]
    assert touched == []
    assert any(line.startswith("socket.connect") for line in watch.seen)  # the test's own: it does hear
