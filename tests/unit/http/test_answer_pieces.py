"""Answers are made in pieces, and log-probs kept in flat arrays: together they are what they would be at once."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_server.http.openai.entries import Entries, Joined, PromptRows
from rollout_server.http.openai.json_pieces import VALUES_IN_A_PIECE, dump, list_pieces, object_pieces
from rollout_server.http.openai.logprobs import chat_logprobs, completion_logprobs

VALUES = st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4)
LOGPROBS = st.floats(-20_000.0, 0.0)
TOKENS = st.tuples(st.integers(0, 9), LOGPROBS, st.lists(st.tuples(st.integers(0, 9), LOGPROBS), max_size=4))


class Names:
    def __getitem__(self, token_id: int) -> str:
        return "ab"[token_id % 2] * (token_id // 2 + 1)


def entries_of(tokens: list[Any]) -> Entries:
    entries = Entries()
    for token_id, logprob, likeliest in tokens:
        entries.add(token_id, logprob, likeliest)
    return entries


def listed(entries: Entries) -> list[Any]:
    return list(zip(entries.token_ids, entries.logprobs, entries.likeliest(), strict=True))


@given(st.lists(VALUES, max_size=3) | st.integers(0, 3 * VALUES_IN_A_PIECE).map(lambda count: list(range(count))))
def test_a_list_in_pieces_is_the_list(values: list[Any]) -> None:
    assert b"".join(list_pieces(iter(values))) == dump(values)


@given(st.dictionaries(st.text(max_size=3), VALUES, min_size=1, max_size=3), st.lists(VALUES, max_size=3))
def test_an_object_in_pieces_is_the_object(values: dict[str, Any], items: list[Any]) -> None:
    pieces = list(object_pieces(values, {"long list": items, "none": None}))
    assert b"".join(pieces) == dump({**values, "long list": items, "none": None})


@settings(deadline=None)
@given(st.lists(TOKENS, max_size=6), st.lists(TOKENS, max_size=6), st.integers(0, 12))
def test_entries_are_a_list_of_tokens(one: list[Any], other: list[Any], count: int) -> None:
    entries = entries_of(one)
    entries.extend(entries_of(other))
    expected = [(token_id, logprob, dict(likeliest)) for token_id, logprob, likeliest in one + other]
    assert listed(entries) == expected
    assert listed(entries.first(count)) == expected[:count]
    assert len(entries.first(count)) == min(count, len(expected))


@settings(deadline=None)
@given(st.lists(TOKENS, max_size=6), st.integers(0, 100))
def test_log_probs_of_a_completion(tokens: list[Any], offset: int) -> None:
    told = json.loads(b"".join(completion_logprobs(entries_of(tokens), Names(), offset)))
    names = [Names()[token_id] for token_id, _, _ in tokens]
    assert told["tokens"] == names
    assert told["text_offset"] == [offset + sum(map(len, names[:place])) for place in range(len(names))]
    assert told["token_logprobs"] == [max(logprob, -9999.0) for _, logprob, _ in tokens]
    for (token_id, logprob, likeliest), top in zip(tokens, told["top_logprobs"], strict=True):
        known = {token_id: logprob, **dict(likeliest)}
        assert top == {Names()[one]: max(value, -9999.0) for one, value in known.items()}


@settings(deadline=None)
@given(st.lists(TOKENS, max_size=6))
def test_log_probs_of_a_chat(tokens: list[Any]) -> None:
    told = json.loads(b"".join(chat_logprobs(entries_of(tokens), Names())))["content"]
    for (token_id, logprob, likeliest), entry in zip(tokens, told, strict=True):
        assert (entry["token"], entry["logprob"]) == (Names()[token_id], max(logprob, -9999.0))
        assert bytes(entry["bytes"]).decode() == Names()[token_id]
        expected = [(Names()[one], max(value, -9999.0)) for one, value in dict(likeliest).items()]
        assert [(one["token"], one["logprob"]) for one in entry["top_logprobs"]] == expected


def test_a_prompts_log_probs_come_before_the_responses() -> None:
    prompt = PromptRows([4, 1, 2], [None, {1: (-3.0, 9), 5: (-0.5, 1)}, {2: (-0.1, 1), 6: (-4.0, 2)}], top=1)
    rows = Joined(prompt, entries_of([(3, -1.0, [])]))
    told = json.loads(b"".join(completion_logprobs(rows, Names(), 0)))
    assert told["tokens"] == ["aaa", "b", "aa", "bb"]
    assert told["text_offset"] == [0, 3, 4, 6]
    assert told["token_logprobs"] == [None, -3.0, -0.1, -1.0]
    assert told["top_logprobs"] == [None, {"b": -3.0, "bbb": -0.5}, {"aa": -0.1}, {"bb": -1.0}]
