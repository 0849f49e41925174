"""Arrays of finished responses stay with their replica until they are called for, and nowhere longer."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.packed import PackedResponse, pack
from rollout_server.replicas.packing import INLINE_BYTES, Shelf, referenced
from tests.trajectories import attempt, trajectory


def response(tokens: int) -> PackedResponse:
    return pack(trajectory([attempt(np.random.default_rng(0), 0, 0, tokens)], reward=None))


async def result(value: Any) -> Any:
    return value


class Method:
    """An actor's method of two results."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.calls = 0

    def options(self, num_returns: int) -> Any:
        assert num_returns == 2
        return SimpleNamespace(remote=self._remote)

    def _remote(self, key: int) -> Any:
        self.calls += 1
        stored, arrays = self.shelf.take(key)
        return result(stored), ("reference to", arrays)


def test_a_long_response_s_arrays_stay_until_they_are_called_for() -> None:
    shelf = Shelf()
    whole = response(INLINE_BYTES)
    header = shelf.header(7, whole)
    assert (header.tokens, len(shelf)) == (None, 1)
    assert header.response_tokens == INLINE_BYTES
    method = Method(shelf)
    found = asyncio.run(referenced(header, 7, method))
    assert found.reference == ("reference to", whole.arrays)
    assert len(shelf) == 0


def test_a_short_response_s_arrays_go_with_the_header() -> None:
    shelf = Shelf()
    method = Method(shelf)
    whole = response(50)
    assert asyncio.run(referenced(shelf.header(1, whole), 1, method)) is whole
    assert (len(shelf), method.calls) == (0, 0)


def test_what_nobody_will_call_for_is_discarded_once() -> None:
    shelf = Shelf()
    shelf.header(1, response(INLINE_BYTES))
    shelf.discard(1)
    shelf.discard(1)
    assert len(shelf) == 0
    with pytest.raises(KeyError):
        shelf.take(1)
