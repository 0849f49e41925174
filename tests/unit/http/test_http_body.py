"""Bodies are counted before they are parsed; a key may be given once."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_server.http.openai.errors import ApiError
from rollout_server.http.routes import body as body_module
from rollout_server.http.routes.body import MAX_DEPTH, MAX_ITEMS, MAX_KEYS, check_structure
from tests.stub_replica import erasing_server

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


def check(raw: bytes) -> str | None:
    """The code of the error, if there is one."""
    try:
        asyncio.run(check_structure(raw))
    except ApiError as error:
        return error.code if error.status == 400 else "no 400"
    return None


@settings(deadline=None)
@given(VALUES, st.booleans())
def test_what_json_writes_is_accepted(value: Any, ascii_only: bool) -> None:
    raw = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert check(raw) is None


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text(st.sampled_from('"\\[]{}:, a1'), max_size=60).map(str.encode))
def test_nonsense_is_left_to_the_parser(raw: bytes) -> None:
    assert check(raw) in (None, "duplicate_key")


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "\\u0061", "c\\n", "c\\u000a", "\\ud800", "é", "\\u00e9"]), max_size=5))
def test_a_key_is_given_twice_if_and_only_if_the_parser_finds_one_less(names: list[str]) -> None:
    raw = "{" + ",".join(f'"{name}": {{"x": [":", "{{"]}}' for name in names) + "}"
    is_twice = len(json.loads(raw)) < len(names)
    assert check(raw.encode()) == ("duplicate_key" if is_twice else None)


@pytest.mark.parametrize(
    ("raw", "place"),
    [
        ('{"model":"stub","prompt":"a","prompt":"b"}', "prompt"),
        ('{"model":"stub","prompt":"a","erasure":{"kappa":1,"gamma":1,"kappa":2}}', "erasure.kappa"),
        ('{"model":"stub","prompt":"\\"{[","pro\\u006dpt":"b"}', "prompt"),
        ('{"model":"stub","model":"stub"', "model"),
    ],
)
async def test_a_key_that_is_given_twice_is_a_400_that_names_it(raw: str, place: str) -> None:
    async with erasing_server() as server:
        headers = {"content-type": "application/json"}
        answer = await server.client.post("/v1/completions", content=raw.encode(), headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, place, "duplicate_key")


@pytest.mark.parametrize(
    ("raw", "is_too_much"),
    [
        (b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, False),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), True),
        (b"[" + b",".join([b"{}"] * (MAX_ITEMS - 1)) + b"]", False),
        (b"[" + b",".join([b"{}"] * MAX_ITEMS) + b"]", True),
        (b"[" + b",".join([b'""'] * MAX_ITEMS) + b"]", True),
        (b"{" + b",".join(b'"%d":0' % number for number in range(MAX_KEYS)) + b"}", False),
        (b"{" + b",".join(b'"%d":0' % number for number in range(MAX_KEYS + 1)) + b"}", True),
        (b"[" + b"1," * 600_000 + b"1]", True),
        (b'["' + b"1," * 600_000 + b'1"]', False),
        (b"[" + b"1," * 400_000 + b"1]", False),
    ],
    ids=range(10),
)
def test_what_is_too_much(raw: bytes, is_too_much: bool) -> None:
    assert check(raw) == ("body_too_complex" if is_too_much else None)


@pytest.mark.parametrize(
    "raw", [b'"' + b'\\"' * 2**20, b'"' * (2**20 + 1), b"1" * 2**21, b'{"a' + b"\\" * 2**20, b'"a"' + b" " * 2**21]
)
def test_the_look_takes_time_in_proportion_to_the_body(raw: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "MAX_ITEMS", 2**30)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(asyncio.wait_for(check_structure(raw), 10.0))
    loop.close()
