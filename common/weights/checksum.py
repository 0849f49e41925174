"""Two checksums of weights: of what was sent, which knows every position, and of what a model holds.

`weights_checksum` proves that weights arrived. It depends on names, types, shapes and on the place of every byte, so
that swapped rows, swapped tensors and flipped bits change it. It is computed from the tensors as the learner names
them, before an engine has loaded them. `held_sum` proves that an engine has loaded all of them: engines join, pad and
reorder tensors, so it is the same however elements are split, joined or ordered.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

import numpy as np
import torch
import xxhash

CHUNK_ELEMENTS = 2**20
"""What a sum on a device widens to 64 bits at a time: 8 MiB."""

CHUNK_WORDS = 2**14
DIGITS = 16
_INTEGER_OF_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_digest(tensor: torch.Tensor) -> str:
    """XXH3 over the bytes of a tensor in host memory, 16 hexadecimal digits. Releases the GIL."""
    return xxhash.xxh3_64_hexdigest(as_bytes(tensor).numpy().data)


def weights_checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """The checksum of named tensors in host memory, 16 hexadecimal digits; their order is of no account."""
    return combined({name: described(tensor) for name, tensor in tensors.items()})


def described(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], str]:
    """Type, shape and digest of a tensor in host memory."""
    return type_name(tensor.dtype), tuple(tensor.shape), tensor_digest(tensor)


def combined(tensors: Mapping[str, tuple[str, tuple[int, ...], str]]) -> str:
    """The checksum of tensors of which type, shape and digest are known, by name."""
    entries = [(name, kind, list(shape), digest) for name, (kind, shape, digest) in sorted(tensors.items())]
    return xxhash.xxh3_64_hexdigest(json.dumps(entries).encode())


def device_digest(tensor: torch.Tensor) -> str:
    """A digest of a tensor on any device, computed there; not that of `tensor_digest`. 16 hexadecimal digits.

    A multilinear hash of each chunk of 32-bit words, whose weights are drawn once from a fixed seed, and XXH3 over the
    chunks' hashes. Two tensors that differ have the same hash with a chance of about 2**-32. Source: Lemire and Kaser,
    "Strongly universal string hashing is fast", 2014, section 3.
    """
    data = as_bytes(tensor)
    padding = -data.numel() % (4 * CHUNK_WORDS)
    whole = data.numel() - data.numel() % (4 * CHUNK_WORDS)
    parts = [data[:whole]]
    if padding:
        parts.append(torch.cat([data[whole:], data.new_zeros(padding)]))
    weights = _weights(data.device)
    sums = [
        (chunks.view(torch.int32).view(-1, CHUNK_WORDS).to(torch.int64) * weights).sum(dim=1)
        for part in parts
        for chunks in part.split(4 * CHUNK_ELEMENTS)
        if chunks.numel()
    ]
    hashes = torch.cat(sums).cpu().numpy().tobytes() if sums else b""
    return xxhash.xxh3_64_hexdigest(hashes + data.numel().to_bytes(8, "little"))


@cache
def _weights(device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(CHUNK_WORDS)
    low, high = (torch.randint(0, 2**32, (CHUNK_WORDS,), generator=generator) for _ in range(2))
    return ((high << 32) | low).to(device)


def held_sum(tensors: Iterable[torch.Tensor]) -> int:
    """The sum modulo 2**64 of every element's bit pattern.

    A learner's separate q, k and v give the same as an engine's joined qkv, and zero padding adds nothing. Any single
    changed element changes it, swapped elements do not. Memory beyond the tensors stays under 8 MiB.
    """
    return sum(_sum(tensor.detach().contiguous()) for tensor in tensors) % 2**64


def _sum(tensor: torch.Tensor) -> int:
    bits = tensor.view(-1).view(_INTEGER_OF_WIDTH[tensor.element_size()])
    if bits.device.type == "cpu":
        # NumPy widens 8,192 elements at a time, torch all of them at once.
        return int(np.add.reduce(bits.numpy(), dtype=np.int64))
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in bits.split(CHUNK_ELEMENTS):
        total += chunk.sum(dtype=torch.int64)
    return int(total)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, without a copy if it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def type_name(dtype: torch.dtype) -> str:
    """`float32` and the like."""
    return str(dtype).removeprefix("torch.")


def held_by_ranks(ranks: Sequence[Sequence[int]]) -> int:
    """`held_sum` of a model that is divided among ranks of tensor parallelism. `ranks`: of each the sums of its parts.

    A part that sums up to the same everywhere is a copy on every rank, and counts once; the others are shares, whose
    sums differ. Ranks hold as many parts in the same order.
    """
    parts = zip(*ranks, strict=True)
    return sum(part[0] if len(set(part)) == 1 else sum(part) for part in parts) % 2**64
