"""What travels with a vLLM request to the monitor, in `SamplingParams.extra_args`."""

import hashlib
from functools import lru_cache
from typing import Any

import msgspec

from common.config.erasure import ErasurePolicy
from common.threshold import History
from common.trajectory import ResponseRequest
from rollout_server.monitor.adjustments import Adjustments

EXTRA_ARG = "e3rl"
PLAIN_ARG = "e3rl_plain"
"""Of a request without a monitor: its uid, by which is said that its logits were not finite."""


class Submission(msgspec.Struct, frozen=True):
    """One vLLM request of a response: the whole response, or its rest after an erasure.

    It holds all that the monitor must know, so that a response can be resumed on any replica. `uid` is unique in an
    engine. `policy`: JSON of an `ErasurePolicy`. `kind`: from `statistics_kind`. `stop_token_ids`: tokens that end the
    response. `watched`: each judgement is wanted at once, not only when the request ends. `best`: the least
    uncertainty of earlier attempts at the segment, if one of them may be kept in the end. It travels as one string,
    because vLLM makes deep copies of what is in `extra_args`.
    """

    uid: int
    group: str
    group_size: int
    policy: str
    kind: str
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
    adjustments: Adjustments | None = None
    best: float | None = None

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


NOT_OF_A_KIND = frozenset(
    {
        "prompt_id",
        "group_id",
        "group_size",
        "sample",
        "seed",
        "prompt_token_ids",
        "max_tokens",
        "top_logprobs",
        "policy",
        "attempt_texts",
        "erasable",
        "resume_from",
    }
)
"""The policy, and fields of a `ResponseRequest` that leave the distribution of a segment's U as it is.

The token limit, too: it shortens a response's last segment only, and clients choose it freely. All other fields belong
to the kind, a new one as well: to compare too little is harmless, to mix is not.
"""

EXTRAS_NOT_OF_A_KIND = frozenset({"cache_salt"})
"""Fields of `SamplingExtras` that change nothing of what is sampled."""

POLICY_NOT_OF_A_KIND = frozenset(
    {
        "min_uncertainty",
        "kappa",
        "gamma",
        "eta",
        "max_erasures",
        "regeneration_budget",
        "on_exhaustion",
        "retry_temperature",
        "threshold",
        "prior_strength",
        "prior_decay",
    }
)
"""Fields of an `ErasurePolicy` that say what follows from U.

The retry temperature belongs to the kind only where retries are observed.
"""


def statistics_kind(request: ResponseRequest, policy: ErasurePolicy) -> str:
    """The same for responses whose segments are made and measured in the same way: only their U are comparable.

    A digest, since what truncates or biases sampling may be long.
    """
    of_policy = POLICY_NOT_OF_A_KIND - {"retry_temperature"} if policy.observe == "all" else POLICY_NOT_OF_A_KIND
    of_request: dict[str, Any] = dict.fromkeys(NOT_OF_A_KIND, True) | {"extras": set(EXTRAS_NOT_OF_A_KIND)}
    settings = request.model_dump_json(exclude=of_request) + policy.model_dump_json(exclude=set(of_policy))
    return hashlib.blake2b(settings.encode(), digest_size=16).hexdigest()


@lru_cache(maxsize=1024)
def _parse_policy(text: str) -> ErasurePolicy:
    return ErasurePolicy.model_validate_json(text)
