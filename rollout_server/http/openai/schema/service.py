"""Answers of the routes that do not generate, requests of the admin listener, and errors."""

from typing import Literal

from pydantic import ConfigDict, Field

from rollout_server.http.openai.schema.base import AnswerModel, RequestModel


class ErrorDetail(AnswerModel):
    """What was wrong, and where."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(AnswerModel):
    """Every error, on every route."""

    error: ErrorDetail


class Health(AnswerModel):
    """The process lives."""

    status: Literal["ok"]


class ReplicaProbe(AnswerModel):
    """How one replica answered. `error`: why it is not ready."""

    replica: int
    ready: bool
    error: str | None


class Ready(AnswerModel):
    """At least one replica answers."""

    status: Literal["ready"]
    replicas: list[ReplicaProbe]


class NotReady(ErrorAnswer):
    """No replica answers: which and why."""

    replicas: list[ReplicaProbe]


class Model(AnswerModel):
    """A served model. `policy_version`: of the weights that replicas hold."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    policy_version: int


class Models(AnswerModel):
    """All served models."""

    object: Literal["list"]
    data: list[Model]


class Version(AnswerModel):
    """Of this software."""

    version: str


class Load(AnswerModel):
    """Requests that wait or generate."""

    server_load: int


class IsPaused(AnswerModel):
    """Whether an administrator paused generation."""

    is_paused: bool


class CacheReset(AnswerModel):
    """Whether all replicas forgot their cached prefixes; false while requests hold some."""

    success: bool


class LastSync(AnswerModel):
    """A replica's last weight sync. `error`: why it failed."""

    seconds: float
    bytes: int
    gigabytes_per_second: float
    error: str | None


class ReplicaWeights(AnswerModel):
    """What a replica holds. `checksum`: null until weights have been synced into it, and after a sync that failed.

    `error`: why it does not generate. `non_finite_version`: the last weights here whose logits were not finite.
    """

    replica: int
    policy_version: int
    checksum: str | None
    error: str | None
    non_finite_version: int | None
    last_sync: LastSync | None


class Weights(AnswerModel):
    """Weights of all replicas."""

    replicas: list[ReplicaWeights]


class SyncRequest(RequestModel):
    """Load a checkpoint into all replicas."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"path": "runs/demo/checkpoints/step_20/model", "policy_version": 20}]}
    )

    path: str = Field(min_length=1, max_length=4096, description="Directory with config.json and *.safetensors.")
    policy_version: int | None = Field(default=None, ge=0, le=2**62, description="null: the next one.")


class Synced(AnswerModel):
    """Every replica reports `checksum`."""

    policy_version: int
    checksum: str
    seconds: float
    bytes: int
    gigabytes_per_second: float
    replicas: list[ReplicaWeights]


class PauseRequest(RequestModel):
    """`abort` ends requests under way with 503, `wait` finishes them, `keep` freezes them until resume."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"mode": "keep"}]})

    mode: Literal["abort", "wait", "keep"] = "keep"


class ResumeRequest(RequestModel):
    """Nothing, or an empty object."""


class PauseState(AnswerModel):
    """Whether replicas generate."""

    paused: bool
    mode: Literal["abort", "wait", "keep"] | None
