"""JSON in pieces, none of which takes long to make."""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

VALUES_IN_A_PIECE = 128


def dump(value: Any) -> bytes:
    """Compact JSON; refuses what JSON has not. ASCII, because some clients end a line at U+2028 and its like."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def list_pieces(values: Iterable[Any]) -> Iterator[bytes]:
    """A list, however long."""
    yield b"["
    remaining = iter(values)
    separator = b""
    while block := list(islice(remaining, VALUES_IN_A_PIECE)):
        yield separator + dump(block)[1:-1]
        separator = b","
    yield b"]"


def object_pieces(values: dict[str, Any], lists: Mapping[str, Iterable[Any] | None]) -> Iterator[bytes]:
    """An object of `values`, at least one, and of long `lists`."""
    yield dump(values)[:-1]
    for name, value in lists.items():
        yield b"," + dump(name) + b":"
        yield from (b"null",) if value is None else list_pieces(value)
    yield b"}"
