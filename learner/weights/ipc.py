"""The sending side of `ipc`: vLLM's trainer engine hands a replica on the same GPU handles of packed buckets.

Written against vllm 0.32; it has not run on a GPU. Handles are pickled, so the replica's process must be started with
`VLLM_ALLOW_INSECURE_SERIALIZATION=1`, and the store must be in reach of nobody else.
"""

import base64
import pickle
from functools import partial
from typing import Any

from common.weights.rendezvous import Caller
from common.weights.updates import IpcUpdate
from learner.weights.device import DevicePublisher, TrainerEngine


def ipc_publisher(replicas: int, bucket_bytes: int, deadline_seconds: float) -> DevicePublisher:
    """For learner rank 0."""
    return DevicePublisher(IpcUpdate, partial(_connect, bucket_bytes), "127.0.0.1", replicas, deadline_seconds)


def _connect(bucket_bytes: int, caller: Caller, source: Any, ranks: int) -> TrainerEngine:
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    init_info = IPCTrainerInitInfo(
        packed=True, packed_buffer_size_bytes=max(bucket_bytes, source.largest_bytes), rank=0
    )
    client = _Pickled(caller)
    engine: TrainerEngine = WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=source)
    return engine


class _Pickled:
    """A caller whose updates can travel as JSON: handles in the form that vLLM's workers unpickle."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._caller.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self._caller.start_weight_update()

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        assert isinstance(update_info, dict)
        info = {name: value for name, value in update_info.items() if value is not None and name != "ipc_handles"}
        info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(update_info["ipc_handles"])).decode("ascii")
        self._caller.update_weights(info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._caller.finish_weight_update(weight_version)
