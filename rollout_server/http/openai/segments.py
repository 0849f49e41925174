"""One judged attempt, as answers report it."""

from dataclasses import dataclass

from common.trajectory import Attempt, Judgement


@dataclass(slots=True)
class JudgedSegment:
    """What an answer says of an attempt; `logprobs` are the model's own of its tokens."""

    index: int
    attempt: int
    start: int
    end: int
    judgement: Judgement
    erased: bool
    final: bool
    token_ids: list[int]
    logprobs: list[float]
    text: str = ""

    @classmethod
    def from_attempt(cls, attempt: Attempt, final: bool, with_logprobs: bool) -> "JudgedSegment":
        """From an attempt that was judged."""
        judgement = attempt.judgement
        if judgement is None:
            raise ValueError("an attempt of a response that is not monitored has no judgement")
        return cls(
            index=attempt.segment,
            attempt=attempt.attempt,
            start=attempt.start,
            end=attempt.end,
            judgement=judgement,
            erased=attempt.verdict == "erased",
            final=final,
            token_ids=attempt.token_ids,
            logprobs=attempt.logprobs if with_logprobs else [],
        )
