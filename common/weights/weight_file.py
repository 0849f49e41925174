"""The file in which weights travel: safetensors, with the digest of every tensor in the header's metadata.

The learner writes it while it gathers parameters, one at a time, so that it never holds a second copy of the model.
Digests are known last, so the header is written twice, the second time in place.
"""

import json
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.weights.checksum import DIGITS, as_bytes, combined, type_name

_FORMAT_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_TYPES = {"F64": "float64"} | {name: type_name(dtype) for dtype, name in _FORMAT_NAMES.items()}
_DIGESTS = "e3rl_digests"
READ_BYTES = 2**16
CACHED_BYTES = 2**20
MOST_THREADS = 8


class DamagedWeights(Exception):
    """Weights arrived that are not those that were sent; the message names the first tensor that differs."""


@dataclass(frozen=True, slots=True)
class ParameterShape:
    """What is known of a parameter before it is gathered."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class WrittenWeights:
    """What was written. `not_finite`: the first parameter that holds NaN or infinity."""

    checksum: str
    tensors: int
    bytes: int
    not_finite: str | None


class Target(Protocol):
    """What a weight file is written into."""

    def resize(self, size: int) -> None:
        """Make room. Raises OSError if there is none."""
        ...

    def write(self, data: Tensor, position: int) -> None:
        """Write bytes."""
        ...


class OpenFile:
    """A file on a disk, open for writing."""

    def __init__(self, file: int) -> None:
        self.file = file

    def resize(self, size: int) -> None:
        os.ftruncate(self.file, size)

    def write(self, data: Tensor, position: int) -> None:
        view = data.numpy().data
        while view.nbytes:
            written = os.pwrite(self.file, view, position)
            view, position = view[written:], position + written


class MemoryFile:
    """A file in memory, open for reading and writing, and mapped.

    What was written once can be written again without new memory. `resize` raises OSError where there is no room: to
    write to a mapping without room would end the process.
    """

    def __init__(self, file: int) -> None:
        self.file = file
        self.bytes = torch.empty(0, dtype=torch.uint8)

    def resize(self, size: int) -> None:
        if self.bytes.numel() == size:
            return
        os.ftruncate(self.file, size)
        os.posix_fallocate(self.file, 0, size)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self.bytes = torch.frombuffer(mmap.mmap(self.file, size, flags=flags), dtype=torch.uint8)

    def write(self, data: Tensor, position: int) -> None:
        self.bytes[position : position + data.numel()].copy_(data)


class WeightWriter:
    """Writes parameters into `target`, in the order of `shapes`; a context, to be left after `finish`.

    Other threads may read what was written as far as `wait_for` says.
    """

    def __init__(self, target: Target, shapes: Sequence[ParameterShape]) -> None:
        self._target = target
        self._shapes = list(shapes)
        self._digests: list[str] = []
        self._not_finite: str | None = None
        self._grown = threading.Condition()
        self._failed = False
        # A parameter is looked at while it is copied.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="e3rl-digest")
        header = _header(self._shapes, ["0" * DIGITS] * len(self._shapes))
        self.header_bytes = header.numel()
        self.total_bytes = self.header_bytes + sum(shape.bytes for shape in self._shapes)
        target.resize(self.total_bytes)
        target.write(header, 0)
        self._position = self.header_bytes

    def __enter__(self) -> "WeightWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if error is not None:
            self.fail()

    def add(self, tensor: Tensor) -> None:
        """Write the next parameter."""
        shape = self._shapes[len(self._digests)]
        tensor = tensor.detach().contiguous().cpu()
        if tuple(tensor.shape) != shape.shape or tensor.dtype != shape.dtype:
            raise ValueError(f"{shape.name} is {tensor.dtype} {tuple(tensor.shape)}, not {shape}")
        looked_at = self._pool.submit(_look_at, tensor)
        self._target.write(as_bytes(tensor), self._position)
        digest, finite = looked_at.result()
        if not finite and self._not_finite is None:
            self._not_finite = shape.name
        self._digests.append(digest)
        with self._grown:
            self._position += shape.bytes
            self._grown.notify_all()

    def finish(self) -> WrittenWeights:
        """Complete the header, after the last parameter."""
        if len(self._digests) != len(self._shapes):
            raise ValueError(f"{len(self._digests)} of {len(self._shapes)} parameters were written")
        self._target.write(_header(self._shapes, self._digests), 0)
        checksum = combined(
            {
                shape.name: (type_name(shape.dtype), shape.shape, digest)
                for shape, digest in zip(self._shapes, self._digests, strict=True)
            }
        )
        total = self.total_bytes - self.header_bytes
        return WrittenWeights(checksum, len(self._shapes), total, self._not_finite)

    def wait_for(self, position: int, deadline: float) -> None:
        """Wait until the file is written up to `position`. `deadline`: on the monotonic clock.

        Raises:
            TimeoutError: it was not.
            RuntimeError: the writer has failed.
        """
        with self._grown:
            while self._position < position:
                if self._failed:
                    raise RuntimeError("the weights could not be gathered")
                if not self._grown.wait(max(deadline - time.monotonic(), 0.0)):
                    raise TimeoutError("the weights were not gathered in time")

    def fail(self) -> None:
        """Who waits is told that nothing more comes."""
        with self._grown:
            self._failed = True
            self._grown.notify_all()


def verify(path: str | Path, checksum: str, *, in_memory: bool = False) -> None:
    """Compare a file with what was sent, tensor by tensor.

    `in_memory`: it lies in shared memory, so it can be mapped: a disk's file that goes away would end the process.

    Raises:
        DamagedWeights: it differs; the message says where.
        OSError: it cannot be read.
    """
    entries, metadata = _read_header(path)
    expected = sent_digests(metadata)
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _reader(file, in_memory) as read, ThreadPoolExecutor(_threads()) as pool:
            digests = pool.map(lambda entry: _digest(read, *entry.place), entries)
            found = {}
            for entry, digest in zip(entries, digests, strict=True):
                found[entry.name] = entry.type, entry.shape, digest
                if expected is not None and expected.get(entry.name) != digest:
                    raise DamagedWeights(f"tensor {entry.name} is not what was sent: its digest differs")
    finally:
        os.close(file)
    if (here := combined(found)) != checksum:
        raise DamagedWeights(f"the weights have checksum {here}, {checksum} was sent")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor in a file. `place`: where its bytes begin and end."""

    name: str
    type: str
    shape: tuple[int, ...]
    place: tuple[int, int]


