"""Where a segment of text ends: the reference that the segment monitor is held to. Source: ours."""

from collections.abc import Sequence

from common.config.erasure import Segmentation


def segment_length(tokens: Sequence[bytes], segmentation: Segmentation, limit: int) -> int | None:
    """Tokens of the segment that `tokens` begin with, each given as the bytes of its text; None if it goes on.

    It ends with the first token, from `min_length` on, that completes an occurrence of a delimiter which began in this
    segment; with token `max_length`; or with the last of `limit` tokens that the response has left.
    """
    text = b""
    for length, token in enumerate(tokens, 1):
        before, text = len(text), text + token
        # An occurrence that this token completes ends after `before`.
        completes = any(text.find(d, max(0, before - len(d) + 1)) >= 0 for d in segmentation.delimiters)
        if (completes and length >= segmentation.min_length) or length >= min(segmentation.max_length, limit):
            return length
    return None
