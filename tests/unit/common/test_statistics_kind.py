"""Which settings make uncertainties incomparable: each field of a request or a policy is on one side or the other."""

from typing import Any

import pytest

from common.config import DelimiterSegmentation, ErasurePolicy, FixedSegmentation, SignalWeights
from common.trajectory import ResponseRequest, SamplingExtras
from rollout_server.monitor.spec import (
    EXTRAS_NOT_OF_A_KIND,
    NOT_OF_A_KIND,
    POLICY_NOT_OF_A_KIND,
    statistics_kind,
)
from tests.trajectories import attempt_of

SAME: dict[str, Any] = {
    "prompt_id": "other",
    "group_id": "other",
    "group_size": 9,
    "sample": 3,
    "seed": 4,
    "prompt_token_ids": [7, 8],
    "max_tokens": 99,
    "top_logprobs": 5,
    "erasable": False,
    "attempt_texts": True,
    "resume_from": [attempt_of([1], segment=0, start=0)],
}
"""Another value of each field of a request that leaves the kind as it is."""
OTHER: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.1,
    "ignore_eos": True,
    "stop": ("x",),
    "extras": SamplingExtras(presence_penalty=0.5),
}
"""Another value of each field of a request that makes another kind."""
EXTRAS_SAME: dict[str, Any] = {"cache_salt": "mine"}
EXTRAS_OTHER: dict[str, Any] = {
    "stop_token_ids": (3,),
    "min_tokens": 2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {3: 1.0},
    "allowed_token_ids": (1, 2),
    "bad_words": ("no",),
}
POLICY_SAME: dict[str, Any] = {
    "min_uncertainty": 0.5,
    "kappa": 0.0,
    "gamma": 0.0,
    "eta": 0.0,
    "max_erasures": 0,
    "regeneration_budget": 0.5,
    "on_exhaustion": "best",
    "retry_temperature": 0.5,
    "threshold": 1.0,
    "prior_strength": 1.0,
    "prior_decay": 0.5,
}
POLICY_OTHER: dict[str, Any] = {
    "segmentation": FixedSegmentation(length=3),
    "signal": "entropy",
    "window": 5,
    "weights": SignalWeights(extreme=0.1),
    "statistics": "group",
    "observe": "all",
}


def request(**changes: Any) -> ResponseRequest:
    values = {
        "prompt_id": "p",
        "group_id": "g",
        "group_size": 2,
        "sample": 0,
        "prompt_token_ids": [1],
        "max_tokens": 8,
        "policy": ErasurePolicy(),
    }
    return ResponseRequest(**{**values, **changes})


def kind(policy: ErasurePolicy | None = None, **changes: Any) -> str:
    return statistics_kind(request(**changes), policy or ErasurePolicy())


def test_every_field_is_on_one_side() -> None:
    assert set(SAME) | {"policy"} == NOT_OF_A_KIND
    assert set(POLICY_SAME) == POLICY_NOT_OF_A_KIND
    # A field that is new belongs to the kind unless it is named; either way it must be entered here.
    assert SAME.keys() | OTHER.keys() | {"policy"} == ResponseRequest.model_fields.keys()
    assert set(EXTRAS_SAME) == EXTRAS_NOT_OF_A_KIND
    # Nothing is monitored that follows a JSON schema.
    assert EXTRAS_SAME.keys() | EXTRAS_OTHER.keys() | {"json_schema"} == SamplingExtras.model_fields.keys()
    assert POLICY_SAME.keys() | POLICY_OTHER.keys() == ErasurePolicy.model_fields.keys()


@pytest.mark.parametrize("name", OTHER)
def test_what_changes_sampling_makes_another_kind(name: str) -> None:
    assert kind(**{name: OTHER[name]}) != kind()


@pytest.mark.parametrize("name", SAME)
def test_what_leaves_sampling_alone_makes_no_other_kind(name: str) -> None:
    assert kind(**{name: SAME[name]}) == kind()


@pytest.mark.parametrize("name", [*EXTRAS_SAME, *EXTRAS_OTHER])
def test_extras_make_another_kind_if_they_change_sampling(name: str) -> None:
    extras = SamplingExtras(**{name: (EXTRAS_SAME | EXTRAS_OTHER)[name]})
    assert (kind(extras=extras) != kind()) == (name in EXTRAS_OTHER)


@pytest.mark.parametrize("name", POLICY_OTHER)
def test_what_changes_the_measure_makes_another_kind(name: str) -> None:
    assert kind(ErasurePolicy(**{name: POLICY_OTHER[name]})) != kind()


@pytest.mark.parametrize("name", POLICY_SAME)
def test_what_only_judges_makes_no_other_kind(name: str) -> None:
    assert kind(ErasurePolicy(**{name: POLICY_SAME[name]})) == kind()


def test_the_retry_temperature_counts_where_retries_are_observed() -> None:
    retries = [ErasurePolicy(observe="all", retry_temperature=t) for t in (None, 0.5, 0.8)]
    assert len({kind(policy) for policy in retries}) == 3


def test_parts_of_the_segmentation_count() -> None:
    lengths = [DelimiterSegmentation(min_length=n) for n in (1, 2)] + [DelimiterSegmentation(delimiter="x")]
    assert len({kind(ErasurePolicy(segmentation=segmentation)) for segmentation in lengths}) == 3
