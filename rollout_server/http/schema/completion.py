"""`POST /v1/completions`."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from rollout_server.http.schema.base import AnswerModel, TokenIds
from rollout_server.http.schema.erasure import ErasureEvent, ErasureReport
from rollout_server.http.schema.sampling import MAX_TOP_LOGPROBS, SamplingRequest
from rollout_server.http.schema.usage import Usage

MAX_PROMPTS = 1024
DEFAULT_MAX_TOKENS = 16

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
TokenLists = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]

EXAMPLE: dict[str, Any] = {
    "model": "demo",
    "prompt": "7+5=",
    "max_tokens": 32,
    "n": 2,
    "seed": 1,
    "erasure": {"segmentation": {"mode": "fixed", "length": 8}, "kappa": 0.5, "max_erasures": 3},
}


class CompletionRequest(SamplingRequest):
    """As OpenAI's, with the `erasure` object."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    prompt: Text | Texts | TokenIds | TokenLists = Field(
        description="A text, texts, token ids, or lists of token ids. Each prompt's choices form a group."
    )
    logprobs: int | None = Field(
        default=None, ge=0, le=MAX_TOP_LOGPROBS, description="Log-probs of the committed and of the likeliest tokens."
    )

    @property
    def top_logprobs(self) -> int | None:
        return self.logprobs


class CompletionLogprobs(AnswerModel):
    """The model's own log-probs, before temperature, one entry a committed token."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class CompletionChoice(AnswerModel):
    """One response."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] | None = Field(default=None, description="Present if return_token_ids is true.")
    erasure: ErasureReport


class Completion(AnswerModel):
    """The answer."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(AnswerModel):
    """What is new of one response. A `finish_reason` comes once, in its last chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    token_ids: list[int] | None = None
    erasure: ErasureEvent | ErasureReport | None = None


class CompletionChunk(AnswerModel):
    """One `data:` line of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None
