"""Where segments end: after so many tokens, or with the token that completes a delimiter in the segment's text.

It is decided in the host's memory whatever the device, because the adapter has the sampled tokens there: a few table
look-ups for each byte of a token, in a compiled loop. The reference is `common.segmentation`.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from common.config.erasure import Segmentation
from rollout_server.monitor.backends.automaton import automaton
from rollout_server.monitor.backends.compiled import compiled, places

Array = Any
IDLE_STATES = 8192
"""States of automata that are kept though no slot needs them; 1 KiB each."""


class Place(IntEnum):
    """Columns of a slot's state.

    `COUNT`: tokens of the segment under way. `LEFT`: tokens that the response may still have. `STATE`: of the
    automaton, after the segment's text so far; `ROOT` at its start.
    """

    COUNT = 0
    LEFT = 1
    SHORTEST = 2
    LONGEST = 3
    ROOT = 4
    STATE = 5


PLACE = places(Place)


@dataclass(slots=True)
class _Needed:
    """An automaton that slots need, how many of them, and the rows of the common tables that hold its states."""

    rows: np.ndarray
    slots: int = 0


class Boundaries:
    """State of all slots, and the automata of the delimiters that they look for. Capacities grow on demand.

    `token_bytes`: what each token adds to a text (`common.token_bytes`). The automata's states are rows of one table,
    which they share. An automaton that no slot needs is kept for a while, then its rows are another's.
    """

    def __init__(self, token_bytes: Sequence[bytes], vocabulary: int, slots: int) -> None:
        lengths = np.zeros(vocabulary + 1, np.int64)
        known = token_bytes[:vocabulary]
        lengths[1 : len(known) + 1] = [len(text) for text in known]
        self._starts = np.cumsum(lengths)
        """Where each token's bytes begin in `_text`, `[vocabulary + 1]`."""
        self._text = np.array(bytearray(b"".join(known)), np.uint8)
        self._slots = np.zeros((slots, len(Place)), np.int64)
        # Row 0 completes nothing: the only state of a segment without delimiters.
        self._following = np.zeros((1, 256), np.int32)
        self._completes = np.zeros(1, np.bool_)
        self._free_rows: list[int] = []
        self._needed: dict[tuple[bytes, ...], _Needed] = {}
        self._idle: OrderedDict[tuple[bytes, ...], np.ndarray] = OrderedDict()
        """Rows of the others, least lately used first; `_idle_states` of them."""
        self._idle_states = 0
        self._delimiters: dict[int, tuple[bytes, ...]] = {}
        """What slots look for, if anything."""
        nothing = np.empty(0, np.int64)
        self.take(nothing, nothing)

    def open(self, slot: int, segmentation: Segmentation, left: int) -> None:
        """Begin a segment in `slot`, of a response that may have `left` more tokens."""
        self.close(slot)
        if slot >= len(self._slots):
            self._slots = _longer(self._slots, slot + 1)
        root = self._acquire(slot, segmentation.delimiters) if segmentation.delimiters else 0
        self._slots[slot] = (0, left, segmentation.min_length, segmentation.max_length, root, root)

    def close(self, slot: int) -> None:
        """Nothing is looked for in `slot` any more."""
        delimiters = self._delimiters.pop(slot, None)
        if delimiters is None:
            return
        needed = self._needed[delimiters]
        needed.slots -= 1
        if needed.slots:
            return
        self._idle[delimiters] = self._needed.pop(delimiters).rows
        self._idle_states += len(needed.rows)
        while self._idle_states > IDLE_STATES:
            _, rows = self._idle.popitem(last=False)
            self._idle_states -= len(rows)
            self._free_rows += rows.tolist()

    def take(self, slots: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Take the tokens `[rows]` that were sampled for `slots` `[rows]`: whether each ends its segment, `[rows]`."""
        ended: np.ndarray = _take(
            slots, tokens, self._starts, self._text, self._following, self._completes, self._slots
        )
        return ended

    def _acquire(self, slot: int, delimiters: tuple[bytes, ...]) -> int:
        """The start of these delimiters' automaton, which is the slot's until it is closed."""
        if delimiters not in self._needed:
            rows = self._idle.pop(delimiters, None)
            if rows is None:
                rows = self._store(*automaton(delimiters))
            else:
                self._idle_states -= len(rows)
            self._needed[delimiters] = _Needed(rows)
        needed = self._needed[delimiters]
        needed.slots += 1
        self._delimiters[slot] = delimiters
        return int(needed.rows[0])

    def _store(self, following: np.ndarray, completes: np.ndarray) -> np.ndarray:
        """Rows of the common tables that now hold an automaton."""
        missing = len(completes) - len(self._free_rows)
        if missing > 0:
            end = len(self._completes)
            self._following = _longer(self._following, end + missing)
            self._completes = _longer(self._completes, end + missing)
            self._free_rows += range(end, len(self._completes))
        rows = np.array([self._free_rows.pop() for _ in completes])
        self._following[rows] = rows[following]
        self._completes[rows] = completes
        return rows


def _longer(array: np.ndarray, size: int) -> np.ndarray:
    """At least `size` rows, the new ones 0; doubles, so that growth is rare."""
    more = max(size, 2 * len(array)) - len(array)
    return np.concatenate([array, np.zeros((more, *array.shape[1:]), array.dtype)])


@compiled
def _take(
    slots: Array, tokens: Array, starts: Array, text: Array, following: Array, completes: Array, state: Array
) -> Array:
    ended = np.empty(len(slots), np.bool_)
    for i in range(len(slots)):
        own, token = state[slots[i]], tokens[i]
        own[PLACE.COUNT] += 1
        own[PLACE.LEFT] -= 1
        found = False
        if own[PLACE.ROOT] > 0:
            at = own[PLACE.STATE]
            for place in range(starts[token], starts[token + 1]):
                at = following[at, text[place]]
                found |= completes[at]
            own[PLACE.STATE] = at
        ended[i] = (
            (found and own[PLACE.COUNT] >= own[PLACE.SHORTEST])
            or own[PLACE.COUNT] >= own[PLACE.LONGEST]
            or own[PLACE.LEFT] <= 0
        )
        if ended[i]:
            own[PLACE.COUNT] = 0
            own[PLACE.STATE] = own[PLACE.ROOT]
    return ended
