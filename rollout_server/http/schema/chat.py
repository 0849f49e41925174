"""`POST /v1/chat/completions`."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from rollout_server.http.schema.base import MAX_TOKENS, AnswerModel, RequestModel
from rollout_server.http.schema.erasure import ErasureEvent, ErasureReport
from rollout_server.http.schema.sampling import MAX_TOP_LOGPROBS, SamplingRequest
from rollout_server.http.schema.usage import Usage

EXAMPLE: dict[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": "7+5="}],
    "max_completion_tokens": 32,
    "temperature": 0.7,
    "erasure": {"threshold": 1.5, "max_erasures": 2, "segmentation": {"mode": "delimiter", "delimiter": "\n"}},
}


class TextPart(RequestModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(RequestModel):
    """One message of the conversation, for the model's chat template."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=1024)]

    def for_template(self) -> dict[str, str]:
        """Role and text, as chat templates expect them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(SamplingRequest):
    """As OpenAI's, with the `erasure` object."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description="The newer name of max_tokens; give one of the two."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS, description="Needs logprobs: true.")

    @model_validator(mode="after")
    def _fields_agree(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs can only be given when logprobs is true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        return self


class TopLogprob(AnswerModel):
    """One of the likeliest tokens."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(AnswerModel):
    """A committed token."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(AnswerModel):
    """The model's own log-probs, before temperature, one entry a committed token."""

    content: list[TokenLogprob]


class AnswerMessage(AnswerModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str


class ChatChoice(AnswerModel):
    """One response."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] | None = Field(default=None, description="Present if return_token_ids is true.")
    erasure: ErasureReport


class ChatCompletion(AnswerModel):
    """The answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(AnswerModel):
    """What is new of a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(AnswerModel):
    """What is new of one response. A `finish_reason` comes once, in its last chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    token_ids: list[int] | None = None
    erasure: ErasureEvent | ErasureReport | None = None


class ChatChunk(AnswerModel):
    """One `data:` line of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
