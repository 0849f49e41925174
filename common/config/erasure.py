"""What decides whether a segment is erased: the settings of `algorithm.md`, sections 1 to 5."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from common.config.base import StrictModel, Temperature

SHORTEST_DELIMITED = 4
"""Tokens that a segment which ends at a delimiter has at least, unless a setting says otherwise."""

MOST_DELIMITERS = 16
MOST_DELIMITER_BYTES = 1024
"""Of all delimiters of a segmentation together, in UTF-8: an engine keeps a state for each byte."""

Delimiter = Annotated[str, Field(min_length=1, max_length=64)]


def check_delimiters(delimiter: str | Sequence[str]) -> None:
    """ValueError if they are too long together."""
    size = len("".join(delimiter).encode())
    if size > MOST_DELIMITER_BYTES:
        raise ValueError(f"the delimiters have {size} bytes together, of at most {MOST_DELIMITER_BYTES}")


def with_default_min_length(settings: Any) -> Any:
    """A delimiter segmentation's settings: the default of `min_length` gives way to a smaller `max_length`."""
    if isinstance(settings, dict) and "min_length" not in settings:
        longest = settings.get("max_length")
        if isinstance(longest, int) and 1 <= longest < SHORTEST_DELIMITED:
            return {**settings, "min_length": longest}
    return settings


class FixedSegmentation(StrictModel):
    """Segments of `length` tokens each. Source: paper (16 x 512)."""

    mode: Literal["fixed"] = "fixed"
    length: int = Field(default=512, ge=1, le=1_048_576)

    @property
    def min_length(self) -> int:
        return self.length

    @property
    def max_length(self) -> int:
        return self.length

    @property
    def delimiters(self) -> tuple[bytes, ...]:
        """None: what a text holds ends no segment."""
        return ()


class DelimiterSegmentation(StrictModel):
    """A segment ends with the token that completes `delimiter`, or one of several, in the segment's text. Source: ours.

    A delimiter may be spread over several tokens; what began before the segment does not count. A segment has
    `min_length` tokens at least and `max_length` at most. By default a blank line, which is often one token, is no
    segment of its own: there is nothing in it to be uncertain of.
    """

    mode: Literal["delimiter"] = "delimiter"
    delimiter: Delimiter | Annotated[tuple[Delimiter, ...], Field(min_length=1, max_length=MOST_DELIMITERS)] = "\n"
    min_length: int = Field(default=SHORTEST_DELIMITED, ge=1, le=1_048_576)
    max_length: int = Field(default=512, ge=1, le=1_048_576)

    @model_validator(mode="before")
    @classmethod
    def _default_is_within_max_length(cls, data: Any) -> Any:
        return with_default_min_length(data)

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> "DelimiterSegmentation":
        if self.min_length > self.max_length:
            raise ValueError(f"min_length ({self.min_length}) exceeds max_length ({self.max_length})")
        check_delimiters(self.delimiter)
        return self

    @property
    def delimiters(self) -> tuple[bytes, ...]:
        """All of them, in UTF-8."""
        texts = (self.delimiter,) if isinstance(self.delimiter, str) else self.delimiter
        return tuple(text.encode("utf-8") for text in texts)


Segmentation = Annotated[FixedSegmentation | DelimiterSegmentation, Field(discriminator="mode")]

TEXT_SEGMENTS = DelimiterSegmentation(
    delimiter=("\n", ". ", "! ", "? ", '." ', '!" ', '?" ', ".” ", "!” ", "?” ", "。", "！", "？", "؟ ", "। "),  # noqa: RUF001
    min_length=16,
    max_length=128,
)
"""Lines and sentences, for free text. A full stop alone would cut numbers and abbreviations such as 3.5."""


MIN_UNCERTAINTY = 0.02
"""Default floor on U, in nats: where every response is sure, the least unsure one is no error."""

LARGEST_EXPONENT = 700.0
"""exp of more than 709 overflows float64."""


