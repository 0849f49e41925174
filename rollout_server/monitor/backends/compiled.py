"""Compiling of the monitor's loops, with numba, which comes with vLLM."""

import logging
from collections import namedtuple
from collections.abc import Callable
from enum import IntEnum
from typing import Any, TypeVar, cast

from numba import njit

log = logging.getLogger("e3rl.engine")
F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compiled when it is first called, and kept on disk; an index out of bounds raises."""
    try:
        return cast(F, njit(cache=True, boundscheck=True)(function))
    except RuntimeError as error:
        # numba finds no directory that it may write to, as in a read-only container.
        log.info("compiling %s anew in every process: %s", function.__name__, error)
        return cast(F, njit(boundscheck=True)(function))


def places(columns: type[IntEnum]) -> Any:
    """Columns as a named tuple of integers: numba doesn't index with members of an enum."""
    names: Any = namedtuple("names", list(columns.__members__))  # type: ignore[misc]
    return names(*(int(member) for member in columns))
