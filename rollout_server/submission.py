"""What travels with a vLLM request to the monitor, in `SamplingParams.extra_args`."""

from functools import lru_cache
from typing import Any

import msgspec

from common.config.erasure import ErasurePolicy
from common.threshold import History

EXTRA_ARG = "e3rl"
PLAIN_ARG = "e3rl_plain"
"""Of a request without a monitor: its uid, by which is said that its logits were not finite."""


class Submission(msgspec.Struct, frozen=True):
    """One vLLM request of a response: the whole response, or its rest after an erasure.

    It holds all that the monitor must know, so that a response can be resumed on any replica. `uid` is unique in an
    engine. `policy`: JSON of an `ErasurePolicy`. `stop_token_ids`: tokens that end the response. `watched`: each
    judgement is wanted at once, not only when the request ends. It travels as one string, because vLLM makes deep
    copies of what is in `extra_args`.
    """

    uid: int
    group: str
    group_size: int
    policy: str
    erasable: bool
    position: int
    segment: int
    attempt: int
    erased_tokens: int
    limit: int
    erased_limit: int
    temperature: float
    engine_temperature: float
    history: tuple[float, float, float]
    stop_token_ids: tuple[int, ...]
    watched: bool

    def extra_args(self) -> dict[str, Any]:
        """For `SamplingParams.extra_args`."""
        return {EXTRA_ARG: _ENCODER.encode(self).decode()}

    @staticmethod
    def find(extra_args: dict[str, Any] | None) -> "Submission | None":
        """The submission in `extra_args`; None for a request that is not monitored."""
        if not extra_args or EXTRA_ARG not in extra_args:
            return None
        return _DECODER.decode(extra_args[EXTRA_ARG])

    @property
    def kind(self) -> str:
        """The same for responses that are segmented and measured in the same way, whose statistics are comparable."""
        return _kind(self.policy)

    @property
    def parsed_policy(self) -> ErasurePolicy:
        return _parse_policy(self.policy)

    @property
    def parsed_history(self) -> History:
        return History(*self.history)


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Submission)


@lru_cache(maxsize=1024)
def policy_json(policy: ErasurePolicy) -> str:
    """JSON of a policy, for `Submission.policy`."""
    return policy.model_dump_json()


@lru_cache(maxsize=1024)
def _kind(policy: str) -> str:
    return _parse_policy(policy).model_dump_json(include={"segmentation", "signal", "window", "weights"})


@lru_cache(maxsize=1024)
def _parse_policy(text: str) -> ErasurePolicy:
    return ErasurePolicy.model_validate_json(text)
