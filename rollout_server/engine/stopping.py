"""Responses that end at a stop string, for training: found in committed text, and nothing after it is kept.

The same search as for HTTP requests, across tokens and segments. What was sampled after the token that completes a stop
string is not part of the trajectory, so that it is neither rewarded nor trained on.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from common.trajectory import Attempt, ResponseRequest, Trajectory, VersionSpan
from rollout_server.engine.detokenize import TextCursor, TextOptions
from rollout_server.engine.listener import Listener, TopLogprobs


class Engine(Protocol):
    """What generates: `ErasableEngine`."""

    eos_token_ids: tuple[int, ...]
    version: int

    async def generate(self, request: ResponseRequest, listener: Listener | None = None) -> Trajectory: ...


class StopWatch:
    """Listens to one response for its stop strings. `found` is called at the first, unless the response ends anyway.

    `resume_from`: what is known of the response, which may hold one already. `listener` hears of the same, up to the
    segment that holds the stop string: for it that one is final.
    """

    wants_tokens = False

    def __init__(
        self,
        cursor: TextCursor,
        found: Callable[[], object],
        resume_from: Sequence[Attempt] = (),
        listener: Listener | None = None,
    ) -> None:
        self._cursor = cursor
        self._found = found
        self._listener = listener
        self._attempts: list[Attempt] = list(resume_from)
        self._tokens: list[int] = []
        self._reused_prefix_tokens = 0
        for attempt in resume_from:
            if attempt.verdict == "accepted" and not self.has_stopped:
                self._commit(attempt.token_ids, final=True)

    @property
    def has_stopped(self) -> bool:
        return self._cursor.stopped is not None

    def sampled(self, token_ids: list[int], logprobs: TopLogprobs | None) -> None:
        """Part of `Listener`: a plain response's tokens stay."""
        if not self.has_stopped:
            self._commit(token_ids, final=False)

    def resumed(self, cached_tokens: int) -> None:
        """Part of `Listener`."""
        self._reused_prefix_tokens += cached_tokens
        if self._listener is not None:
            self._listener.resumed(cached_tokens)

    def judged(self, attempt: Attempt, final: bool) -> None:
        """Part of `Listener`."""
        if self.has_stopped:
            return
        self._attempts.append(attempt)
        if attempt.verdict == "accepted":
            self._commit(attempt.token_ids, final)
        if self._listener is not None:
            self._listener.judged(attempt, final or self.has_stopped)

    def restored(self, attempt: Attempt, kept: Attempt, final: bool) -> None:
        """Part of `Listener`."""
        if self.has_stopped:
            return
        self._attempts.append(attempt)
        place = [(a.segment, a.attempt) for a in self._attempts].index((kept.segment, kept.attempt))
        self._attempts[place] = kept
        self._commit(kept.token_ids, final)
        if self._listener is not None:
            self._listener.restored(attempt, kept, final or self.has_stopped)

    def trajectory(self, request: ResponseRequest, whole: Trajectory | None, version: int) -> Trajectory:
        """The response up to the stop string. `whole`: what the engine made of it, if it got to the end.

        `version`: of the weights that a plain response was sampled with, of which the engine says nothing then.
        """
        attempts = self._attempts if whole is None else whole.attempts
        if request.policy is None:
            attempts = [_plain_attempt(self._tokens, request.temperature, version)]
        policy = request.policy
        return Trajectory(
            prompt_id=request.prompt_id,
            group_id=request.group_id,
            sample=request.sample,
            seed=request.seed or 0,
            prompt_token_ids=request.prompt_token_ids,
            attempts=cut_attempts(attempts, len(self._tokens)),
            erasable=request.erasable and policy is not None,
            finish_reason="stop",
            policy=policy,
            erased_token_limit=policy.erased_token_limit(request.max_tokens) if policy is not None else 0,
            reused_prefix_tokens=self._reused_prefix_tokens if whole is None else whole.reused_prefix_tokens,
        )

    def _commit(self, token_ids: list[int], final: bool) -> None:
        _, taken = self._cursor.feed(token_ids)
        self._tokens += token_ids[:taken]
        if self.has_stopped and not final:
            self._found()


async def generate_until_stop(
    engine: Engine, tokenizer: Any, request: ResponseRequest, listener: Listener | None = None
) -> Trajectory:
    """One response, up to and with the token that completes one of `request.stop` in its committed text.

    `listener` hears of judgements only.
    """
    options = TextOptions(stops=request.stop, silent=frozenset(engine.eos_token_ids))
    cursor = TextCursor(tokenizer, request.prompt_token_ids, options)
    watch = StopWatch(cursor, lambda: task.cancel(), request.resume_from, listener)
    version = engine.version
    had_stopped = watch.has_stopped
    if had_stopped:
        return watch.trajectory(request, None, version)
    task = asyncio.create_task(engine.generate(request, watch))
    whole: Trajectory | None = None
    try:
        whole = await task
    except asyncio.CancelledError:
        current = asyncio.current_task()
        if not watch.has_stopped or (current is not None and current.cancelling()):
            raise
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    if watch.has_stopped:
        return watch.trajectory(request, whole, version)
    if whole is None:
        raise RuntimeError(f"the response of prompt {request.prompt_id}, sample {request.sample} was cancelled")
    return whole


def cut_attempts(attempts: Sequence[Attempt], length: int) -> list[Attempt]:
    """Attempts of a response of which only the first `length` committed tokens stay.

    The segment that is cut keeps the judgement that was made over the whole of it.
    """
    kept: list[Attempt] = []
    last = next((a.segment for a in attempts if a.verdict == "accepted" and a.end >= length), None)
    for attempt in attempts:
        if last is not None and attempt.segment > last:
            break
        if attempt.verdict == "accepted" and attempt.end > length:
            count = length - attempt.start
            versions = [
                VersionSpan(start=span.start, end=min(span.end, count), version=span.version)
                for span in attempt.versions
                if span.start < count
            ]
            cut: dict[str, Any] = {
                name: getattr(attempt, name)[:count]
                for name in ("token_ids", "logprobs", "behaviour_logprobs", "signal")
            }
            attempt = attempt.model_copy(update=cut | {"end": length, "versions": versions})
        kept.append(attempt)
    return kept


def _plain_attempt(token_ids: list[int], temperature: float, version: int) -> Attempt:
    return Attempt(
        segment=0,
        attempt=0,
        start=0,
        end=len(token_ids),
        token_ids=token_ids,
        logprobs=[],
        behaviour_logprobs=[],
        signal=[],
        temperature=temperature,
        versions=[VersionSpan(start=0, end=len(token_ids), version=version)],
        verdict="accepted",
    )
