"""`POST /v1/completions`."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from rollout_server.http.openai.schema.base import MAX_CHOICES, AnswerModel, TokenIds
from rollout_server.http.openai.schema.erasure import ErasureEvent, ErasureReport
from rollout_server.http.openai.schema.neutral import Neutral
from rollout_server.http.openai.schema.sampling import MAX_TOP_LOGPROBS, EmptyList, PromptLogprobs, SamplingRequest
from rollout_server.http.openai.schema.usage import Usage

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

    echo: bool | None = Field(default=None, description="The answer's text, and its logprobs, begin with the prompt.")
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        default=None, description="Only n: all that is generated is answered."
    )
    suffix: Annotated[Literal[""] | None, Neutral("the model writes after a prompt, not between two texts")] = None
    prompt_embeds: Annotated[EmptyList | None, Neutral("prompts are text or token ids")] = None

    @model_validator(mode="after")
    def _fields_agree(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != self.choices:
            raise ValueError(f"best_of ({self.best_of}) must be n ({self.choices}): all that is generated is answered")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise ValueError("max_tokens 0 scores a prompt: give echo with logprobs, or prompt_logprobs, with it")
        return self

    @property
    def scores(self) -> int | None:
        """How many of the likeliest tokens are told with each token of the prompt; null: the prompt is not scored."""
        if self.prompt_logprobs is not None:
            return self.prompt_logprobs
        return self.logprobs if self.echo else None


class CompletionLogprobs(AnswerModel):
    """The model's own log-probs, before temperature, one entry a committed token.

    With `echo` the prompt's come first; its first token has none.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(AnswerModel):
    """One response."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = Field(description="The stop string, or the id of the token of stop_token_ids.")
    token_ids: list[int] | None = Field(default=None, description="Present if return_token_ids is true.")
    prompt_token_ids: list[int] | None = Field(default=None, description="Present if return_token_ids is true.")
    prompt_logprobs: PromptLogprobs | None = Field(default=None, description="Present if the request asks for them.")
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
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = Field(
        default=None, description="In a choice's first chunk, if return_token_ids is true."
    )
    erasure: ErasureEvent | ErasureReport | None = None


class CompletionChunk(AnswerModel):
    """One `data:` line of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None
