"""The sending side of `nccl`: vLLM's trainer engine broadcasts packed buckets to the workers of all replicas.

Written against vllm 0.32; it has not run on a GPU.
"""

import socket
from functools import partial
from typing import Any

from common.weights.rendezvous import Caller
from common.weights.updates import NcclUpdate
from learner.weights.device import DevicePublisher, TrainerEngine


def nccl_publisher(address: str, replicas: int, bucket_bytes: int, deadline_seconds: float) -> DevicePublisher:
    """For learner rank 0, on a machine with this address."""
    return DevicePublisher(NcclUpdate, partial(_connect, address, bucket_bytes), address, replicas, deadline_seconds)


def _connect(address: str, bucket_bytes: int, caller: Caller, source: Any, ranks: int) -> TrainerEngine:
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    init_info = NCCLTrainerInitInfo(
        master_address=address,
        master_port=_free_port(address),
        world_size=ranks,
        packed=True,
        packed_buffer_size_bytes=max(bucket_bytes, source.largest_bytes),
        rank=0,
    )
    engine: TrainerEngine = WeightTransferTrainerFactory.trainer_init(init_info, client=caller, source=source)
    return engine


def _free_port(address: str) -> int:
    with socket.socket() as free:
        free.bind((address, 0))
        return int(free.getsockname()[1])
