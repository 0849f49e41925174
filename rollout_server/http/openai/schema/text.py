"""Texts and tokens: `POST /tokenize` and `POST /detokenize`."""

from typing import Any

from pydantic import ConfigDict, Field, model_validator

from rollout_server.http.openai.schema.base import MAX_TOKENS, AnswerModel, RequestModel, TokenId
from rollout_server.http.openai.schema.chat_request import Messages, TemplateOptions

TOKENIZE: dict[str, Any] = {"prompt": "7+5=", "return_token_strs": True}
DETOKENIZE: dict[str, Any] = {"tokens": [22, 10, 20, 28]}


class TokenizeRequest(TemplateOptions):
    """A text, or messages for the model's chat template."""

    model_config = ConfigDict(json_schema_extra={"examples": [TOKENIZE]})

    model: str | None = Field(default=None, min_length=1, max_length=256)
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(default=None, description="null: of a text only.")
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_is_given(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        only_chat = (self.tools, self.add_generation_prompt, self.chat_template_kwargs, self.documents)
        if self.messages is None and (self.continue_final_message or any(option is not None for option in only_chat)):
            raise ValueError("a prompt is no conversation: options of the chat template go with messages")
        return self


class Tokenized(AnswerModel):
    """`token_strs`: as the vocabulary has them."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(RequestModel):
    """Token ids."""

    model_config = ConfigDict(json_schema_extra={"examples": [DETOKENIZE]})

    model: str | None = Field(default=None, min_length=1, max_length=256)
    tokens: list[TokenId] = Field(max_length=MAX_TOKENS, fail_fast=True)


class Detokenized(AnswerModel):
    """The text of the tokens, special ones included."""

    prompt: str
