"""Finds several texts at once, byte by byte (Aho and Corasick, 1975)."""

from collections import deque
from collections.abc import Sequence

import numpy as np


def automaton(patterns: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The states that bytes lead to, int32 `[states, 256]`, and which states complete a pattern, bool `[states]`.

    State 0 is the start. A state stands for the longest beginning of a pattern that the bytes read so far end with.
    """
    children: list[dict[int, int]] = [{}]
    complete: list[bool] = [False]
    for pattern in patterns:
        state = 0
        for byte in pattern:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
                complete.append(False)
            state = children[state][byte]
        complete[state] = True
    following = np.zeros((len(children), 256), np.int32)
    completes = np.array(complete)
    shorter = [0] * len(children)
    """The longest other state whose beginning the state's own ends with."""
    waiting = deque([0])
    while waiting:
        state = waiting.popleft()
        following[state] = following[shorter[state]]
        for byte, child in children[state].items():
            shorter[child] = int(following[state, byte])
            following[state, byte] = child
            completes[child] |= completes[shorter[child]]
            waiting.append(child)
    return following, completes
