"""`POST /v1/rollouts`: groups by token ids, answered with trajectories."""

from typing import Any

from pydantic import ConfigDict, Field, model_validator

from rollout_server.http.openai.schema.base import MAX_CHOICES, MAX_SEED, MAX_TOKENS, RequestModel, TokenIds
from rollout_server.http.openai.schema.erasure import ErasureOptions

EXAMPLE: dict[str, Any] = {
    "groups": [{"prompt_id": "p0", "prompt_token_ids": [22, 10, 20, 28], "n": 4, "erasable": 2}],
    "max_tokens": 32,
    "temperature": 1.0,
    "seed": 1,
    "erasure": {"segmentation": {"mode": "fixed", "length": 8}},
}


class RolloutGroup(RequestModel):
    """A prompt, to be answered `n` times. The first `erasable` responses are; the others are only monitored."""

    prompt_id: str = Field(min_length=1, max_length=256)
    prompt_token_ids: TokenIds
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    erasable: int | None = Field(default=None, ge=0, le=MAX_CHOICES, description="null: all n.")
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED, description="null: the request's.")

    @model_validator(mode="after")
    def _erasable_are_members(self) -> "RolloutGroup":
        if self.erasable is not None and self.erasable > self.n:
            raise ValueError(f"erasable ({self.erasable}) exceeds n ({self.n})")
        return self


class RolloutRequest(RequestModel):
    """Groups and how they are sampled. No truncation: log-probs are those of the distribution sampled from."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    model: str | None = Field(default=None, min_length=1, max_length=256)
    groups: list[RolloutGroup] = Field(min_length=1, max_length=1024, fail_fast=True)
    max_tokens: int = Field(ge=1, le=MAX_TOKENS)
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    ignore_eos: bool = False
    erasure: ErasureOptions | None = None

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> "RolloutRequest":
        if self.erasure is None:
            return self
        if self.erasure.stream == "live" or not self.erasure.return_segments:
            raise ValueError(
                "trajectories hold every attempt: erasure.stream and erasure.return_segments are of no use"
            )
        erasable = [number for number, group in enumerate(self.groups) if group.erasable]
        if erasable and not self.erasure.enabled:
            raise ValueError(f"groups[{erasable[0]}].erasable is not 0, but erasure.enabled is false")
        return self
