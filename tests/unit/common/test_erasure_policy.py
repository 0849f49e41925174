"""Defaults of an erasure policy that depend on its other settings, in configurations and in requests."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from common.config import DelimiterSegmentation, ErasurePolicy, build_config
from common.config.loading import PRESETS, merge
from common.trajectory import ResponseRequest
from rollout_server.http.openai.schema.erasure import ErasureOptions
from tests.configs import SETTINGS


@pytest.mark.parametrize(
    ("given", "floor"),
    [
        ({}, 0.02),
        ({"threshold": 0.0}, 0.0),
        ({"threshold": 0.0, "min_uncertainty": 0.5}, 0.5),
        ({"threshold": None}, 0.02),
        ({"min_uncertainty": 0.0}, 0.0),
    ],
)
def test_the_floor_does_not_take_back_what_a_threshold_says(given: dict[str, Any], floor: float) -> None:
    policy = ErasurePolicy(**given)
    assert policy.min_uncertainty == floor
    assert ErasurePolicy.model_validate_json(policy.model_dump_json()) == policy


@pytest.mark.parametrize(
    ("server", "asked", "floor"),
    [
        ({}, {}, 0.02),
        ({}, {"threshold": 0}, 0.0),
        ({"min_uncertainty": 0.5}, {"threshold": 0}, 0.0),
        ({"min_uncertainty": 0.5}, {"threshold": None}, 0.5),
        ({"min_uncertainty": 0.5}, {"kappa": 0}, 0.5),
        ({"threshold": 3}, {"threshold": None}, 0.02),
        ({"threshold": 3, "min_uncertainty": 0.5}, {"threshold": None}, 0.5),
        ({"threshold": 3, "min_uncertainty": 0.5}, {"threshold": 0}, 0.5),
        ({"threshold": 3}, {"min_uncertainty": 0.1}, 0.1),
    ],
)
def test_a_request_gets_the_floor_that_goes_with_its_threshold(
    server: dict[str, Any], asked: dict[str, Any], floor: float
) -> None:
    policy = ErasureOptions.model_validate(asked).policy(ErasurePolicy(**server))
    assert policy.min_uncertainty == floor


@pytest.mark.parametrize("name", ErasurePolicy.model_fields)
def test_every_setting_of_a_policy_can_be_asked_for_or_is_the_servers_own(name: str) -> None:
    own = {"prior_strength", "prior_decay", "observe"}
    assert (name in ErasureOptions.model_fields) != (name in own)


@pytest.mark.parametrize(
    ("settings", "tokens", "possible"),
    [
        ({}, 100, True),
        ({"max_erasures": 0}, 100, False),
        ({"regeneration_budget": 0.0}, 100, False),
        ({"regeneration_budget": 0.1}, 9, False),
        ({"regeneration_budget": 0.1}, 10, True),
        ({"threshold": math.inf}, 100, False),
        ({"threshold": 1e6}, 100, True),
    ],
)
def test_temperature_0_needs_a_retry_temperature_only_where_something_can_be_erased(
    settings: dict[str, Any], tokens: int, possible: bool
) -> None:
    policy = ErasurePolicy(**settings)

    def request(**changes: Any) -> ResponseRequest:
        known = {"prompt_id": "p", "group_id": "g", "group_size": 1, "sample": 0, "prompt_token_ids": [1]}
        return ResponseRequest(**{**known, "max_tokens": tokens, "temperature": 0.0, "policy": policy, **changes})

    assert policy.can_erase(tokens) == possible
    request(erasable=False)
    request(policy=policy.model_copy(update={"retry_temperature": 0.5}))
    if not possible:
        request()
        return
    with pytest.raises(ValidationError, match="retry_temperature"):
        request()


@pytest.mark.parametrize(("longest", "shortest"), [(512, 4), (4, 4), (3, 3), (1, 1)])
def test_a_blank_line_is_no_segment_of_its_own_by_default(longest: int, shortest: int) -> None:
    assert DelimiterSegmentation(max_length=longest).min_length == shortest
    asked = ErasureOptions.model_validate({"segmentation": {"mode": "delimiter", "max_length": longest}})
    assert asked.policy(ErasurePolicy()).segmentation.min_length == shortest


def test_the_mean_is_the_default_and_the_papers_preset_measures_all_three_parts() -> None:
    room = {"max_response_tokens": 600, "erasure": {}}
    settings = merge(SETTINGS, {"model": {"max_length": 1024}, "rollout": room})
    assert ErasurePolicy().window == 1
    for preset in PRESETS:
        policy = build_config({**settings, "rollout": {**settings["rollout"], "erasure": {}}, "preset": preset}).rollout
        if preset == "paper":
            assert policy.erasure.window == 32
            assert min(policy.erasure.weights.model_dump().values()) > 0.0
            assert policy.erasure.gamma > 0.0
            assert policy.group_share.share == 1.0
        else:
            assert policy.erasure.window == 1
    retry = build_config({**settings, "rollout": {**settings["rollout"], "erasure": {}}, "preset": "pretrained"})
    assert retry.rollout.erasure.retry_temperature == 0.5
