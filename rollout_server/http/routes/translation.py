"""What replicas, the pool and checkpoints refuse or fail at, as answers to clients."""

from collections.abc import Callable
from typing import Any

from common.weights import NonFiniteLogits
from rollout_server.engine.errors import GenerationAborted
from rollout_server.http.openai.errors import ApiError, bad_request, unavailable
from rollout_server.replicas.errors import NoReplicaReady, VersionNotNewer, WeightsNotLoaded
from rollout_server.replicas.replica import NoWeights, ReplicaLost, RequestRefused
from rollout_server.weights.checkpoints import CheckpointRefused, NoRoom, OtherModel


def _not_loaded(error: WeightsNotLoaded) -> ApiError:
    headers = {"Retry-After": "5"} if error.may_come else {}
    return ApiError(503, str(error), code="weight_sync_failed", headers=headers)


ANSWERS: dict[type[Exception], Callable[[Any], ApiError]] = {
    NoReplicaReady: lambda error: unavailable(str(error)),
    ReplicaLost: lambda error: unavailable("a replica died"),
    NoWeights: lambda error: unavailable(
        "the last weight sync failed: there are no complete weights until one succeeds"
    ),
    GenerationAborted: lambda error: unavailable("the generation was aborted by the server"),
    RequestRefused: lambda error: bad_request(str(error)),
    NonFiniteLogits: lambda error: ApiError(500, str(error), code="non_finite_logits"),
    VersionNotNewer: lambda error: ApiError(409, str(error), param="policy_version", code="version_not_newer"),
    WeightsNotLoaded: _not_loaded,
    OtherModel: lambda error: bad_request(str(error), "path", "other_model"),
    CheckpointRefused: lambda error: bad_request(str(error), "path"),
    NoRoom: lambda error: ApiError(503, str(error), code="no_room"),
}


def translated(error: Exception) -> ApiError | None:
    """The answer for an error from below; null for one that nobody foresaw."""
    if isinstance(error, ApiError):
        return error
    answer = ANSWERS.get(type(error))
    return None if answer is None else answer(error)
