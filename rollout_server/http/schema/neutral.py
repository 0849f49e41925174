"""Parameters of which only a value without effect is accepted, because clients send it with every request."""

from typing import Annotated, Any

from pydantic import Field, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

NEUTRAL = "x-neutral"
"""Key in the schema of such a parameter."""


def neutral(kind: Any, reason: str) -> Any:
    """The type of a parameter that takes null and the values of `kind`; others are refused with `reason`."""

    def explained(value: Any, check: Any) -> Any:
        try:
            return check(value)
        except ValidationError:
            raise PydanticCustomError("not_supported", "{reason}", {"reason": reason}) from None

    field = Field(description=f"Only a value without effect: {reason}", json_schema_extra={NEUTRAL: reason})
    return Annotated[kind | None, WrapValidator(explained), field]
