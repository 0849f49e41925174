"""What completions and chat completions have in common."""

from typing import Annotated

from pydantic import Field, model_validator

from rollout_server.http.schema.base import MAX_CHOICES, MAX_SEED, MAX_TOKENS, RequestModel
from rollout_server.http.schema.erasure import ErasureOptions

StopString = Annotated[str, Field(min_length=1, max_length=1024)]
MAX_TOP_LOGPROBS = 20


class StreamOptions(RequestModel):
    """`include_usage`: a last chunk without choices holds the usage."""

    include_usage: bool = False


class SamplingRequest(RequestModel):
    """Fields of both kinds of completions. Temperature and its like, if left out, are the model's own defaults."""

    model: str = Field(min_length=1, max_length=256, description="A name that `GET /v1/models` lists.")
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS, description="Committed tokens at most.")
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES, description="Choices; together they form one group.")
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, ge=1e-6, le=1.0)
    top_k: int | None = Field(default=None, ge=-1, le=10_000_000, description="-1 or 0: all tokens.")
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED, description="Makes the request reproducible.")
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    user: str | None = Field(default=None, max_length=1024, description="Named in the server's log.")
    return_token_ids: bool = False
    erasure: ErasureOptions | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "SamplingRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options can only be given when stream is true")
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
    def is_live(self) -> bool:
        return bool(self.stream) and self.erasure is not None and self.erasure.stream == "live"
