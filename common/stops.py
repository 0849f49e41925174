"""The text of a response that a stop string ended."""

from collections.abc import Sequence


def text_before_stop(text: str, stops: Sequence[str]) -> str:
    """`text` up to the stop string that is complete first, without it.

    Of those that are complete at once it is the first in `stops`.
    """
    ends = [(start + len(stop), number) for number, stop in enumerate(stops) if (start := text.find(stop)) >= 0]
    if not ends:
        return text
    end, number = min(ends)
    return text[: end - len(stops[number])]
