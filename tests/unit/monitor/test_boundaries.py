"""Where segments end: the monitor's automata against the reference, which searches the segment's bytes."""

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from common.config import DelimiterSegmentation, FixedSegmentation
from common.config.erasure import MOST_DELIMITER_BYTES, Segmentation
from common.segmentation import segment_length
from common.token_bytes import token_bytes
from rollout_server.monitor.backends import boundaries
from rollout_server.monitor.backends.boundaries import Boundaries
from tests.models import everyday_tokenizer

LETTERS = "ab.\n é日😀"
DELIMITER = st.text(LETTERS, min_size=1, max_size=4)
TOKEN = st.text(LETTERS, max_size=4).map(str.encode) | st.binary(max_size=3)


@st.composite
def segmentations(draw: st.DrawFn) -> Segmentation:
    shortest = draw(st.integers(1, 4))
    return DelimiterSegmentation(
        delimiter=draw(DELIMITER | st.lists(DELIMITER, min_size=1, max_size=4).map(tuple)),
        min_length=shortest,
        max_length=shortest + draw(st.integers(0, 12)),
    )


def reference_lengths(tokens: list[bytes], segmentation: Segmentation, limit: int) -> list[int]:
    """Lengths of the segments of a response, up to the one that does not end."""
    lengths = []
    while tokens and (length := segment_length(tokens, segmentation, limit)) is not None:
        lengths.append(length)
        tokens, limit = tokens[length:], limit - length
    return lengths


def lengths(looking: Boundaries, slot: int, token_ids: list[int]) -> list[int]:
    """The same, of a slot that was opened, step by step."""
    found, length = [], 0
    for token in token_ids:
        length += 1
        if looking.take(np.array([slot]), np.array([token]))[0]:
            found.append(length)
            length = 0
    return found


# The loop may have to be compiled first.
@settings(deadline=None)
@given(st.lists(TOKEN, min_size=1, max_size=30), segmentations(), st.integers(1, 40))
@example([b"\xe6", b"\x97", b"\xa5\n", b"\n\n\n"], DelimiterSegmentation(delimiter="日\n", min_length=1), 40)
@example([b"a", b"aa", b"a"], DelimiterSegmentation(delimiter="aa", min_length=1), 40)
@example([b"ab"], DelimiterSegmentation(delimiter=("aba", "b"), min_length=1), 40)
def test_segments_end_where_the_reference_ends_them(
    tokens: list[bytes], segmentation: Segmentation, limit: int
) -> None:
    looking = Boundaries(tokens, len(tokens) + 2, slots=1)
    looking.open(5, segmentation, limit)
    response = list(range(len(tokens)))[:limit]
    assert lengths(looking, 5, response) == reference_lengths(tokens[:limit], segmentation, limit)


@pytest.mark.parametrize(
    ("delimiter", "text", "pieces"),
    [
        (". ", "It is so. Then 3.5 is. End", ["It is so. ", "Then 3.5 is. ", "End"]),
        ("\n\n", "One.\n\nTwo\nlines\n\n", ["One.\n\n", "Two\nlines\n\n"]),
        ("</think>", "<think>Hm.</think>Yes", ["<think>Hm.</think>", "Yes"]),
        ("。", "今日は天気。明日は雨。", ["今日は天気。", "明日は雨。"]),
        (["! ", "? ", "\n"], "Oh! What? Yes\nNo.", ["Oh! ", "What? ", "Yes\n", "No."]),
    ],
)
def test_text_is_cut_where_a_reader_would(delimiter: Any, text: str, pieces: list[str]) -> None:
    """Of the everyday tokenizer, in which none of these is in a single token, or not always."""
    tokenizer = everyday_tokenizer()
    table = token_bytes(tokenizer)
    looking = Boundaries(table, len(table), slots=1)
    looking.open(0, DelimiterSegmentation(delimiter=delimiter, min_length=1), 500)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    cut, rest = [], ids
    for length in lengths(looking, 0, ids):
        cut.append(b"".join(table[i] for i in rest[:length]))
        rest = rest[length:]
    cut += [b"".join(table[i] for i in rest)] * bool(rest)
    assert b"".join(cut).decode() == text
    # A token may go on after the delimiter that it completes, as the one of a space and a word does.
    wanted = [piece.encode() for piece in pieces]
    ends = [sum(map(len, wanted[: n + 1])) for n in range(len(wanted))]
    found = [sum(map(len, cut[: n + 1])) for n in range(len(cut))]
    longest = max(map(len, table))
    assert len(found) == len(ends)
    assert all(0 <= at - end < longest for at, end in zip(found, ends, strict=True)), cut


