"""What a request must be before its body is read, and what a client cannot do to the log."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.http.server.command_line import UsageError, read_settings
from rollout_server.http.server.guards import is_local
from rollout_server.http.server.logs import FIELDS, configure
from tests.stub_replica import StubReplica, StubServer, erasing_server, saying

COMPLETION = {"model": "stub", "prompt": "a"}
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True), ("LOCALHOST:8000", True), ("127.0.0.1:1", True), ("127.9.9.9", True), ("[::1]:80", True),
        ("app.localhost", True), ("localhost.", True),
        ("evil.example", False), ("localhost.evil.example", False), ("127.0.0.1.evil.example", False),
        ("192.168.0.1", False), ("0.0.0.0", False), ("[::2]", False), ("localhost@evil.example", False),
        ("localhost:80:80", False), ("localhost evil", False), ("", False), ("127.1", False),
        ("evil.example:80#localhost", False),
    ],
)  # fmt: skip
def test_which_names_are_this_machines(host: str, local: bool) -> None:
    assert is_local(host) == local


async def test_without_a_key_other_sites_pages_reach_nothing() -> None:
    replica = StubReplica(saying("a"))
    async with StubServer(replica) as server:
        foreign = [
            {"host": "evil.example"},
            {"host": "localhost", "origin": "https://evil.example"},
            {"origin": "null"},
            {"origin": "http://localhost.evil.example"},
            {"origin": "http://[::1"},
            {"origin": "file://localhost"},
        ]
        for headers in foreign:
            asked = [
                await server.client.post("/v1/completions", json=COMPLETION, headers=headers),
                await server.client.get("/v1/models", headers=headers),
                await server.admin.post("/pause", json={"mode": "abort"}, headers=headers),
                await server.admin.post("/pause", headers=headers),
            ]
            for answer in asked:
                assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error"), headers
        assert (replica.requests, [call for call in replica.calls if "pause" in call]) == ([], [])
        for headers in ({"origin": "http://localhost:3000"}, {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1"}):
            assert (await server.client.post("/v1/completions", json=COMPLETION, headers=headers)).status_code == 200


async def test_with_a_key_the_server_may_have_any_name() -> None:
    async with erasing_server(api_key=("a-key-of-somebody",)) as server:
        headers = {"host": "llm.example", "origin": "https://chat.example", "authorization": "Bearer a-key-of-somebody"}
        assert (await server.client.post("/v1/completions", json=COMPLETION, headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 415),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "multipart/form-data; boundary=application/json"}, 415),
        ({"content-type": "application/jsonp"}, 415),
        ({"content-type": "application/json; charset=utf-16"}, 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415),
        ({"content-type": "application/json", "content-encoding": "identity, br"}, 415),
        ({"content-type": "application/json", "content-encoding": "identity"}, 200),
        ({"content-type": "Application/JSON;charset=UTF-8"}, 200),
        ({"content-type": 'application/json; charset="utf-8"'}, 200),
    ],
)
async def test_bodies_are_json_that_is_not_compressed(headers: dict[str, str], status: int) -> None:
    async with erasing_server() as server:
        answer = await server.client.post("/v1/completions", content=json.dumps(COMPLETION), headers=headers)
        assert answer.status_code == status
        if status == 415:
            compressed = "content-encoding" in headers
            name = "Content-Encoding" if compressed else "Content-Type"
            assert answer.json()["error"]["param"] == name
            assert name in answer.json()["error"]["message"]
            paused = await server.admin.post("/pause", content=b"{}", headers=headers)
            assert paused.status_code == 415
        assert (await server.admin.post("/pause")).status_code == 200


FORGERIES = ["\x1b[2J", "a\n2026 INFO x", "\x9b31m", "\u202e", "\x7f", "\ud800", "a status=200"]


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("e3rl")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], _, _ = before
    root.setLevel(before[1])
    ours.setLevel(before[2])


@pytest.mark.usefixtures("restored_logging")
@pytest.mark.parametrize("form", ["text", "json"])
@given(text=st.text(st.characters(codec=None), max_size=30) | st.sampled_from(FORGERIES))
def test_no_client_forges_a_line_of_the_log_or_gives_a_terminal_orders(form: str, text: str) -> None:
    stream = io.StringIO()
    configure(form, "info", stream)
    log = logging.getLogger("e3rl.http")
    log.info("about %s", text, extra={FIELDS: {"user": text, "status": "400"}})
    try:
        raise ValueError(text)
    except ValueError:
        log.exception("failed")
    written = stream.getvalue()
    lines = written.removesuffix("\n").split("\n")
    assert all(line.isprintable() for line in lines)
    if form == "json":
        assert [json.loads(line)["level"] for line in lines] == ["info", "error"]
        assert json.loads(lines[0])["user"] == text
    else:
        begun = [line for line in lines if not line.startswith("    ")]
        assert ["INFO e3rl.http: about" in begun[0], "ERROR e3rl.http: failed" in begun[1]] == [True, True]
        assert len(begun) == 2
        assert begun[0].endswith("status=400")
        user = begun[0].removesuffix(" status=400").partition(" user=")[2]
        if " user=" not in text:
            assert (json.loads(user) if user.startswith('"') else user) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [("E3RL_PROT", "E3RL_PORT"), ("E3RL_MAX_WAITING_REQUEST", "E3RL_MAX_WAITING_REQUESTS"), ("E3RL_QQQQQQ", "--help")],
)
def test_an_environment_variable_that_is_no_setting_is_an_error(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "9000")
    with pytest.raises(UsageError, match=rf"{name}.*{text}"):
        read_settings(["--model", "x"])
    monkeypatch.delenv(name)
    monkeypatch.setenv("e3rl_port", "9001")
    settings: Any = read_settings(["--model", "x"])
    assert settings.port == 9001
