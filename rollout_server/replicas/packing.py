"""A finished response as arrays with its text, made where it was generated so that the driver need not.

Its header goes to the driver at once. Its arrays go into the object store of their node when the driver calls for them,
which so owns them: they outlive the replica, and are gone when nobody refers to them any more.
"""

from dataclasses import replace
from typing import Any

from common.packed import PackedResponse, TokenArrays, pack
from common.stops import text_before_stop
from common.trajectory import ResponseRequest, Trajectory


def packed(trajectory: Trajectory, request: ResponseRequest, tokenizer: Any) -> PackedResponse:
    """The response with the decoding of its committed tokens, up to the stop string that ended it.

    `tokenizer`: the model's, of Hugging Face. Special tokens are left out of texts.
    """
    text = tokenizer.decode(trajectory.token_ids, skip_special_tokens=True)
    attempt_texts = None
    if request.attempt_texts:
        tokens = [attempt.token_ids for attempt in trajectory.attempts]
        attempt_texts = tuple(tokenizer.batch_decode(tokens, skip_special_tokens=True))
    return pack(trajectory, text_before_stop(text, request.stop), attempt_texts)


INLINE_BYTES = 32 * 1024
"""Arrays up to this size travel with the header: an object of their own would cost more than to copy them."""


class Shelf:
    """Arrays of finished responses in the replica's process, until the driver calls for them."""

    def __init__(self) -> None:
        self._arrays: dict[int, TokenArrays] = {}

    def header(self, key: int, response: PackedResponse) -> PackedResponse:
        """What goes to the driver. The arrays are kept under `key`, unless they are small."""
        if response.arrays.nbytes <= INLINE_BYTES:
            return response
        self._arrays[key] = response.arrays
        return replace(response, tokens=None)

    def take(self, key: int) -> tuple[None, TokenArrays]:
        """For an actor's method of two results. When the first has come, the second is in the store."""
        return None, self._arrays.pop(key)

    def discard(self, key: int) -> None:
        """Nobody will call for them any more; no error if nobody had to."""
        self._arrays.pop(key, None)

    def __len__(self) -> int:
        return len(self._arrays)


async def referenced(response: PackedResponse, key: int, take: Any) -> PackedResponse:
    """The response with a reference to its arrays. `take`: the actor's method that calls `Shelf.take`.

    Returns when the arrays are in the store. Raises Ray's errors if the actor is lost before.
    """
    if response.tokens is not None:
        return response
    stored, reference = take.options(num_returns=2).remote(key)
    await stored
    return replace(response, reference=reference)
