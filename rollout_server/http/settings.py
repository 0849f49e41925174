"""Settings of the server: flags over `E3RL_` environment variables over a YAML file over these defaults."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from common.config.erasure import ErasurePolicy

LOOPBACK = ("127.0.0.1", "::1", "localhost")
ENVIRONMENT_PREFIX = "E3RL_"


def _split(value: Any) -> Any:
    """Several keys in one environment variable are separated by commas or white space."""
    return [part for part in re.split(r"[,\s]+", value) if part] if isinstance(value, str) else value


Keys = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split)]


class ServerSettings(BaseSettings):
    """What `python -m rollout_server` takes. `group` is the heading in `--help`."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, extra="forbid", frozen=True, validate_default=True, hide_input_in_errors=True
    )

    model: str = Field(
        min_length=1,
        description="Model directory, or the name of a model on the Hugging Face hub.",
        json_schema_extra={"group": "model"},
    )
    served_model_name: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description="Name that clients use (default: the last part of --model).",
        json_schema_extra={"group": "model"},
    )
    revision: str | None = Field(default=None, description="Revision on the hub.", json_schema_extra={"group": "model"})
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="auto: float32 on CPU, bfloat16 on GPUs.",
        json_schema_extra={"group": "model"},
    )
    max_length: int | None = Field(
        default=None,
        ge=16,
        le=16_777_216,
        description="Prompt and response together, in tokens (default: what the model was made for).",
        json_schema_extra={"group": "model"},
    )
    policy_version: int = Field(
        default=0,
        ge=0,
        le=2**62,
        description="Version that the weights in --model count as.",
        json_schema_extra={"group": "model"},
    )
    generation_config: Literal["auto", "none"] = Field(
        default="auto",
        description="auto: a request without temperature, top_p, top_k or min_p takes the model's own defaults.",
        json_schema_extra={"group": "model"},
    )
    trust_remote_code: bool = Field(
        default=False, description="Run code that comes with the model.", json_schema_extra={"group": "model"}
    )

    host: str = Field(
        default="127.0.0.1", description="Address of the public listener.", json_schema_extra={"group": "listeners"}
    )
    port: int = Field(
        default=8000,
        ge=0,
        le=65535,
        description="Port of the public listener; 0: any free one.",
        json_schema_extra={"group": "listeners"},
    )
    admin_host: str = Field(
        default="127.0.0.1", description="Address of the admin listener.", json_schema_extra={"group": "listeners"}
    )
    admin_port: int = Field(
        default=8001,
        ge=0,
        le=65535,
        description="Port of the admin listener; 0: any free one.",
        json_schema_extra={"group": "listeners"},
    )
    api_key: Keys = Field(
        default=(),
        description="Key that clients must send as a bearer token; may be given several times. Better set in the "
        "environment, where other users do not see it.",
        json_schema_extra={"group": "listeners"},
    )

    erasure: ErasurePolicy = Field(
        default=ErasurePolicy(),
        description="Policy for requests without an `erasure` object, and what such objects leave out. JSON.",
        json_schema_extra={"group": "erasure"},
    )
    erasure_enabled: bool = Field(
        default=True,
        description="Whether requests without an `erasure` object are generated with erasure.",
        json_schema_extra={"group": "erasure"},
    )

    replicas: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Copies of the model. 1: in this process; more: Ray actors.",
        json_schema_extra={"group": "replicas"},
    )
    serve: bool = Field(
        default=False,
        description="Run as a Ray Serve deployment on the connected cluster.",
        json_schema_extra={"group": "replicas"},
    )
    ray_address: str | None = Field(
        default=None,
        description="Ray cluster to connect to (default: RAY_ADDRESS, else a local one).",
        json_schema_extra={"group": "replicas"},
    )
    max_concurrent_responses: int = Field(
        default=64,
        ge=1,
        le=8192,
        description="Responses that one replica generates at a time.",
        json_schema_extra={"group": "replicas"},
    )
    tensor_parallel_size: int = Field(
        default=1, ge=1, le=64, description="GPUs of one replica.", json_schema_extra={"group": "replicas"}
    )
    kv_cache_gib: int = Field(
        default=1, ge=1, le=4096, description="KV cache of a replica on CPU.", json_schema_extra={"group": "replicas"}
    )
    num_gpu_blocks_override: int | None = Field(
        default=None,
        ge=2,
        le=1_000_000_000,
        description="KV blocks of a replica, in place of what its memory would hold (vLLM's setting).",
        json_schema_extra={"group": "replicas"},
    )
    gpu_memory_utilization: float = Field(
        default=0.85,
        gt=0.0,
        le=1.0,
        description="Share of a GPU's memory that a replica may use.",
        json_schema_extra={"group": "replicas"},
    )
    enforce_eager: bool = Field(
        default=True,
        description="Run without compilation and CUDA graphs: starts faster.",
        json_schema_extra={"group": "replicas"},
    )
    start_seconds: float = Field(
        default=600.0,
        gt=0.0,
        le=86_400.0,
        description="Deadline for replicas to start.",
        json_schema_extra={"group": "replicas"},
    )
    sync_seconds: float = Field(
        default=120.0,
        gt=0.0,
        le=86_400.0,
        description="Deadline for a weight sync.",
        json_schema_extra={"group": "replicas"},
    )

    max_body_bytes: int = Field(
        default=4 * 2**20,
        ge=1024,
        le=2**30,
        description="Longest request body.",
        json_schema_extra={"group": "limits"},
    )
    max_choices: int = Field(
        default=1024,
        ge=1,
        le=65_536,
        description="Responses that one request may ask for: prompts times n.",
        json_schema_extra={"group": "limits"},
    )
    max_waiting_requests: int = Field(
        default=1024,
        ge=0,
        le=1_000_000,
        description="Requests that wait for a place; more are answered with 429.",
        json_schema_extra={"group": "limits"},
    )
    request_seconds: float = Field(
        default=600.0,
        gt=0.0,
        le=86_400.0,
        description="Deadline for a request, waiting included.",
        json_schema_extra={"group": "limits"},
    )
    body_seconds: float = Field(
        default=30.0,
        gt=0.0,
        le=3600.0,
        description="Deadline for a request's body to arrive.",
        json_schema_extra={"group": "limits"},
    )
    probe_seconds: float = Field(
        default=5.0,
        gt=0.0,
        le=600.0,
        description="Deadline for a replica to answer a probe.",
        json_schema_extra={"group": "limits"},
    )
    shutdown_seconds: float = Field(
        default=30.0,
        ge=0.0,
        le=3600.0,
        description="What requests under way have after SIGTERM before they are cancelled.",
        json_schema_extra={"group": "limits"},
    )

    engine_metrics: bool = Field(
        default=True,
        description="Serve vLLM's own metrics too (of a replica in this process).",
        json_schema_extra={"group": "observability"},
    )
    log_format: Literal["text", "json"] = Field(
        default="text",
        description="Form of log lines, on standard error.",
        json_schema_extra={"group": "observability"},
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe log lines shown.", json_schema_extra={"group": "observability"}
    )
    otlp_endpoint: str | None = Field(
        default=None,
        description="OpenTelemetry collector (OTLP over HTTP) that traces go to, e.g. http://localhost:4318/v1/traces.",
        json_schema_extra={"group": "observability"},
    )

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
        OSError, yaml.YAMLError: the file cannot be read.
    """
    if config is None:
        return ServerSettings(**flags)

    class FromFile(ServerSettings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, YamlConfigSettingsSource(settings_cls, yaml_file=config)

    with config.open("rb"):
        pass
    return FromFile(**flags)
