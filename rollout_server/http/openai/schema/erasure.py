"""The `erasure` object of requests and answers."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from common.config.erasure import (
    MOST_DELIMITERS,
    SHORTEST_DELIMITED,
    Delimiter,
    DelimiterSegmentation,
    ErasurePolicy,
    FixedSegmentation,
    SignalWeights,
    check_delimiters,
    with_default_min_length,
)
from common.trajectory import Measured
from rollout_server.http.openai.schema.base import AnswerModel, RequestModel, TokenId

SegmentLength = Annotated[int, Field(ge=1, le=1_048_576)]


Delimiters = Annotated[list[Delimiter], Field(min_length=1, max_length=MOST_DELIMITERS, fail_fast=True)]


class FixedSegments(RequestModel):
    """Segments of `length` tokens each."""

    mode: Literal["fixed"]
    length: SegmentLength = 512


class DelimiterSegments(RequestModel):
    """A segment ends with the token that completes a delimiter in its text, within these lengths in tokens."""

    mode: Literal["delimiter"]
    delimiter: Delimiter | Delimiters = Field(
        default="\n", description="A text, or several of which each ends a segment; it may be spread over tokens."
    )
    min_length: SegmentLength = SHORTEST_DELIMITED
    max_length: SegmentLength = 512

    @model_validator(mode="before")
    @classmethod
    def _default_is_within_max_length(cls, data: Any) -> Any:
        return with_default_min_length(data)

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> "DelimiterSegments":
        if self.min_length > self.max_length:
            raise ValueError(f"min_length ({self.min_length}) exceeds max_length ({self.max_length})")
        check_delimiters(self.delimiter)
        return self


class UncertaintyWeights(RequestModel):
    """Weights of the parts of a segment's uncertainty."""

    base: float = Field(default=1.0, ge=0.0, le=1e3)
    extreme: float = Field(default=0.0, ge=0.0, le=1e3)
    gradient: float = Field(default=0.0, ge=0.0, le=1e3)

    @model_validator(mode="after")
    def _one_is_positive(self) -> "UncertaintyWeights":
        if self.base == self.extreme == self.gradient == 0.0:
            raise ValueError("weights are all 0: every segment would have the uncertainty 0")
        return self


class ErasureOptions(RequestModel):
    """How this request is generated; what is left out is as the server's default policy has it."""

    enabled: bool = Field(default=True, description="false: plain vLLM generation.")
    segmentation: Annotated[FixedSegments | DelimiterSegments, Field(discriminator="mode")] | None = None
    signal: Literal["entropy", "cross_entropy"] | None = None
    window: int | None = Field(default=None, ge=1, le=4096, description="Trailing moving average, in tokens.")
    weights: UncertaintyWeights | None = None
    min_uncertainty: float | None = Field(
        default=None,
        ge=0.0,
        le=1e6,
        description="Nothing is erased whose uncertainty is below this; left out where a threshold is given: 0.",
    )
    statistics: Literal["index", "group"] | None = Field(
        default=None, description="A segment is compared with the group's others at its index, or with all of them."
    )
    kappa: float | None = Field(default=None, ge=-10.0, le=10.0)
    gamma: float | None = Field(default=None, ge=0.0, le=10.0)
    eta: float | None = Field(default=None, ge=0.0, le=0.99)
    max_erasures: int | None = Field(default=None, ge=0, le=1000, description="Erasures of one segment at most.")
    regeneration_budget: float | None = Field(
        default=None, ge=0.0, le=100.0, description="Erased tokens at most, as a multiple of the token limit."
    )
    on_exhaustion: Literal["last", "best"] | None = Field(
        default=None,
        description="Which attempt stays when a segment's erasures are spent: the least uncertain one, or the last.",
    )
    retry_temperature: float | None = Field(
        default=None, ge=0.01, le=2.0, description="Temperature of regenerated segments; null: the request's."
    )
    threshold: float | None = Field(
        default=None, ge=0.0, le=1e6, description="Replaces the adaptive threshold; 0 erases until max_erasures."
    )
    stream: Literal["commit", "live"] = Field(
        default="commit", description="How a stream sends text: when its segment is accepted, or at once."
    )
    return_segments: bool = True

    def policy(self, default: ErasurePolicy) -> ErasurePolicy:
        """The policy that these options ask for, on top of the server's. An explicit null counts where null says
        something (`retry_temperature`, `threshold`); elsewhere it is as if the key were left out.

        Raises:
            pydantic.ValidationError: the values are impossible together.
        """
        given = {name: getattr(self, name) for name in self.model_fields_set}
        changes = {
            name: value
            for name, value in given.items()
            if name in ErasurePolicy.model_fields and (value is not None or name in ("retry_temperature", "threshold"))
        }
        if isinstance(self.segmentation, FixedSegments):
            changes["segmentation"] = FixedSegmentation(**self.segmentation.model_dump())
        elif isinstance(self.segmentation, DelimiterSegments):
            changes["segmentation"] = DelimiterSegmentation(**self.segmentation.model_dump())
        if self.weights is not None:
            changes["weights"] = SignalWeights(**self.weights.model_dump())
        base = dict(default)
        if "threshold" in changes and _floor_follows(default, changes["threshold"]):
            del base["min_uncertainty"]
        # Copied without a check if there is nothing to check, which is most often.
        return ErasurePolicy(**{**base, **changes}) if changes else default


def _floor_follows(default: ErasurePolicy, threshold: float | None) -> bool:
    """Whether `min_uncertainty` is as the threshold has it by default, rather than as the server's policy says."""
    if threshold is None:
        return default.threshold is not None and default.min_uncertainty == 0.0
    return default.threshold is None


class Segment(AnswerModel, Measured):
    """One attempt at one segment. `start`, `end`: positions in the response's tokens at the time of the attempt.

    A stop string cuts the last accepted segment: `end`, `text` and `token_ids` are what is left, and the numbers are
    those of the whole segment, as it was judged. With `on_exhaustion: best` the accepted attempt at a segment may be
    followed by attempts that were erased.
    """

    index: int
    attempt: int
    start: int
    end: int
    verdict: Literal["accepted", "erased"]
    text: str
    token_ids: list[TokenId]


class ErasureReport(AnswerModel):
    """What erasure did in one choice. `generated_tokens`: committed and erased ones."""

    event: Literal["finish"] | None = Field(default=None, description="In streams only: the choice is complete.")
    policy_version: int
    generated_tokens: int
    erased_tokens: int
    reused_prefix_tokens: int
    segments: list[Segment] | None = Field(
        default=None, description="Every attempt, in order; absent if return_segments is false."
    )


class ErasureEvent(AnswerModel):
    """In live streams: drop `retract_characters` (Unicode code points) from the end of this choice's text.

    An attempt that was cut short because its replica died is taken back in the same way, and made again.
    """

    event: Literal["erase"]
    segment: int
    attempt: int
    retract_characters: int
    retract_tokens: int | None = Field(default=None, description="Present if return_token_ids is true.")
