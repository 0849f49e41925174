"""One judged attempt, from the engine's record of it or from a finished trajectory."""

from dataclasses import dataclass

from common.trajectory import Attempt, Judgement
from rollout_server.monitor import Field
from rollout_server.records import JudgementRecord


@dataclass(slots=True)
class JudgedSegment:
    """What an answer says of an attempt; `logprobs` are the model's own of its tokens."""

    index: int
    attempt: int
    start: int
    end: int
    uncertainty: float
    base: float
    extreme: float
    gradient: float
    baseline: float | None
    penalty: float
    modulation: float
    threshold: float | None
    erased: bool
    final: bool
    token_ids: list[int]
    logprobs: list[float]
    text: str = ""

    @classmethod
    def from_record(cls, record: JudgementRecord, token_ids: list[int], with_logprobs: bool) -> "JudgedSegment":
        """From what the monitor sent."""
        get = record.field
        return cls(
            index=int(get(Field.SEGMENT)),
            attempt=int(get(Field.ATTEMPT)),
            start=int(get(Field.START)),
            end=int(get(Field.END)),
            uncertainty=get(Field.UNCERTAINTY),
            base=get(Field.BASE),
            extreme=get(Field.EXTREME),
            gradient=get(Field.GRADIENT),
            baseline=_finite(get(Field.BASELINE)),
            penalty=get(Field.PENALTY),
            modulation=get(Field.MODULATION),
            threshold=_finite(get(Field.THRESHOLD)),
            erased=record.erased,
            final=record.final,
            token_ids=token_ids,
            logprobs=record.per_token[:, 0].tolist() if with_logprobs else [],
        )

    @classmethod
    def from_attempt(cls, attempt: Attempt, judgement: Judgement, final: bool) -> "JudgedSegment":
        """From a trajectory's attempt."""
        return cls(
            index=attempt.segment,
            attempt=attempt.attempt,
            start=attempt.start,
            end=attempt.end,
            uncertainty=judgement.uncertainty,
            base=judgement.base,
            extreme=judgement.extreme,
            gradient=judgement.gradient,
            baseline=judgement.baseline,
            penalty=judgement.penalty,
            modulation=judgement.modulation,
            threshold=judgement.threshold,
            erased=attempt.verdict == "erased",
            final=final,
            token_ids=attempt.token_ids,
            logprobs=attempt.logprobs,
        )


def _finite(value: float) -> float | None:
    return None if value in (float("inf"), float("-inf")) else value
