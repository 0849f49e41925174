"""What all models of requests and answers share."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_TOKENS = 16_777_216
MAX_CHOICES = 128
MAX_SEED = 2**63 - 1 - MAX_CHOICES

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS, fail_fast=True)]


def at_most(entries: int) -> BeforeValidator:
    """An object with more entries is refused before they are looked at, one by one."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > entries:
            raise PydanticCustomError("too_long", "Object should have at most {entries} entries", {"entries": entries})
        return value

    return BeforeValidator(check)


class RequestModel(BaseModel):
    """Part of a request: an unknown key, a value of another type or an infinite number is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class AnswerModel(BaseModel):
    """Part of an answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)
