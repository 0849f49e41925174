"""Prompts, requests, and what comes of them: attempts and trajectories.

One schema for NDJSON lines and Parquet rows; `common/packed.py` has the form that the learner works on. Log-probs are
in nats.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from common.config.base import StrictModel, Temperature
from common.config.erasure import ErasurePolicy
from common.threshold import GroupStatistics, History

Verdict = Literal["accepted", "erased"]
FinishReason = Literal["stop", "length"]


class Prompt(StrictModel):
    """A prompt as the data set gives it. `position`: its place in the shuffled epoch order.

    `columns`: all of its row, for the reward; empty once the responses have theirs.
    """

    id: str
    text: str
    token_ids: list[int]
    answer: str = ""
    position: int = 0
    columns: dict[str, Any] = Field(default_factory=dict)


class Measured(BaseModel):
    """The numbers that a judgement is made of. What else names them, as columns or as fields, follows this list.

    `baseline` and `threshold` are null where too few observations existed, which erases nothing.
    """

    uncertainty: float
    base: float
    extreme: float
    gradient: float
    baseline: float | None
    penalty: float
    modulation: float
    threshold: float | None


MEASURED = tuple(Measured.model_fields)


class Judgement(StrictModel, Measured):
    """Everything that decided over one attempt: enough to compute threshold and verdict again.

    `statistics` and `history` are as they were when the attempt was judged.
    """

    statistics: GroupStatistics
    history: History
    erased_tokens_before: int


class VersionSpan(StrictModel):
    """Tokens `start` (inclusive) to `end` (exclusive) of an attempt were sampled by weights `version`."""

    start: int
    end: int
    version: int


class Attempt(StrictModel):
    """One attempt at one segment of a response.

    `start`, `end`: positions in the response at the time of the attempt; all lists have `end - start` entries.
    `logprobs`: the model's own, before temperature. `behaviour_logprobs`: of the distribution that was sampled
    from, at `temperature`. `signal`: H_t in nats. `judgement` is null where the response was not monitored.
    """

    segment: int
    attempt: int
    start: int
    end: int
    token_ids: list[int]
    logprobs: list[float]
    behaviour_logprobs: list[float]
    signal: list[float]
    temperature: float
    versions: list[VersionSpan]
    verdict: Verdict
    judgement: Judgement | None = None


class Trajectory(StrictModel):
    """One response to a prompt, with every attempt at every segment in the order of generation.

    `token_ids` and the other per-token lists are those of the committed response: the accepted attempts, joined.
    An end-of-sequence token that ended the response is part of them.
    """

    prompt_id: str
    group_id: str
    sample: int
    seed: int
    prompt_token_ids: list[int]
    attempts: list[Attempt]
    erasable: bool
    finish_reason: FinishReason
    policy: ErasurePolicy | None = None
    erased_token_limit: int = 0
    reused_prefix_tokens: int = 0
    text: str = ""
    reward: float | None = None

    @cached_property
    def accepted(self) -> list[Attempt]:
        """The accepted attempts, one a segment, in order."""
        return [attempt for attempt in self.attempts if attempt.verdict == "accepted"]

    @cached_property
    def token_ids(self) -> list[int]:
        return [token for attempt in self.accepted for token in attempt.token_ids]

    @cached_property
    def logprobs(self) -> list[float]:
        return [value for attempt in self.accepted for value in attempt.logprobs]

    @cached_property
    def behaviour_logprobs(self) -> list[float]:
        return [value for attempt in self.accepted for value in attempt.behaviour_logprobs]

    @cached_property
    def token_temperatures(self) -> list[float]:
        return [attempt.temperature for attempt in self.accepted for _ in attempt.token_ids]

    @cached_property
    def token_versions(self) -> list[int]:
        """Weight version of each committed token."""
        return [
            span.version for attempt in self.accepted for span in attempt.versions for _ in range(span.start, span.end)
        ]

    @property
    def generated_tokens(self) -> int:
        """Committed and erased tokens."""
        return sum(attempt.end - attempt.start for attempt in self.attempts)

    @property
    def erased_tokens(self) -> int:
        return sum(a.end - a.start for a in self.attempts if a.verdict == "erased")

    @property
    def erasures(self) -> int:
        return sum(attempt.verdict == "erased" for attempt in self.attempts)


class SamplingExtras(StrictModel):
    """What else a response is sampled with: vLLM's parameters of these names.

    All but the last two count over the response so far, whatever of it was erased and made again.
    `json_schema`: the response is JSON of this schema, itself JSON; only without a policy. `cache_salt`: responses
    share cached prefixes only with those of the same salt.
    """

    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = Field(default=0, ge=0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0)
    logit_bias: dict[int, float] = Field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    json_schema: str | None = None
    cache_salt: str | None = None


NO_EXTRAS = SamplingExtras()


class ResponseRequest(StrictModel):
    """One response to generate.

    `group_id` and `group_size` name the responses that share statistics. `policy`: null generates without a
    monitor, exactly as plain vLLM; the attempt then has no log-probs and no signal. `erasable`: false monitors a
    plain member of a mixed group, which feeds the group's statistics and is never erased.
    `top_p`, `top_k` (0: off) and `min_p` truncate what is sampled from; behaviour log-probs are not corrected for them.
    `top_logprobs`: how many of the most likely tokens a listener is told with each sampled one; null: no log-probs.
    `stop`: strings that end the response where the rollout pool generates it; the endpoint looks for them itself.
    `attempt_texts`: whether the text of every attempt is wanted, beside that of the response.
    `resume_from`: attempts that were judged before, on an engine that was lost: generation goes on after the last.
    """

    prompt_id: str
    group_id: str
    group_size: int = Field(ge=1)
    sample: int = Field(ge=0)
    seed: int | None = None
    prompt_token_ids: list[int] = Field(min_length=1)
    max_tokens: int = Field(ge=1)
    temperature: Temperature = 1.0
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    top_logprobs: int | None = Field(default=None, ge=0)
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    extras: SamplingExtras = NO_EXTRAS
    policy: ErasurePolicy | None = None
    erasable: bool = True
    attempt_texts: bool = False
    resume_from: list[Attempt] = Field(default_factory=list)

    def stop_ids(self, eos_token_ids: Sequence[int]) -> tuple[int, ...]:
        """The tokens that end this response on a model whose responses `eos_token_ids` end."""
        return (() if self.ignore_eos else tuple(eos_token_ids)) + self.extras.stop_token_ids

    @model_validator(mode="after")
    def _json_is_not_erased(self) -> "ResponseRequest":
        if self.policy and self.extras.json_schema is not None:
            raise ValueError("a grammar cannot go back to a segment's start: json_schema is for plain generation only")
        return self

    @model_validator(mode="after")
    def _only_what_is_judged_resumes(self) -> "ResponseRequest":
        if self.resume_from and self.policy is None:
            raise ValueError("a response without a policy cannot be resumed: it has no judged attempts")
        return self

    @model_validator(mode="after")
    def _greedy_needs_a_retry_temperature(self) -> "ResponseRequest":
        if self.policy is None or not self.erasable or not self.policy.can_erase(self.max_tokens):
            return self
        if self.temperature == 0.0 and self.policy.retry_temperature is None:
            raise ValueError("erasure with temperature 0 would bring the same segment back: set retry_temperature")
        return self
