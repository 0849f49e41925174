"""Parameters of which only a value without effect is accepted, because clients send it with every request."""

from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

NEUTRAL = "x-neutral"
"""Key in the schema of such a parameter; its value is the reason."""


@dataclass(frozen=True, slots=True)
class Neutral:
    """In `Annotated`: what is not of the type is refused with `reason`."""

    reason: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def explained(value: Any, check: Any) -> Any:
            try:
                return check(value)
            except ValidationError:
                raise PydanticCustomError("not_supported", "{reason}", {"reason": self.reason}) from None

        return core_schema.no_info_wrap_validator_function(explained, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "description": f"Only a value without effect: {self.reason}.", NEUTRAL: self.reason}
