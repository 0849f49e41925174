"""Answers of `POST /v1/chat/completions`."""

from typing import Literal

from pydantic import Field

from rollout_server.http.openai.schema.base import AnswerModel
from rollout_server.http.openai.schema.erasure import ErasureEvent, ErasureReport
from rollout_server.http.openai.schema.sampling import PromptLogprobs
from rollout_server.http.openai.schema.usage import Usage


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
    stop_reason: int | str | None = Field(description="The stop string, or the id of the token of stop_token_ids.")
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
    prompt_token_ids: list[int] | None = Field(default=None, description="Present if return_token_ids is true.")
    prompt_logprobs: PromptLogprobs | None = Field(default=None, description="Present if the request asks for them.")


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
    stop_reason: int | str | None = None
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
    prompt_token_ids: list[int] | None = Field(
        default=None, description="In the first chunk, if return_token_ids is true."
    )
