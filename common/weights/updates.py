"""An update of weights as replicas are told of it, and what they answer."""

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from common.config.base import StrictModel


class _Update(StrictModel, ABC):
    """One version of the policy's weights, ready to be loaded by replicas.

    `checksum`: `weights_checksum` of all tensors, which have `bytes` in all. `streams`: replicas may begin while the
    weights are still gathered; the checksum is empty then, and arrives with the weights.
    """

    streams: ClassVar[bool] = False

    version: int
    checksum: str
    bytes: int

    @property
    @abstractmethod
    def place(self) -> str:
        """Where the weights are, as errors may name it."""


class HostUpdate(_Update):
    """A file in the shared memory of one machine: its path, and what tells whether a replica sees the same file.

    `boot_id`: of the kernel's start, the same in all containers of a machine. `file_id`: device and inode.
    """

    transport: Literal["host"] = "host"
    path: str
    boot_id: str
    file_id: tuple[int, int]

    @property
    def place(self) -> str:
        return self.path


class DiskUpdate(_Update):
    """A file in a directory that every replica's machine sees under the same path."""

    transport: Literal["disk"] = "disk"
    path: str

    @property
    def place(self) -> str:
        return self.path


class _Streamed(_Update):
    """Weights that come from a store of the learner's, where replicas come together to receive them."""

    streams: ClassVar[bool] = True

    address: str
    port: int

    @property
    def place(self) -> str:
        return f"{self.address}:{self.port}"


class GlooUpdate(_Streamed):
    """The weights come as a file, in buckets of `bucket_bytes`.

    `stall_seconds`: a member that does not move for so long is given up.
    """

    transport: Literal["gloo"] = "gloo"
    file_bytes: int
    header_bytes: int
    bucket_bytes: int
    stall_seconds: float


class NcclUpdate(_Streamed):
    """The weights are broadcast from GPU to GPU."""

    transport: Literal["nccl"] = "nccl"


class IpcUpdate(_Streamed):
    """A replica on the same GPU is told where in its memory the weights are."""

    transport: Literal["ipc"] = "ipc"


WeightUpdate = Annotated[
    HostUpdate | DiskUpdate | GlooUpdate | NcclUpdate | IpcUpdate, Field(discriminator="transport")
]


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
