"""A small training configuration, for tests that need one."""

from typing import Any

from common.config import RunConfig, build_config
from common.config.loading import merge

SETTINGS: dict[str, Any] = {
    "name": "test",
    "steps": 4,
    "model": {"path": "model", "max_length": 256},
    "rollout": {
        "groups_per_step": 2,
        "responses_per_group": 4,
        "max_prompt_tokens": 80,
        "max_response_tokens": 80,
        "erasure": {"segmentation": {"mode": "delimiter", "max_length": 16}},
    },
}


def run_config(**changes: Any) -> RunConfig:
    """`SETTINGS` with `changes` laid upon them, key by key."""
    return build_config(merge(SETTINGS, changes))
