"""The strictness that every configuration and record model shares."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """A frozen model in which an unknown key or a value of the wrong type is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, ser_json_inf_nan="constants")
