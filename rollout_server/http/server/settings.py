"""Settings of the server: flags over `E3RL_` environment variables over a YAML file over these defaults."""

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from common.config.erasure import TEXT_SEGMENTS, ErasurePolicy
from common.config.loading import read_yaml

LOOPBACK = ("127.0.0.1", "::1", "localhost")
ENVIRONMENT_PREFIX = "E3RL_"


def _split(value: Any) -> Any:
    """Several values in one environment variable or flag are separated by commas or white space."""
    return [part for part in re.split(r"[,\s]+", value) if part] if isinstance(value, str) else value


def _decode(value: Any) -> Any:
    """An environment variable or a flag holds JSON, a file a mapping."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from error


def _decode_policy(value: Any) -> Any:
    """A policy that does not say how responses are cut has segments that follow the text, so that streams flow."""
    policy = _decode(value)
    return {"segmentation": TEXT_SEGMENTS, **policy} if isinstance(policy, dict) else policy


Keys = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split)]
TokenIds = Annotated[tuple[int, int] | None, NoDecode, BeforeValidator(_split)]
Policy = Annotated[ErasurePolicy, NoDecode, BeforeValidator(_decode_policy)]


class _Group:
    """A heading of `--help`; called, it is a pydantic `Field` below that heading. Default `...`: it must be given."""

    def __init__(self, heading: str) -> None:
        self._heading = heading

    def __call__(self, default: Any, description: str, **bounds: Any) -> Any:
        return Field(default, description=description, json_schema_extra={"group": self._heading}, **bounds)


_model = _Group("model")
_listeners = _Group("listeners")
_erasure = _Group("erasure")
_replicas = _Group("replicas")
_limits = _Group("limits")
_observability = _Group("observability")


class ServerSettings(BaseSettings):
    """What `python -m rollout_server` takes."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, extra="forbid", frozen=True, validate_default=True, hide_input_in_errors=True
    )

    model: str = _model(..., "Model directory, or the name of a model on the Hugging Face hub.", min_length=1)
    served_model_name: str | None = _model(
        None, "Name that clients use (default: the last part of --model).", min_length=1, max_length=256
    )
    revision: str | None = _model(None, "Revision on the hub.")
    dtype: Literal["auto", "float32", "bfloat16"] = _model("auto", "auto: float32 on CPU, bfloat16 on GPUs.")
    max_length: int | None = _model(
        None, "Prompt and response together, in tokens (default: what the model was made for).", ge=16, le=16_777_216
    )
    policy_version: int = _model(0, "Version that the weights in --model count as.", ge=0, le=2**62)
    generation_config: Literal["auto", "none"] = _model(
        "auto", "auto: a request without temperature, top_p, top_k or min_p takes the model's own defaults."
    )
    trust_remote_code: bool = _model(False, "Run code that comes with the model.")
    sentinel_ids: TokenIds = _model(
        None, "Two token ids A,B that responses never hold (default: unused ones, found in the model)."
    )

    host: str = _listeners("127.0.0.1", "Address of the public listener.")
    port: int = _listeners(8000, "Port of the public listener; 0: any free one.", ge=0, le=65535)
    admin_host: str = _listeners("127.0.0.1", "Address of the admin listener.")
    admin_port: int = _listeners(8001, "Port of the admin listener; 0: any free one.", ge=0, le=65535)
    api_key: Keys = _listeners(
        (),
        "Key that clients must send as a bearer token; may be given several times. Better set in the "
        "environment, where other users do not see it.",
    )

    erasure: Policy = _erasure(
        ErasurePolicy(segmentation=TEXT_SEGMENTS),
        "Policy for requests without an `erasure` object, and what such objects leave out. JSON.",
    )
    erasure_enabled: bool = _erasure(True, "Whether requests without an `erasure` object are generated with erasure.")

    replicas: int = _replicas(1, "Copies of the model. 1: in this process; more: Ray actors.", ge=1, le=1024)
    serve: bool = _replicas(False, "Run as a Ray Serve deployment on the connected cluster.")
    ray_address: str | None = _replicas(None, "Ray cluster to connect to (default: RAY_ADDRESS, else a local one).")
    max_concurrent_responses: int = _replicas(64, "Responses that one replica generates at a time.", ge=1, le=8192)
    threads: int | None = _replicas(
        None,
        "CPU threads of a replica (default: OMP_NUM_THREADS, else the cores that this process may use, shared by the "
        "replicas).",
        ge=1,
        le=1024,
    )
    kv_cache_gib: int = _replicas(1, "KV cache of a replica on CPU.", ge=1, le=4096)
    num_gpu_blocks_override: int | None = _replicas(
        None, "KV blocks of a replica, in place of what its memory would hold (vLLM's setting).", ge=2, le=1_000_000_000
    )
    gpu_memory_utilization: float = _replicas(0.85, "Share of a GPU's memory that a replica may use.", gt=0.0, le=1.0)
    enforce_eager: bool = _replicas(True, "Run without compilation and CUDA graphs: starts faster.")
    start_seconds: float = _replicas(600.0, "Deadline for replicas to start.", gt=0.0, le=86_400.0)
    sync_seconds: float = _replicas(120.0, "Deadline for a weight sync.", gt=0.0, le=86_400.0)

    max_body_bytes: int = _limits(4 * 2**20, "Longest request body.", ge=1024, le=2**30)
    max_choices: int = _limits(1024, "Responses that one request may ask for: prompts times n.", ge=1, le=65_536)
    max_waiting_requests: int = _limits(
        1024, "Requests that wait for a place; more are answered with 429.", ge=0, le=1_000_000
    )
    request_seconds: float = _limits(600.0, "Deadline for a request, waiting included.", gt=0.0, le=86_400.0)
    body_seconds: float = _limits(30.0, "Deadline for a request's body to arrive.", gt=0.0, le=3600.0)
    keep_alive_seconds: float = _limits(
        75.0,
        "How long a connection may be idle between requests; best longer than clients' pools keep theirs.",
        gt=0.0,
        le=86_400.0,
    )
    probe_seconds: float = _limits(5.0, "Deadline for a replica to answer a probe.", gt=0.0, le=600.0)
    stall_seconds: float = _limits(
        60.0,
        "/ready is 503 if places are taken or requests wait, and nothing has got on for so long.",
        gt=0.0,
        le=86_400.0,
    )
    shutdown_seconds: float = _limits(
        30.0,
        "What the server has to end in after SIGTERM. Requests under way have all of it but 8 s, at least half.",
        ge=0.0,
        le=3600.0,
    )

    engine_metrics: bool = _observability(True, "Serve vLLM's own metrics too (of a replica in this process).")
    log_format: Literal["text", "json"] = _observability("text", "Form of log lines, on standard error.")
    log_level: Literal["debug", "info", "warning", "error"] = _observability("info", "Least severe log lines shown.")
    otlp_endpoint: str | None = _observability(
        None, "OpenTelemetry collector (OTLP over HTTP) that traces go to, e.g. http://localhost:4318/v1/traces."
    )

    @field_validator("model")
    @classmethod
    def _directories_are_absolute(cls, model: str) -> str:
        """A process of Ray works in another directory."""
        path = Path(model).expanduser()
        return str(path.absolute()) if path.is_dir() else model

    @field_validator("api_key")
    @classmethod
    def _keys_are_long(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for key in keys:
            text = key.get_secret_value()
            if len(text) < 8 or not text.isascii() or not text.isprintable() or " " in text:
                raise ValueError("an API key needs at least 8 printable ASCII characters and no spaces")
        return keys

    @model_validator(mode="after")
    def _others_need_a_key(self) -> "ServerSettings":
        for flag, host in (("--host", self.host), ("--admin-host", self.admin_host)):
            if host not in LOOPBACK and not self.api_key:
                raise ValueError(
                    f"{flag} {host} is reachable from other machines: set an API key (E3RL_API_KEY or --api-key), "
                    "or bind to 127.0.0.1"
                )
        return self

    @model_validator(mode="after")
    def _ray_is_used(self) -> "ServerSettings":
        if self.ray_address is not None and self.replicas == 1 and not self.serve:
            raise ValueError("--ray-address is for --serve or several --replicas: a single replica runs without Ray")
        return self

    @model_validator(mode="after")
    def _threads_are_clear(self) -> "ServerSettings":
        given = os.environ.get("OMP_NUM_THREADS")
        if self.threads is not None and given is not None and given != str(self.threads):
            raise ValueError(f"--threads is {self.threads}, but OMP_NUM_THREADS is {given}: give one of them")
        return self

    @model_validator(mode="after")
    def _listeners_differ(self) -> "ServerSettings":
        if self.port and self.port == self.admin_port and self.host == self.admin_host:
            raise ValueError(f"--port and --admin-port are both {self.port}: the listeners need one each")
        return self

    @property
    def name(self) -> str:
        """The model's name for clients: never a path."""
        return self.served_model_name or Path(self.model.rstrip("/")).name or "model"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings


def load_settings(flags: dict[str, Any], config: Path | None) -> ServerSettings:
    """Settings from `flags`, the environment and the YAML file `config`, in this order of precedence.

    Raises:
        pydantic.ValidationError: a value is wrong or a key unknown.
        ConfigError: the file cannot be read.
    """
    if config is None:
        return ServerSettings(**flags)
    values = {str(key): value for key, value in read_yaml(config).items()}

    class WithFile(ServerSettings):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *sources: PydanticBaseSettingsSource, **named: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            above = super().settings_customise_sources(settings_cls, *sources, **named)
            return *above, InitSettingsSource(settings_cls, init_kwargs=values)

    return WithFile(**flags)
