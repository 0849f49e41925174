"""Incremental text: stop strings, multi-byte characters, copies of cursors, segments of a choice."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_server.engine.detokenize import TextCursor, TextOptions, TokenTexts
from rollout_server.engine.stop_strings import StopFinder
from tests.models import byte_tokenizer

TOKENIZER = byte_tokenizer(1024)
BACKEND = TOKENIZER.backend_tokenizer
TEXTS = st.text(alphabet="abc\n€😀ñ日", max_size=30)


def ids(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"] if text else []


def cursor(stops: tuple[str, ...] = (), silent: frozenset[int] = frozenset()) -> TextCursor:
    return TextCursor(BACKEND, ids("prompt"), TextOptions(stops, silent))


def first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    """Where the text is cut, found by looking at every prefix: the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return end - len(stop)
    return None


@given(text=TEXTS, stops=st.lists(st.text("abc\n€", min_size=1, max_size=4), min_size=1, max_size=3), data=st.data())
def test_a_stop_string_is_found_wherever_the_pieces_break(text: str, stops: list[str], data: st.DataObject) -> None:
    finder, shown, found, rest = StopFinder(tuple(stops)), "", None, text
    while rest and found is None:
        size = data.draw(st.integers(1, len(rest)))
        piece, found = finder.push(rest[:size])
        rest = rest[size:]
        shown += piece
    if found is None:
        shown += finder.flush()
    cut = first_stop(text, tuple(stops))
    assert shown == (text if cut is None else text[:cut])
    assert (found is None) == (cut is None)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    finder = StopFinder(("END", "\n\n"))
    assert finder.push("a E") == ("a ", None)
    assert finder.push("N") == ("", None)
    assert finder.push("x\n") == ("ENx", None)
    assert finder.push("y") == ("\ny", None)


def test_of_two_stop_strings_the_one_complete_first_counts() -> None:
    assert StopFinder(("bcd", "b")).push("abcd") == ("a", "b")
    assert StopFinder(("cd", "abcd")).push("abcd") == ("ab", "cd")


@given(text=TEXTS)
def test_half_characters_are_never_shown(text: str) -> None:
    place, shown = cursor(), ""
    for token in ids(text):
        piece, taken = place.feed([token])
        assert taken == 1
        assert "\ufffd" not in piece
        shown += piece
        assert text.startswith(shown)
    assert shown + place.finish() == text
    assert place.characters == len(text)


@given(committed=TEXTS, erased=TEXTS, kept=TEXTS, cut=st.integers(0, 3))
def test_a_copy_takes_text_back_exactly(committed: str, erased: str, kept: str, cut: int) -> None:
    """An erasure in the middle of a character: the copy at the segment's start knows nothing of what was erased."""
    tokens = ids(committed + kept)
    boundary = max(len(ids(committed)) - cut, 0)
    place, shown = cursor(), ""
    shown += place.feed(tokens[:boundary])[0]
    live = place.copy()
    shown += live.feed(ids(erased))[0]
    shown = shown[: len(shown) - (live.characters - place.characters)]
    live = place.copy()
    shown += live.feed(tokens[boundary:])[0]
    assert shown + live.finish() == committed + kept


def test_a_stop_string_cuts_tokens_after_the_one_that_completes_it() -> None:
    place = cursor(("lo",))
    assert place.feed(ids("hello world")) == ("hel", 5)
    assert place.stopped == "lo"
    assert place.feed(ids("more")) == ("", 0)
    assert place.finish() == ""


def test_a_stop_string_over_two_feeds() -> None:
    place = cursor(("end",))
    assert place.feed(ids("the e")) == ("the ", 5)
    assert place.feed(ids("nd.")) == ("", 2)
    assert place.characters == 4


def test_silent_and_special_tokens_have_no_text() -> None:
    assert cursor(silent=frozenset({256})).feed([*ids("a"), 256]) == ("a", 2)
    assert cursor().feed([257, *ids("b")]) == ("b", 2)


def test_bytes_that_are_no_text_do_not_stop_the_stream() -> None:
    draw = random.Random(0)
    for _ in range(50):
        tokens = [draw.randrange(256) for _ in range(40)]
        place = cursor()
        one_by_one = "".join(place.feed([token])[0] for token in tokens)
        assert one_by_one == cursor().feed(tokens)[0]
        whole = TOKENIZER.decode(tokens)
        assert whole.startswith(one_by_one)
        assert set(whole[len(one_by_one) :]) <= {"\ufffd"}


def test_texts_of_tokens() -> None:
    texts = TokenTexts(BACKEND)
    assert texts[ids("a")[0]] == "a"
    assert texts[ids("€")[0]] == "\ufffd"
    assert texts[256] == "<|end|>"


@pytest.mark.parametrize("stop", ["€", "😀"])
@settings(max_examples=20)
@given(before=st.text("ab€😀", max_size=5))
def test_multi_byte_stop_strings(stop: str, before: str) -> None:
    text = before + stop
    assert cursor((stop,)).feed(ids(text))[0] == text[: text.index(stop)]
