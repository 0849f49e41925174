"""One choice of a request: follows its response and says what of it is new, for streams and for whole answers."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from common.trajectory import Attempt, FinishReason, ResponseRequest, Trajectory
from rollout_server.engine.detokenize import TextCursor
from rollout_server.engine.listener import PromptScores, TopLogprobs
from rollout_server.http.openai.entries import Entries
from rollout_server.http.openai.segments import JudgedSegment


@dataclass(frozen=True, slots=True)
class Place:
    """An attempt's place in a response: the segment it is at, its number there and its first token's position."""

    index: int
    attempt: int
    start: int


@dataclass(slots=True)
class Chunk:
    """What is new of a choice. `retract`: characters to drop from its end, and tokens, because of `erased`."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    entries: Entries = field(default_factory=Entries)
    erased: Place | None = None
    retract: int = 0
    retract_tokens: int = 0
    final: bool = False


@dataclass(frozen=True, slots=True)
class ChoiceOptions:
    """What a request wants to know of its choices. `top_logprobs`: null for no log-probs.

    `end_token_id`: the token whose end of a response needs no reason. `prompt_logprobs`: of how many likeliest tokens,
    beside each token of the prompt; null: it is not scored. `only_prompt`: nothing is generated.
    """

    live: bool = False
    segments: bool = True
    top_logprobs: int | None = None
    end_token_id: int | None = None
    prompt_logprobs: int | None = None
    only_prompt: bool = False


class Observer(Protocol):
    """Told of what counts in metrics and traces. `follows`: wants to know when an attempt is over, not only that."""

    follows: bool

    def first_token(self) -> None: ...

    def attempt(self, choice: "Choice", segment: JudgedSegment, started: int, ended: int) -> None:
        """Times in nanoseconds since the epoch."""
        ...

    def restored(self) -> None:
        """An attempt that was erased is accepted after all."""
        ...