@pytest.fixture(autouse=True)
def few_idle_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that some are given back."""
    monkeypatch.setattr(boundaries, "IDLE_STATES", 40)


class Slots(RuleBasedStateMachine):
    """Slots that open, go on and close in any order, with ever new delimiters."""

    @initialize(seed=st.integers(0, 2**32))
    def start(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.tokens = [b"", b"a", b"b", b"ab", b"ba", b"\n", b"aab"]
        self.boundaries = Boundaries(self.tokens, len(self.tokens), slots=1)
        self.open: dict[int, tuple[Segmentation, list[int]]] = {}

    def delimiter(self) -> str:
        return "".join(self.random.choice("ab\n") for _ in range(self.random.randint(1, 6)))

    @rule(slot=st.integers(0, 3), count=st.integers(1, 40), fixed=st.booleans())
    def begin(self, slot: int, count: int, fixed: bool) -> None:
        for _ in range(count):
            several = tuple(self.delimiter() for _ in range(self.random.randint(1, 3)))
            segmentation: Segmentation = DelimiterSegmentation(delimiter=several, min_length=2, max_length=9)
            if fixed:
                segmentation = FixedSegmentation(length=3)
            self.boundaries.open(slot, segmentation, 1000)
            self.open[slot] = segmentation, []

    @rule(slot=st.integers(0, 3))
    def end(self, slot: int) -> None:
        self.boundaries.close(slot)
        self.open.pop(slot, None)

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        slots = list(self.open)
        for _ in range(steps):
            tokens = [self.random.randrange(len(self.tokens)) for _ in slots]
            ended = self.boundaries.take(np.array(slots, np.int64), np.array(tokens, np.int64))
            for slot, token, ends in zip(slots, tokens, ended.tolist(), strict=True):
                segmentation, segment = self.open[slot]
                segment.append(token)
                length = segment_length([self.tokens[t] for t in segment], segmentation, 1000)
                assert ends == (length is not None)
                if ends:
                    segment.clear()

    @invariant()
    def what_nobody_needs_is_given_back(self) -> None:
        if not hasattr(self, "open"):
            return
        needed = {s.delimiters for s, _ in self.open.values() if s.delimiters}
        assert self.boundaries._needed.keys() == needed
        held = [*(n.rows for n in self.boundaries._needed.values()), *self.boundaries._idle.values()]
        rows = [0, *(int(row) for rows in held for row in rows), *self.boundaries._free_rows]
        assert sorted(rows) == list(range(len(self.boundaries._completes)))
        assert self.boundaries._idle_states == sum(map(len, self.boundaries._idle.values())) <= boundaries.IDLE_STATES


TestSlots = Slots.TestCase
TestSlots.settings = settings(deadline=None, max_examples=30, stateful_step_count=25)


def test_ten_thousand_different_delimiters_take_no_more_than_a_few() -> None:
    looking = Boundaries([b"a"], 1, slots=2)
    looking.open(1, DelimiterSegmentation(delimiter="kept"), 100)
    for number in range(10_000):
        looking.open(0, DelimiterSegmentation(delimiter=f"{number:x}"), 100)
    assert len(looking._completes) <= 2 * (boundaries.IDLE_STATES + 5 + 6)
    assert (b"kept",) in looking._needed


def test_the_largest_set_of_delimiters_is_served() -> None:
    draw = random.Random(0)
    longest = tuple("".join(chr(draw.randrange(97, 123)) for _ in range(64)) for _ in range(16))
    assert sum(map(len, longest)) == MOST_DELIMITER_BYTES
    tokens = [longest[3].encode()[:40], longest[3].encode()[40:]]
    looking = Boundaries(tokens, 2, slots=1)
    looking.open(0, DelimiterSegmentation(delimiter=longest, min_length=1), 100)
    assert lengths(looking, 0, [1, 0, 1, 1]) == [3]
