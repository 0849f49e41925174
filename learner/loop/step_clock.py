"""Where a step's time goes, while generation goes on beside it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from common import metrics as names
from learner.loop.producer import Producer


@dataclass(frozen=True, slots=True)
class _Moment:
    """`seconds`: of a clock. `generating`, `tokens`: the producer's, up to then."""

    seconds: float
    generating: float
    tokens: int


@dataclass(slots=True)
class StepClock:
    """Takes the time of one step after another. Whatever lies between the marks of a step is other time.

    What comes after a step's end, such as writing its metrics, is in the next step's time, but for what is `left_out`.
    """

    producer: Producer
    _last: _Moment = field(init=False)
    _marks: dict[str, _Moment] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._last = self._now()

    def mark(self, name: str) -> None:
        """Remember this moment: `waiting`, `taken`, `ready`, `trained` and `published`, in this order."""
        self._marks[name] = self._now()

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Do not count the block, which is an evaluation."""
        begin = self._now()
        yield
        now, last = self._now(), self._last
        self._last = _Moment(
            last.seconds + now.seconds - begin.seconds,
            last.generating + now.generating - begin.generating,
            last.tokens + now.tokens - begin.tokens,
        )

    def finish(self) -> dict[str, float | None]:
        """The metrics of the step that ends now."""
        now, last, marks = self._now(), self._last, self._marks
        step, generating = now.seconds - last.seconds, now.generating - last.generating
        rollout = marks["taken"].generating - marks["waiting"].generating
        train = marks["trained"].seconds - marks["ready"].seconds
        sync = marks["published"].seconds - marks["trained"].seconds
        self._last, self._marks = now, {}
        return {
            names.STEP_SECONDS: step,
            names.ROLLOUT_SECONDS: rollout,
            names.TRAIN_SECONDS: train,
            names.SYNC_SECONDS: sync,
            names.OTHER_SECONDS: step - (rollout + train + sync),
            names.WAIT_SECONDS: marks["taken"].seconds - marks["waiting"].seconds,
            names.CHECKPOINT_WAIT_SECONDS: marks["ready"].seconds - marks["taken"].seconds,
            names.BLOCKED_SECONDS: max(0.0, step - generating),
            names.OVERLAP_SECONDS: max(0.0, generating - rollout),
            names.TOKENS_PER_SECOND: (now.tokens - last.tokens) / generating if generating else None,
        }

    def _now(self) -> _Moment:
        now = time.monotonic()
        return _Moment(now, self.producer.generating.seconds(now), self.producer.generated_tokens)
