"""The strictness that every configuration and record model shares."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

LOWEST_TEMPERATURE = 0.01
"""What vLLM samples with where a lower temperature, but not 0, is asked for."""


class StrictModel(BaseModel):
    """A frozen model in which an unknown key or a value of the wrong type is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, ser_json_inf_nan="constants")


def _as_sampled(temperature: float) -> float:
    return temperature and max(temperature, LOWEST_TEMPERATURE)


Temperature = Annotated[float, Field(ge=0.0, le=2.0), AfterValidator(_as_sampled)]
"""As the engine will apply it: 0 is greedy."""
