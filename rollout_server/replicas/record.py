"""What was judged of a response, kept outside of its replica: where it goes on if that one is lost.

The replica sends it in parts, about one a second, and whoever keeps them looks into none before it has to: hardly
anything is computed for responses that are not lost, which are nearly all.
"""

import pickle
import time
from collections.abc import Callable

from common.trajectory import Attempt

PART_SECONDS = 1.0
"""What was judged later than this before a loss is generated again."""

_Event = tuple[Attempt, Attempt | None, bool]
"""An attempt, the one that is kept in its place if that is another, and whether it ends the response."""


class Record:
    """What is known of one response. `parts` grow while it is generated."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def attempts(self) -> tuple[list[Attempt], bool]:
        """The attempts in order, and whether the last one ends the response."""
        attempts: list[Attempt] = []
        complete = False
        for part in self.parts:
            events: list[_Event] = pickle.loads(part)
            for attempt, kept, final in events:
                attempts.append(attempt)
                complete = final
                if kept is not None:
                    places = [(one.segment, one.attempt) for one in attempts]
                    attempts[places.index((kept.segment, kept.attempt))] = kept
        return attempts, complete

    def clear(self) -> None:
        """Nothing is known any more: the response begins anew."""
        self.parts.clear()


class Recorder:
    """Listens to one response beside its engine and sends what a `Record` keeps."""

    wants_tokens = False

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self._send = send
        self._events: list[_Event] = []
        self._sent = time.monotonic()

    def sampled(self, token_ids: list[int], logprobs: object) -> None:
        """Part of `Listener`."""

    def resumed(self, cached_tokens: int) -> None:
        """Part of `Listener`."""

    def judged(self, attempt: Attempt, final: bool) -> None:
        """Part of `Listener`."""
        self._hear((attempt, None, final))

    def restored(self, attempt: Attempt, kept: Attempt, final: bool) -> None:
        """Part of `Listener`."""
        self._hear((attempt, kept, final))

    def _hear(self, event: _Event) -> None:
        self._events.append(event)
        now = time.monotonic()
        if event[2] or now - self._sent >= PART_SECONDS:
            self._send(pickle.dumps(self._events))
            self._events.clear()
            self._sent = now
