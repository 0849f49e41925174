"""What learner and replicas say to each other about a set of weights."""

from collections.abc import Iterable

import torch

from common.config.base import StrictModel

_INTEGER_OF_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class WeightUpdate(StrictModel):
    """One version of the policy's weights, ready to be loaded by replicas.

    `path`: where the `host` backend put the safetensors. `checksum`: `weight_checksum` over all tensors, which have
    `bytes` in all.
    """

    version: int
    backend: str
    path: str
    checksum: str
    bytes: int


class ReplicaSync(StrictModel):
    """How one replica took an update: seconds from pause to resume, and the checksum of what it then held."""

    replica: int
    version: int
    checksum: str
    seconds: float


class SyncReport(StrictModel):
    """A sync of all replicas. `seconds`: from the first pause to the last resume. `bytes`: of one copy."""

    version: int
    seconds: float
    bytes: int
    replicas: list[ReplicaSync]


class NonFiniteLogits(RuntimeError):
    """A response ended because the weights of `version` gave it logits that are not finite."""

    def __init__(self, version: int) -> None:
        super().__init__(version)
        self.version = version

    def __str__(self) -> str:
        return f"the weights of version {self.version} gave logits that are not finite, so the response was ended"


def weight_checksum(tensors: Iterable[torch.Tensor]) -> str:
    """Checksum over the bits of all elements, 16 hexadecimal digits.

    The sum modulo 2**64 of every element's bit pattern: it does not depend on how parameters are split, joined or
    ordered, so a learner's separate q, k and v give the same as an engine's joined qkv, and zero padding adds
    nothing. Any single changed element changes it. Source: ours.
    """
    total = 0
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(_INTEGER_OF_WIDTH[tensor.element_size()])
        total += int(bits.sum(dtype=torch.int64))
    return f"{total % 2**64:016x}"
