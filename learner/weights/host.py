"""Writing a policy's weights for the `host` transport: one safetensors file in shared memory."""

import json
import logging
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import torch
from torch import Tensor

from common.weights import weight_checksum

log = logging.getLogger(__name__)

_TYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class ParameterShape:
    """What is known of a parameter before it is gathered."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


class Gather(Protocol):
    """Makes the whole of a parameter available while the context is open; a collective call under ZeRO-3."""

    def __call__(self, name: str) -> AbstractContextManager[Tensor]: ...


@dataclass(frozen=True, slots=True)
class WrittenWeights:
    """What was written: `checksum` is `weight_checksum` over all tensors. `not_finite`: the first that holds NaN or
    infinity."""

    path: str
    checksum: str
    tensors: int
    bytes: int
    not_finite: str | None


def file_prefix(run: str, process: int) -> str:
    """What the names of the weight files of one driver process begin with."""
    return f"e3rl-{run}-{process}-weights-"


def remove_weight_files(run: str, process: int) -> None:
    """Remove the files of a driver process, and those that dead processes of the same run have left."""
    pattern = re.compile(re.escape(f"e3rl-{run}-") + r"(\d+)-weights-")
    for directory in {_SHARED_MEMORY, Path(tempfile.gettempdir())}:
        if not directory.is_dir():
            continue
        for path in directory.glob("e3rl-*"):
            match = pattern.match(path.name)
            if match and (int(match[1]) == process or not psutil.pid_exists(int(match[1]))):
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    log.warning("a weight file that nobody needs stays: %s", error)


def weight_directory(needed_bytes: int) -> Path:
    """Shared memory if it has room, else the directory for temporary files. Raises OSError if neither has.

    Containers often give shared memory 64 MB only.
    """
    candidates = [d for d in (_SHARED_MEMORY, Path(tempfile.gettempdir())) if os.access(d, os.W_OK)]
    free = {directory: shutil.disk_usage(directory).free for directory in candidates}
    for directory in candidates:
        if free[directory] > needed_bytes + 2**20:
            return directory
    room = ", ".join(f"{directory} has {size / 2**20:,.0f} MB free" for directory, size in free.items())
    raise OSError(f"no room for {needed_bytes / 2**20:,.0f} MB of weights: {room}")


def write_weights(path: Path, shapes: list[ParameterShape], gather: Gather) -> WrittenWeights:
    """Write parameters to `path` in the safetensors format, gathering one at a time.

    Unlike `safetensors.torch.save_file` this never holds a second copy of the model.
    """
    header = _header(shapes)
    checksum = 0
    not_finite = None
    with path.open("wb") as file:
        file.write(header)
        for shape in shapes:
            with gather(shape.name) as tensor:
                tensor = tensor.detach().contiguous().cpu()
                checksum += int(weight_checksum([tensor]), 16)
                if not_finite is None and not _is_finite(tensor):
                    not_finite = shape.name
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    total = sum(shape.bytes for shape in shapes)
    return WrittenWeights(str(path), f"{checksum % 2**64:016x}", len(shapes), total, not_finite)


def _is_finite(tensor: Tensor) -> bool:
    """In one pass and without a copy: the smallest and the largest element tell."""
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())


def _header(shapes: list[ParameterShape]) -> bytes:
    """Length (8 bytes, little-endian), then JSON, padded so that the data are aligned. Source: the format's text."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for shape, (start, end) in zip(shapes, _offsets(shapes), strict=True):
        entries[shape.name] = {
            "dtype": _TYPE_NAMES[shape.dtype],
            "shape": list(shape.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _offsets(shapes: list[ParameterShape]) -> Iterator[tuple[int, int]]:
    start = 0
    for shape in shapes:
        yield start, start + shape.bytes
        start += shape.bytes
