"""From requests to groups: what the driver asks of the rollout side."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import cast

from common.interfaces import Rollouts
from common.packed import Group, PackedResponse
from common.trajectory import Prompt, ResponseRequest

GRACE_SECONDS = 30.0
Stream = AsyncGenerator[PackedResponse, None]


class Progress:
    """When the rollout side last gave a response, whoever waited for it.

    A response may wait for a place as long as others finish. Where none does for `seconds`, all that wait give up.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._last = time.monotonic()
        self._waiting = 0
        self._held = 0

    @property
    def left(self) -> float:
        """Seconds that may pass until the next response."""
        return self.seconds if self._held else self._last + self.seconds - time.monotonic()

    def made(self) -> None:
        """A response has arrived."""
        self._last = time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Somebody waits for responses; the time before the first one who does so does not count."""
        if not self._waiting:
            self.made()
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    @contextmanager
    def held(self) -> Iterator[None]:
        """No response is to be expected: a weight sync, which has a deadline of its own."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            self.made()


async def generate_groups(
    rollouts: Rollouts,
    prompts: Sequence[Prompt],
    requests: Sequence[Sequence[ResponseRequest]],
    progress: Progress,
    finished: Callable[[PackedResponse], None] = lambda response: None,
) -> list[Group]:
    """All responses, in the order of the requests, whatever the order in which they finish.

    `prompts` and `requests` go together. `finished` gets each response as it arrives. The rollout side watches over its
    replicas; here the next response is waited for as long as there is `progress`. Raises TimeoutError that says how
    many responses are missing, and RuntimeError if the rollout side ends early or answers what was not asked for.
    """
    wanted = {(r.group_id, r.sample) for group in requests for r in group}
    found: dict[tuple[str, int], PackedResponse] = {}
    # Leaving early must end the generator at once, so that its requests are cancelled.
    async with aclosing(cast(Stream, rollouts.generate(requests))) as responses:
        with progress.waiting():
            try:
                while (response := await _next(responses, progress)) is not None:
                    found[response.group_id, response.sample] = response
                    finished(response)
            except TimeoutError as error:
                raise TimeoutError(
                    f"{len(wanted) - len(found)} of {len(wanted)} responses are missing, and none arrived within "
                    f"{progress.seconds:g} s"
                ) from error
    if found.keys() != wanted:
        missing, strange = len(wanted - found.keys()), len(found.keys() - wanted)
        raise RuntimeError(f"{missing} of {len(wanted)} responses are missing, {strange} were not asked for")
    return [
        Group(prompt=prompt, trajectories=[found[r.group_id, r.sample] for r in group])
        for prompt, group in zip(prompts, requests, strict=True)
    ]


async def _next(responses: Stream, progress: Progress) -> PackedResponse | None:
    """The next response, None after the last. Raises TimeoutError where nobody gets one any more."""
    arriving = asyncio.ensure_future(anext(responses, None))
    try:
        while not arriving.done():
            if progress.left <= 0.0:
                raise TimeoutError
            await asyncio.wait({arriving}, timeout=progress.left)
        progress.made()
        return arriving.result()
    finally:
        if not arriving.done():
            arriving.cancel()
            await asyncio.gather(arriving, return_exceptions=True)