def _read_header(path: str | Path) -> tuple[list[_Entry], dict[str, str]]:
    """What a file holds, and the header's metadata; the format's own library judges the header first."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        with Path(path).open("rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            header = json.loads(raw.read(length))
        header.pop("__metadata__", None)
        entries = []
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            place = start + 8 + length, end + 8 + length
            kind = _TYPES.get(entry["dtype"], entry["dtype"])
            entries.append(_Entry(name, kind, tuple(entry["shape"]), place))
    except (SafetensorError, ValueError, KeyError) as error:
        raise DamagedWeights(f"the weights' header is damaged: {error}") from error
    return entries, metadata


@contextmanager
def _reader(file: int, in_memory: bool) -> Iterator[Callable[[int, int], bytes | memoryview]]:
    """Gives bytes between two places, or fewer."""
    if not in_memory:
        yield lambda start, end: os.pread(file, min(READ_BYTES, end - start), start)
        return
    # Populated at once: else it costs a page fault for every 4 KiB.
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    with mmap.mmap(file, 0, flags=flags, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
        yield lambda start, end: view[start:end]


def _digest(read: Callable[[int, int], bytes | memoryview], start: int, end: int) -> str:
    """Of the bytes between; see `tensor_digest`."""
    digest = xxhash.xxh3_64()
    while start < end:
        data = read(start, end)
        if not data:
            raise DamagedWeights("the weights end before their header says so")
        digest.update(data)
        start += len(data)
        del data
    return digest.hexdigest()


def _threads() -> int:
    return min(len(os.sched_getaffinity(0)), MOST_THREADS)


def sent_digests(metadata: Mapping[str, str]) -> dict[str, str] | None:
    """The digests in a header's metadata, by name; None for a file that this module did not write."""
    if _DIGESTS not in metadata:
        return None
    try:
        digests = json.loads(metadata[_DIGESTS])
    except ValueError as error:
        raise DamagedWeights(f"the weights' header is damaged: {error}") from error
    return digests if isinstance(digests, dict) else {}


def _look_at(tensor: Tensor) -> tuple[str, bool]:
    """Its digest, and whether its values are finite, without a copy.

    A part that is read twice, one time after the other, is in the processor's cache the second time.
    """
    digest, finite = xxhash.xxh3_64(), True
    for part in tensor.view(-1).split(CACHED_BYTES // tensor.element_size()):
        digest.update(as_bytes(part).numpy().data)
        finite = finite and _is_finite(part)
    return digest.hexdigest(), finite


def _is_finite(values: Tensor) -> bool:
    """A sum that is finite tells; one that is not may have overflowed, and the smallest and the largest value tell."""
    return (
        values.numel() == 0
        or bool(values.sum(dtype=torch.float32).isfinite())
        or all(bool(end.isfinite()) for end in values.aminmax())
    )


def _header(shapes: Sequence[ParameterShape], digests: Sequence[str]) -> Tensor:
    """Length (8 bytes, little-endian), then JSON, padded so that the data are aligned. Source: the format's text."""
    by_name = {shape.name: digest for shape, digest in zip(shapes, digests, strict=True)}
    entries: dict[str, object] = {"__metadata__": {"format": "pt", _DIGESTS: json.dumps(by_name)}}
    start = 0
    for shape in shapes:
        entries[shape.name] = {
            "dtype": _FORMAT_NAMES[shape.dtype],
            "shape": list(shape.shape),
            "data_offsets": [start, start + shape.bytes],
        }
        start += shape.bytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return torch.frombuffer(bytearray(struct.pack("<Q", len(text)) + text), dtype=torch.uint8)
