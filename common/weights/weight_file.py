"""The file in which weights travel: safetensors, with the digest of every tensor in the header's metadata.

The learner writes it while it gathers parameters, one at a time, so that it never holds a second copy of the model.
Digests are known last, so the header is written twice, the second time in place.
"""

import json
import os
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.weights.checksum import DIGITS, as_bytes, combined, described, tensor_digest, type_name

_FORMAT_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DIGESTS = "e3rl_digests"


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


class WeightWriter:
    """Writes parameters into an open file, in the order of `shapes`; a context, to be left after `finish`.

    Other threads may read the file as far as `wait_for` says.
    """

    def __init__(self, file: int, shapes: Sequence[ParameterShape]) -> None:
        self._file = file
        self._shapes = list(shapes)
        self._digests: list[str] = []
        self._not_finite: str | None = None
        self._grown = threading.Condition()
        self._failed = False
        # A parameter is looked at while it is copied.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="e3rl-digest")
        header = _header(self._shapes, ["0" * DIGITS] * len(self._shapes))
        self.header_bytes = len(header)
        self.total_bytes = self.header_bytes + sum(shape.bytes for shape in self._shapes)
        os.ftruncate(file, self.total_bytes)
        _write(file, header, 0)
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
        _write(self._file, as_bytes(tensor), self._position)
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
        _write(self._file, _header(self._shapes, self._digests), 0)
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


def verify(path: str | Path, checksum: str) -> None:
    """Compare a file with what was sent, tensor by tensor.

    Raises:
        DamagedWeights: it differs; the message says where.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            expected = sent_digests(file.metadata() or {})
            found: dict[str, tuple[str, tuple[int, ...], str]] = {}
            for name in names:
                found[name] = described(file.get_tensor(name))
                if expected is not None and expected.get(name) != found[name][2]:
                    raise DamagedWeights(f"tensor {name} is not what was sent: its digest differs")
    except SafetensorError as error:
        raise DamagedWeights(f"the weights' header is damaged: {error}") from error
    if (here := combined(found)) != checksum:
        raise DamagedWeights(f"the weights have checksum {here}, {checksum} was sent")


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
    """Its digest, and whether its values are finite: the smallest and the largest tell, without a copy."""
    finite = tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())
    return tensor_digest(tensor), finite


def _write(file: int, data: bytes | memoryview, position: int) -> None:
    view = memoryview(data)
    while view.nbytes:
        written = os.pwrite(file, view, position)
        view, position = view[written:], position + written


def _header(shapes: Sequence[ParameterShape], digests: Sequence[str]) -> bytes:
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
    return struct.pack("<Q", len(text)) + text
