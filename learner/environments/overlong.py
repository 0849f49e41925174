"""Responses that come near the token limit, or are cut off by it: their reward, and whether they are learnt from."""

from collections.abc import Sequence
from dataclasses import replace

from common.config.run import MaskOverlong, Overlong, ShapeOverlong
from common.packed import Group, PackedResponse


def shaped_groups(groups: Sequence[Group], overlong: Overlong, max_response_tokens: int) -> list[Group]:
    """The groups with the rewards that advantages are computed from; other modes than `shape` change none."""
    if not isinstance(overlong, ShapeOverlong):
        return list(groups)
    return [
        Group(group.prompt, [_shaped(response, overlong, max_response_tokens) for response in group.trajectories])
        for group in groups
    ]


def length_penalty(tokens: int, overlong: ShapeOverlong, max_response_tokens: int) -> float:
    """What is added to the reward: 0 up to `buffer_tokens` below the limit, from there linearly to `-penalty` at it.

    Source: DAPO (arXiv 2503.14476), soft overlong punishment, equation 13.
    """
    into_the_buffer = tokens - (max_response_tokens - overlong.buffer_tokens)
    return -overlong.penalty * min(max(into_the_buffer / overlong.buffer_tokens, 0.0), 1.0)


def is_masked(response: PackedResponse, overlong: Overlong) -> bool:
    """Whether a response is left out of the loss: it was cut off, and its end is not its own.

    It still takes part in its group's baseline. Source: DAPO, overlong filtering.
    """
    return isinstance(overlong, MaskOverlong) and response.finish_reason == "length"


def _shaped(response: PackedResponse, overlong: ShapeOverlong, max_response_tokens: int) -> PackedResponse:
    # Whoever needs the reward complains about one that is not there.
    if response.reward is None:
        return response
    penalty = length_penalty(response.response_tokens, overlong, max_response_tokens)
    return replace(response, reward=response.reward + penalty)
