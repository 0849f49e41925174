"""A finished response as arrays with its text, made where it was generated so that the driver need not."""

from typing import Any

from common.packed import PackedResponse, pack
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
