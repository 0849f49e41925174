"""What all models of requests and answers share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_TOKENS = 16_777_216
MAX_CHOICES = 128
MAX_SEED = 2**63 - 1 - MAX_CHOICES

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS, fail_fast=True)]


class RequestModel(BaseModel):
    """Part of a request: an unknown key, a value of another type or an infinite number is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class AnswerModel(BaseModel):
    """Part of an answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)
