"""How far a response has come: what is committed, what was erased, and where its next submission goes on."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from common.config.erasure import ErasurePolicy
from common.threshold import History, extended_history, kept_attempt, may_erase
from common.trajectory import Attempt, Judgement, ResponseRequest, VersionSpan
from rollout_server.monitor.adjustments import Adjustments


@dataclass(slots=True)
class Progress:
    """A response under way.

    `kind`: of its statistics. `erased_limit`: tokens that may be erased in all. `attempt`: the number of the next
    attempt at `segment`; 0 where nothing of the segment is on record. `erased_at`: the engine step that ended the last
    submission by an erasure. `adjustments`: what all submissions are sampled with. `cache_salt`: they share cached
    prefixes with those of the same salt only.
    """

    kind: str
    policy: ErasurePolicy
    erased_limit: int
    committed: list[int] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    segment: int = 0
    attempt: int = 0
    erased_tokens: int = 0
    history: History = field(default_factory=History)
    reused_prefix_tokens: int = 0
    erased_at: int | None = None
    finished: bool = False
    adjustments: Adjustments | None = None
    cache_salt: str | None = None

    @property
    def under_way(self) -> list[Attempt]:
        """The attempts at the segment that the next submission goes on with."""
        return self.attempts[len(self.attempts) - self.attempt :]

    @property
    def best(self) -> float | None:
        """The least uncertainty of the attempts under way, if the policy may keep one of them in the end."""
        if self.policy.on_exhaustion != "best" or not self.attempt:
            return None
        return min(judged(attempt).uncertainty for attempt in self.under_way)

    def add(self, attempt: Attempt) -> Attempt | None:
        """Move on by an attempt that was judged now; returns the one that is kept in its place, if its verdict says so.

        An attempt that is erased although no erasure is left gives way to the least uncertain one. That one stands as
        accepted from then on, in its place among the attempts; its tokens no longer count as erased.
        """
        self._record(attempt)
        tokens, before = len(attempt.token_ids), judged(attempt).erased_tokens_before
        if attempt.verdict == "accepted":
            self._accept(attempt)
        elif not may_erase(self.policy, attempt.attempt, before, tokens, self.erased_limit):
            own = self.under_way
            lengths = [len(one.token_ids) for one in own]
            uncertainties = [judged(one).uncertainty for one in own]
            place = kept_attempt(uncertainties, lengths, self.erased_tokens - sum(lengths), self.erased_limit)
            kept = own[place].model_copy(update={"verdict": "accepted"})
            self.attempts[len(self.attempts) - len(own) + place] = kept
            self.erased_tokens -= lengths[place]
            self._accept(kept)
            return kept
        return None

    def resume(self, attempts: Sequence[Attempt]) -> None:
        """Take over what is on record; a kept attempt may be followed by others at the same segment."""
        for number, attempt in enumerate(attempts):
            self._record(attempt)
            is_last = number + 1 == len(attempts) or attempts[number + 1].segment != attempt.segment
            if is_last:
                for kept in self.under_way:
                    if kept.verdict == "accepted":
                        self._accept(kept)
                        break

    def _record(self, attempt: Attempt) -> None:
        self.attempts.append(attempt)
        self.segment, self.attempt = attempt.segment, attempt.attempt + 1
        self.history = judged(attempt).history
        if attempt.verdict == "erased":
            self.erased_tokens += len(attempt.token_ids)

    def _accept(self, attempt: Attempt) -> None:
        judgement = judged(attempt)
        self.segment += 1
        self.attempt = 0
        self.committed += attempt.token_ids
        self.history = extended_history(judgement.history, judgement.uncertainty, judgement.statistics)

    def has_stopped(self, request: ResponseRequest, eos_token_ids: Sequence[int]) -> bool:
        """Whether what is committed ends with a token that ends the response."""
        return self.committed[-1] in request.stop_ids(eos_token_ids)

    def is_complete(self, request: ResponseRequest, eos_token_ids: Sequence[int]) -> bool:
        """Whether the last segment was accepted and ends the response."""
        if self.attempt or not self.committed:
            return False
        return len(self.committed) >= request.max_tokens or self.has_stopped(request, eos_token_ids)


@dataclass(slots=True)
class Sampled:
    """What one submission sampled, from position `start` of the response on."""

    start: int
    token_ids: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


def version_spans(versions: Sequence[tuple[int, int]], start: int, end: int) -> list[VersionSpan]:
    """The versions of the tokens at `start` to `end` of a response, counted from `start`.

    `versions`: positions in the response, and the version from there on, in order.
    """
    spans = []
    for place, (first, version) in enumerate(versions):
        last = versions[place + 1][0] if place + 1 < len(versions) else end
        begin, stop = max(first, start), min(last, end)
        if begin < stop:
            spans.append(VersionSpan(start=begin - start, end=stop - start, version=version))
    return spans


def judged(attempt: Attempt) -> Judgement:
    """The judgement of an attempt of a monitored response."""
    if attempt.judgement is None:
        raise ValueError("an attempt that was not judged cannot be gone on from")
    return attempt.judgement
