"""How much of a response repeats what it said before."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

REPEATED_TOKENS = 8
"""Length of the sequences that are looked for again: longer than what right reasoning repeats by itself."""


def repeated_share(token_ids: Sequence[int] | NDArray[np.int32], length: int = REPEATED_TOKENS) -> float:
    """The share of a response's sequences of `length` tokens that stand in it a second time or more."""
    count = len(token_ids) - length + 1
    if count < 1:
        return 0.0
    # A number for each sequence: its tokens times fixed odd factors, modulo 2**64. Equal ones get equal numbers.
    factors = np.random.default_rng(0).integers(0, 2**63, length, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    tokens = np.asarray(token_ids, dtype=np.uint64)
    numbers = np.zeros(count, dtype=np.uint64)
    for place in range(length):
        numbers += tokens[place : place + count] * factors[place]
    return 1.0 - len(np.unique(numbers)) / count