class Choice:
    """Listens to the generation of one response.

    `changed` is called whenever there is a new chunk; without it none are kept. `stop` is called when a stop string
    makes going on needless. Text and tokens are those of accepted segments; in live mode chunks hold tokens as they
    are sampled, and an erasure takes them back. `attempts`: those judged so far, from which it can be resumed.
    """

    def __init__(
        self,
        index: int,
        request: ResponseRequest,
        cursor: TextCursor,
        options: ChoiceOptions,
        observer: Observer,
        changed: Callable[["Choice"], None] | None,
    ) -> None:
        self.index = index
        self.request = request
        self.options = options
        self.token_ids: list[int] = []
        self.entries = Entries()
        self.segments: list[JudgedSegment] = []
        self.attempts: list[Attempt] = []
        self.erased_tokens = 0
        self.reused_prefix_tokens = 0
        self.policy_version = 0
        self.trajectory: Trajectory | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.prompt_logprobs: PromptScores | None = None
        self.chunks: list[Chunk] = []
        self.is_complete = False
        """Whether its last segment was accepted."""
        self.introduced = False
        """For encoders: whether the stream has said what comes once, as the choice's role."""
        self.logprob_offset = 0
        """For encoders: where in the text the next token's log-prob belongs."""
        self.told_tokens = 0
        """For encoders: tokens that the stream has told and not taken back."""
        self.stop: Callable[[], None] | None = None
        self._cursor = cursor
        monitored = request.policy is not None
        self._live = cursor.copy() if options.live and monitored else None
        self._live_tokens = 0
        self._segments_have_texts = options.segments and monitored
        self._uncut = cursor.copy() if self._segments_have_texts and cursor.finder is not None else None
        if self._uncut is not None:
            self._uncut.finder = None
        self._pending: list[dict[int, float]] = []
        self._erased: list[list[dict[int, float]]] = []
        """Log-probs of the erased attempts at the segment under way, one of which may be accepted after all."""
        self._under_way = Place(0, 0, 0)
        self._texts: list[str] = []
        self._observer = observer
        self._changed = changed
        self._sampling = False
        self._attempt_started = time.time_ns()

    @property
    def text(self) -> str:
        """The committed text."""
        return "".join(self._texts)

    def has_stopped(self) -> bool:
        """Whether a stop string was found in committed text."""
        return self._cursor.stopped is not None

    @property
    def wants_tokens(self) -> bool:
        """Part of `Listener`: whether judged segments, or the finished trajectory, are not enough."""
        return (
            self._changed is not None
            or self._observer.follows
            or self._cursor.finder is not None
            or self.options.top_logprobs is not None
        )

    def sampled(self, token_ids: list[int], logprobs: TopLogprobs | None) -> None:
        """Part of `Listener`."""
        if not self._sampling:
            self._sampling = True
            self._observer.first_token()
        if self.request.policy is None:
            self._commit(token_ids, _entries(token_ids, logprobs, self.options.top_logprobs))
            return
        if logprobs is not None:
            self._pending += logprobs
        if self._live is not None:
            text, taken = self._live.feed(token_ids)
            self._live_tokens += taken
            if taken:
                entries = _entries(token_ids[:taken], logprobs, self.options.top_logprobs)
                self._emit(Chunk(text=text, token_ids=token_ids[:taken], entries=entries))

    def resumed(self, cached_tokens: int) -> None:
        """Part of `Listener`."""
        self.reused_prefix_tokens += cached_tokens

    def judged(self, attempt: Attempt, final: bool) -> None:
        """Part of `Listener`."""
        if self.has_stopped():
            return
        self.attempts.append(attempt)
        segment = JudgedSegment.from_attempt(attempt, final, self.options.top_logprobs is not None)
        ended = time.time_ns()
        self._observer.attempt(self, segment, self._attempt_started, ended)
        self._attempt_started = ended
        top = self._pending[: len(segment.token_ids)]
        self.segments.append(segment)
        if segment.erased:
            self._pending.clear()
            self._erased.append(top)
            self._erase(segment)
            return
        del self._pending[: len(top)]
        self._accept(segment, top)

    def restored(self, attempt: Attempt, kept: Attempt, final: bool) -> None:
        """Part of `Listener`."""
        if self.has_stopped():
            return
        self.judged(attempt, final=False)
        self._observer.restored()
        place = next(n for n, one in enumerate(self.attempts) if _same_place(one, kept))
        self.attempts[place] = kept
        segment = self.segments[place]
        segment.erased, segment.final = False, final
        self.erased_tokens -= len(segment.token_ids)
        top = self._erased[kept.attempt]
        if self._live is not None:
            text, taken = self._live.feed(segment.token_ids)
            self._live_tokens += taken
            if taken:
                entries = self._entries(segment, top).first(taken)
                self._emit(Chunk(text=text, token_ids=segment.token_ids[:taken], entries=entries))
        self._accept(segment, top)

    def _accept(self, segment: JudgedSegment, top: TopLogprobs) -> None:
        """`top`: log-probs of the segment's tokens, if vLLM reported them."""
        self._erased.clear()
        self._under_way = Place(segment.index + 1, 0, segment.end)
        self.is_complete = segment.final
        entries = self._entries(segment, top)
        if self._uncut is not None:
            segment.text, _ = self._uncut.feed(segment.token_ids)
        text = self._commit(segment.token_ids, entries, segment)
        if self._segments_have_texts and self._uncut is None:
            segment.text = text

    def _entries(self, segment: JudgedSegment, top: TopLogprobs) -> Entries:
        if self.options.top_logprobs is None:
            return Entries()
        return _entries(segment.token_ids, top, self.options.top_logprobs) if top else _plain_entries(segment)

    def _erase(self, segment: JudgedSegment) -> None:
        self._under_way = Place(segment.index, segment.attempt + 1, segment.start)
        self.erased_tokens += len(segment.token_ids)
        if self._segments_have_texts:
            segment.text, _ = (self._uncut or self._cursor).copy().feed(segment.token_ids)
        self._take_back(Place(segment.index, segment.attempt, segment.start))

    def _take_back(self, place: Place) -> None:
        """Tell a live stream to drop what it showed of the attempt at `place`."""
        if self._live is None:
            return
        retract = self._live.characters - self._cursor.characters
        self._live = self._cursor.copy()
        tokens, self._live_tokens = self._live_tokens - len(self.token_ids), len(self.token_ids)
        self._emit(Chunk(erased=place, retract=retract, retract_tokens=tokens))

    def rewind(self) -> None:
        """Forget what was sampled after the last judged segment: the replica that sampled it is lost.

        The attempt that was under way is made again, under the same number.
        """
        self._pending.clear()
        self._attempt_started = time.time_ns()
        if self._live_tokens > len(self.token_ids):
            self._take_back(self._under_way)

    def _commit(self, token_ids: list[int], entries: Entries, segment: JudgedSegment | None = None) -> str:
        """Take tokens that stay; returns what can be shown of their text."""
        if self.has_stopped():
            return ""
        text, taken = self._cursor.feed(token_ids)
        self.token_ids += token_ids[:taken]
        entries = entries.first(taken)
        self.entries.extend(entries)
        self._texts.append(text)
        if segment is not None and taken < len(token_ids):
            segment.token_ids = token_ids[:taken]
            segment.end = segment.start + taken
        if self._live is None and taken:
            self._emit(Chunk(text=text, token_ids=token_ids[:taken], entries=entries))
        if self.has_stopped() and self.stop is not None and not (segment is not None and segment.final):
            self.stop()
        return text

    def take(self, trajectory: Trajectory) -> None:
        """Take a plain response that was generated without listening."""
        self._commit(trajectory.token_ids, Entries())

    def finish(self, trajectory: Trajectory | None, policy_version: int) -> None:
        """The response is complete; `trajectory` is None if a stop string ended it before the engine did.

        A trajectory that was resumed knows neither the group it began in nor what was reused before.
        """
        if trajectory is not None and trajectory.group_id != self.request.group_id:
            known = {"group_id": self.request.group_id, "reused_prefix_tokens": self.reused_prefix_tokens}
            trajectory = trajectory.model_copy(update=known)
        self.trajectory = trajectory
        if trajectory is not None:
            self.reused_prefix_tokens = trajectory.reused_prefix_tokens
            spans = trajectory.attempts[-1].versions
            policy_version = spans[-1].version if spans else policy_version
        self.policy_version = policy_version
        stopped = self.has_stopped() or trajectory is None
        self.finish_reason = "stop" if stopped else trajectory.finish_reason  # type: ignore[union-attr]
        self.stop_reason = self._cursor.stopped
        if self.finish_reason == "stop" and not stopped and self.token_ids[-1] != self.options.end_token_id:
            self.stop_reason = self.token_ids[-1]
        text = self._cursor.finish()
        self._texts.append(text)
        if self._live is not None:
            self._live.finish()
        if self._uncut is not None:
            self._trim_segments(self._uncut.characters - self._cursor.characters)
        self._emit(Chunk(text=text, final=True))

    def finish_scored(self, policy_version: int) -> None:
        """Only the prompt was scored."""
        self.policy_version = policy_version
        self.finish_reason = "length"
        self._emit(Chunk(final=True))

    def _trim_segments(self, excess: int) -> None:
        """Cut what a stop string took off the text from the end of the last accepted segments."""
        for segment in reversed(self.segments):
            if excess <= 0:
                return
            if not segment.erased:
                cut = min(excess, len(segment.text))
                segment.text = segment.text[: len(segment.text) - cut]
                excess -= cut

    def _emit(self, chunk: Chunk) -> None:
        if self._changed is not None:
            self.chunks.append(chunk)
            self._changed(self)


def _same_place(one: Attempt, other: Attempt) -> bool:
    return (one.segment, one.attempt) == (other.segment, other.attempt)


def _entries(token_ids: list[int], logprobs: TopLogprobs | None, top: int | None) -> Entries:
    entries = Entries()
    if logprobs is not None and top is not None:
        for token_id, known in zip(token_ids, logprobs, strict=False):
            entries.add(token_id, known[token_id], _likeliest(known, top))
    return entries


def _likeliest(known: dict[int, float], top: int) -> list[tuple[int, float]]:
    """The `top` likeliest; vLLM lists the sampled token first, and once more in its place if it is among them."""
    return sorted(known.items(), key=lambda item: -item[1])[:top]


def _plain_entries(segment: JudgedSegment) -> Entries:
    entries = Entries()
    for token_id, logprob in zip(segment.token_ids, segment.logprobs, strict=False):
        entries.add(token_id, logprob)
    return entries
