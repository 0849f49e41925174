"""How the learner corrects for responses that another policy than its own sampled."""

from typing import Annotated, Literal

from pydantic import Field

from common.config.base import StrictModel

OldLogprobs = Literal["behaviour", "recomputed"]
"""What the importance ratio is taken against: the recorded log-probs, or those of the policy at the step's start."""


class NoImportanceSampling(StrictModel):
    """Every token of a response weighs the same."""

    kind: Literal["none"] = "none"


class _Weighted(StrictModel):
    """A weight of at most `cap`. `outliers`: what becomes of a weight above `cap`, or below `floor` (null: no floor).

    `truncate` sets it to that bound (TIS), `mask` to 0 (MIS).
    """

    outliers: Literal["truncate", "mask"] = "truncate"
    cap: float = Field(default=2.0, ge=1.0, le=1e6)
    floor: float | None = Field(default=None, gt=0.0, lt=1.0)


class TokenImportanceSampling(_Weighted):
    """Each token is weighed by how much likelier the policy at the step's start made it than what sampled it."""

    kind: Literal["token"] = "token"


class SequenceImportanceSampling(_Weighted):
    """All tokens of a response have one weight: the product of its tokens' ratios."""

    kind: Literal["sequence"] = "sequence"


ImportanceSampling = Annotated[
    NoImportanceSampling | TokenImportanceSampling | SequenceImportanceSampling, Field(discriminator="kind")
]

NO_IMPORTANCE_SAMPLING = NoImportanceSampling()