class SignalWeights(StrictModel):
    """Weights of the three parts of a segment's uncertainty, in the sum U."""

    base: float = Field(default=1.0, ge=0.0, le=1e3)
    extreme: float = Field(default=0.0, ge=0.0, le=1e3)
    gradient: float = Field(default=0.0, ge=0.0, le=1e3)

    @model_validator(mode="after")
    def _one_is_positive(self) -> "SignalWeights":
        if self.base == self.extreme == self.gradient == 0.0:
            raise ValueError("weights are all 0: every segment would have the uncertainty 0")
        return self


class ErasurePolicy(StrictModel):
    """When a segment is erased. Section numbers refer to `algorithm.md`.

    `threshold`: a number in place of the adaptive threshold; 0 erases every segment until `max_erasures`.
    `min_uncertainty`: if it is left out where a `threshold` is given, it is 0: that number says it all.
    `on_exhaustion`: which attempt stays when a segment is over the threshold and may not be erased again: the last, or
    the least uncertain one. `observe`: which attempts count in the group's statistics. `statistics`: whether these are
    of a segment's index, or of all segments of the group: in free text the same index means something else in each
    response.
    """

    segmentation: Segmentation = FixedSegmentation()
    signal: Literal["entropy", "cross_entropy"] = "cross_entropy"
    window: int = Field(
        default=1, ge=1, le=4096, description="Trailing moving average, in tokens (section 3); 1: the plain mean."
    )
    weights: SignalWeights = SignalWeights()
    min_uncertainty: float = Field(
        default=MIN_UNCERTAINTY,
        ge=0.0,
        le=1e6,
        description="Nothing is erased whose uncertainty is below this, in nats.",
    )
    statistics: Literal["index", "group"] = "index"
    kappa: float = Field(default=1.0, ge=-10.0, le=10.0, description="Standard deviations above the group's mean.")
    gamma: float = Field(default=0.1, ge=0.0, le=10.0, description="Frequency penalty: exp(gamma * erasures).")
    eta: float = Field(default=0.1, ge=0.0, le=0.99, description="Strength of the history modulation.")
    max_erasures: int = Field(default=5, ge=0, le=1000, description="Erase@k: erasures of one segment at most.")
    regeneration_budget: float = Field(
        default=1.0, ge=0.0, le=100.0, description="Erased tokens at most, as a multiple of the token limit."
    )
    on_exhaustion: Literal["last", "best"] = "last"
    retry_temperature: Temperature | None = Field(
        default=None, gt=0.0, description="Temperature of regenerated segments; null: the request's."
    )
    threshold: float | None = Field(default=None, ge=0.0)
    prior_strength: float = Field(
        default=8.0, ge=0.0, le=1e6, description="Observations that earlier groups are worth at a segment index."
    )
    prior_decay: float = Field(default=0.9, ge=0.0, lt=1.0, description="How much of the prior a new group keeps.")
    observe: Literal["first", "all"] = "first"

    @model_validator(mode="before")
    @classmethod
    def _a_threshold_needs_no_floor(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("threshold") is not None and "min_uncertainty" not in data:
            return {**data, "min_uncertainty": 0.0}
        return data

    @model_validator(mode="after")
    def _penalty_is_finite(self) -> "ErasurePolicy":
        if self.gamma * self.max_erasures > LARGEST_EXPONENT:
            raise ValueError(
                f"gamma x max_erasures ({self.gamma:g} x {self.max_erasures}) exceeds {LARGEST_EXPONENT:g}: the "
                "penalty exp(gamma x erasures) would overflow"
            )
        return self

    def can_erase(self, max_response_tokens: int) -> bool:
        """Whether there are responses, of at most so many tokens, of which this policy erases something."""
        return self.max_erasures > 0 and self.threshold != math.inf and self.erased_token_limit(max_response_tokens) > 0

    def erased_token_limit(self, max_response_tokens: int) -> int:
        """Tokens that one response may have erased in all, given its token limit."""
        return int(self.regeneration_budget * max_response_tokens)
