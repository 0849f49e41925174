"""Incremental text: stop strings, multi-byte characters, copies of cursors, segments of a choice."""

import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.decoders import DecodeStream
from tokenizers.models import WordLevel

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


@given(st.text(max_size=40), st.lists(st.integers(0, 40), max_size=6), st.sampled_from(["ab", "€", "xyx", "aab"]))
def test_tokens_that_come_together_are_as_those_that_come_alone(text: str, cuts: list[int], stop: str) -> None:
    """Also where a stop string is in them or begins."""
    tokens = ids(text) * 2 + ids(stop[:-1]) + ids(text) + ids(stop) + ids(text)
    alone, together = cursor((stop, "zz")), cursor((stop, "zz"))
    one_by_one = [alone.feed([token]) for token in tokens]
    edges = sorted({0, len(tokens), *(min(cut * 3, len(tokens)) for cut in cuts)})
    groups = [together.feed(tokens[start:end]) for start, end in pairwise(edges)]
    assert "".join(piece for piece, _ in groups) == "".join(piece for piece, _ in one_by_one)
    assert sum(taken for _, taken in groups) == sum(taken for _, taken in one_by_one)
    assert (together.stopped, together.characters) == (alone.stopped, alone.characters)


def possible_beginning(text: str, stops: tuple[str, ...]) -> int:
    lengths = range(min(max(map(len, stops)) - 1, len(text)), 0, -1)
    return next((length for length in lengths if any(stop.startswith(text[-length:]) for stop in stops)), 0)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3))
def test_what_is_held_back_is_the_longest_beginning_of_a_stop_string(text: str, stops: list[str]) -> None:
    finder = StopFinder(tuple(stops))
    shown, stop = finder.push(text)
    if stop is None:
        assert finder.held == text[len(text) - possible_beginning(text, finder.stops) :]
        assert shown + finder.held == text


@settings(deadline=None)
@given(st.lists(st.integers(0, 255), max_size=80) | st.text(max_size=60).map(ids), st.text(max_size=8), st.data())
def test_of_a_prompt_only_its_end_matters(prompt: list[int], text: str, data: st.DataObject) -> None:
    """Also where it is no text, or a character begins in it and ends in the response."""
    tokens = prompt + ids(text)
    cut = data.draw(st.integers(max(len(prompt) - 4, 0), len(tokens)))
    stream: Any = DecodeStream(ids=tokens[:cut], skip_special_tokens=True)
    try:
        expected = [stream.step(BACKEND, token) for token in tokens[cut:]]
    except Exception:
        # Bytes that are no text; a cursor then begins anew.
        return
    after = TextCursor(BACKEND, tokens[:cut], TextOptions())
    assert [after.feed([token])[0] for token in tokens[cut:]] == [piece or "" for piece in expected]


@pytest.mark.parametrize("silent_end", [0, 3, 10])
def test_a_space_before_the_first_word_is_kept(silent_end: int) -> None:
    words = Tokenizer(WordLevel({"\u2581hello": 0, "\u2581world": 1, "</s>": 2}, unk_token="</s>"))
    words.decoder = decoders.Metaspace()
    words.add_special_tokens(["</s>"])
    prompt = [0] * 30 + [2] * silent_end
    assert TextCursor(words, prompt, TextOptions()).feed([1, 0]) == (" world hello", 2)
