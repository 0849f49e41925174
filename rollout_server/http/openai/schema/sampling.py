"""What completions and chat completions have in common."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from common.trajectory import SamplingExtras
from rollout_server.http.openai.schema.base import (
    MAX_CHOICES,
    MAX_SEED,
    MAX_TOKENS,
    AnswerModel,
    RequestModel,
    TokenId,
    at_most,
)
from rollout_server.http.openai.schema.erasure import ErasureOptions
from rollout_server.http.openai.schema.neutral import Neutral

StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Name = Annotated[str, Field(max_length=1024)]
BadWord = Annotated[str, Field(min_length=1, max_length=64, pattern=r"\S")]
BiasedId = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
MAX_TOP_LOGPROBS = 20
MAX_SCHEMA_CHARACTERS = 16_384

NO_STORE = "this server stores no answers"
NO_BEAMS = "there is no beam search"
NO_MEDIA = "this server takes and makes text only"
NOT_HERE = "it belongs to a part of vLLM that this server does not use"
EmptyObject = Annotated[dict[str, Any], Field(max_length=0)]
EmptyList = Annotated[list[Any], Field(max_length=0)]


class StreamOptions(RequestModel):
    """`include_usage`: a last chunk without choices holds the usage. `continuous_usage_stats`: so does every other."""

    include_usage: bool = False
    continuous_usage_stats: bool = Field(default=False, description="Needs include_usage: usage of each choice so far.")
    include_obfuscation: Annotated[Literal[False] | None, Neutral("nothing is added to hide the lengths of chunks")] = (
        None
    )


class TextFormat(RequestModel):
    """No constraint."""

    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(RequestModel):
    """A named JSON schema. `strict` changes nothing: the schema always holds."""

    name: Name | None = None
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: dict[str, Any] = Field(default_factory=lambda: {"type": "object"}, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_is_short(self) -> "JsonSchema":
        if (length := len(json.dumps(self.schema_))) > MAX_SCHEMA_CHARACTERS:
            raise ValueError(f"the schema has {length} characters; at most {MAX_SCHEMA_CHARACTERS} are allowed")
        return self


class JsonSchemaFormat(RequestModel):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class SamplingRequest(RequestModel):
    """Fields of both kinds of completions. Temperature and its like, if left out, are the model's own defaults."""

    model: str = Field(min_length=1, max_length=256, description="A name that `GET /v1/models` lists.")
    max_tokens: int | None = Field(
        default=None, ge=0, le=MAX_TOKENS, description="Committed tokens at most; 0 only scores the prompt."
    )
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES, description="Choices; together they form one group.")
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, ge=1e-6, le=1.0)
    top_k: int | None = Field(default=None, ge=-1, le=10_000_000, description="-1 or 0: all tokens.")
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100.0)
    logit_bias: Annotated[dict[BiasedId, Bias], Field(max_length=300), at_most(300)] | None = Field(
        default=None, description="By token id. At most 300."
    )
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=8192, fail_fast=True)] | None = None
    bad_words: Annotated[list[BadWord], Field(max_length=64, fail_fast=True)] | None = None
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED, description="Makes the request reproducible.")
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256, fail_fast=True)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS, description="No end before so many tokens.")
    response_format: ResponseFormat | None = Field(
        default=None, description="json_object and json_schema need erasure.enabled: false."
    )
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS, description="Not in streams.")
    truncate_prompt_tokens: int | None = Field(
        default=None, ge=-1, le=MAX_TOKENS, description="Tokens of the prompt that are kept; -1: as many as fit."
    )
    truncation_side: Literal["left", "right"] | None = Field(default=None, description="Where it is cut; null: left.")
    add_special_tokens: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = Field(
        default=None, description="Cached prefixes are shared only with requests of the same salt."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = Field(
        default=None, description="Log-probs name tokens as token_id:N, not by their text."
    )
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")] | None = Field(
        default=None, description="Unless the header X-Request-Id names one."
    )
    user: Name | None = Field(default=None, description="Named in the server's log.")
    erasure: ErasureOptions | None = None

    length_penalty: Annotated[Literal[1] | None, Neutral(NO_BEAMS)] = None
    use_beam_search: Annotated[Literal[False] | None, Neutral(NO_BEAMS)] = None
    priority: Annotated[Literal[0] | None, Neutral("clients take turns, so none goes before others")] = None
    logprob_token_ids: Annotated[EmptyList | None, Neutral("ask for logprobs of the likeliest tokens")] = None
    structured_outputs: Annotated[EmptyObject | None, Neutral("use response_format")] = None
    repetition_detection: Annotated[EmptyObject | None, Neutral("give stop or max_tokens")] = None
    thinking_token_budget: Annotated[Literal[-1] | None, Neutral("reasoning is not told from other text")] = None
    stream_interval: Annotated[Literal[1] | None, Neutral("chunks come when segments are accepted, or at once")] = None
    session_id: Name | None = Field(default=None, description="Accepted; every prefix is cached for all sessions.")
    watermarking: Annotated[Literal[False] | None, Neutral("there is no watermark")] = None
    kv_transfer_params: Annotated[EmptyObject | None, Neutral(NOT_HERE)] = None
    ec_transfer_params: Annotated[EmptyObject | None, Neutral(NOT_HERE)] = None
    vllm_xargs: Annotated[EmptyObject | None, Neutral("these arguments steer the engine itself")] = None
    routed_experts_prompt_start: Annotated[Literal[0] | None, Neutral(NOT_HERE)] = None
    return_token_offsets: Annotated[Literal[False] | None, Neutral("it belongs to vLLM's render routes")] = None
    mm_payload: Annotated[Literal["tensors", "none"] | None, Neutral(NO_MEDIA)] = None
    return_mm_kwargs: Annotated[Literal[False] | None, Neutral(NO_MEDIA)] = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "SamplingRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options can only be given when stream is true")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs are not available when stream is true")
        return self

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_is_continuous(self) -> bool:
        return self.stream_options is not None and self.includes_usage and self.stream_options.continuous_usage_stats

    @property
    def is_live(self) -> bool:
        return bool(self.stream) and self.erasure is not None and self.erasure.stream == "live"

    @property
    def json_schema(self) -> str | None:
        """The schema that the response must have, as JSON; null: any text."""
        if isinstance(self.response_format, JsonObjectFormat):
            return '{"type": "object"}'
        if isinstance(self.response_format, JsonSchemaFormat):
            return json.dumps(self.response_format.json_schema.schema_)
        return None

    def extras(self, defaults: dict[str, float]) -> SamplingExtras:
        """What else the responses are sampled with; `defaults`: the model's own."""
        repetition = self.repetition_penalty
        return SamplingExtras(
            stop_token_ids=tuple(dict.fromkeys(self.stop_token_ids or ())),
            min_tokens=self.min_tokens or 0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=defaults.get("repetition_penalty", 1.0) if repetition is None else repetition,
            logit_bias={int(token_id): bias for token_id, bias in (self.logit_bias or {}).items()},
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(dict.fromkeys(self.allowed_token_ids)),
            bad_words=tuple(dict.fromkeys(self.bad_words or ())),
            json_schema=self.json_schema,
            cache_salt=self.cache_salt,
        )


class PromptLogprob(AnswerModel):
    """How likely a token of the prompt was there, given those before it."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""Of each token of the prompt: its own and the likeliest ones, by token id; null for the first token."""
