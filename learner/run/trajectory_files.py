"""Trajectories as Parquet, one row a response, and back: the schema of `common/trajectory.py`, nothing lost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from common.config import ErasurePolicy
from common.trajectory import Group, Trajectory
from learner.run.run_directory import replacing

_INTEGERS = pa.list_(pa.int32())
_NUMBERS = pa.list_(pa.float64())

_STATISTICS = pa.struct(
    [(name, pa.float64()) for name in ("count", "mean", "variance", "prior_strength", "prior_mean", "prior_variance")]
)
_HISTORY = pa.struct([(name, pa.float64()) for name in ("uncertainty", "mean", "deviation")])
_JUDGEMENT = pa.struct(
    [
        *(
            (name, pa.float64())
            for name in (
                "uncertainty",
                "base",
                "extreme",
                "gradient",
                "baseline",
                "penalty",
                "modulation",
                "threshold",
            )
        ),
        ("statistics", _STATISTICS),
        ("history", _HISTORY),
        ("erased_tokens_before", pa.int32()),
    ]
)
_ATTEMPT = pa.struct(
    [
        ("segment", pa.int32()),
        ("attempt", pa.int32()),
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("token_ids", _INTEGERS),
        ("logprobs", _NUMBERS),
        ("behaviour_logprobs", _NUMBERS),
        ("signal", _NUMBERS),
        ("temperature", pa.float64()),
        (
            "versions",
            pa.list_(pa.struct([("start", pa.int32()), ("end", pa.int32()), ("version", pa.int64())])),
        ),
        ("verdict", pa.string()),
        ("judgement", _JUDGEMENT),
    ]
)
SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("prompt_position", pa.int64()),
        ("prompt_id", pa.string()),
        ("group_id", pa.string()),
        ("sample", pa.int32()),
        ("seed", pa.int64()),
        ("erasable", pa.bool_()),
        ("finish_reason", pa.string()),
        ("reward", pa.float64()),
        ("text", pa.string()),
        ("generated_tokens", pa.int32()),
        ("erased_tokens", pa.int32()),
        ("erasures", pa.int32()),
        ("reused_prefix_tokens", pa.int32()),
        ("erased_token_limit", pa.int32()),
        ("prompt_token_ids", _INTEGERS),
        ("policy", pa.string()),
        ("attempts", pa.list_(_ATTEMPT)),
    ]
)
"""The columns. `policy` is the erasure policy as JSON, null where a response was not monitored."""

_OF_THE_FILE_ONLY = (
    "step",
    "prompt",
    "answer",
    "prompt_position",
    "generated_tokens",
    "erased_tokens",
    "erasures",
)


def write_trajectories(path: Path, step: int, groups: Sequence[Group]) -> None:
    """Write a step's responses, with every attempt of theirs."""
    rows = [_row(step, group, trajectory) for group in groups for trajectory in group.trajectories]
    with replacing(path) as partial:
        parquet.write_table(pa.Table.from_pylist(rows, SCHEMA), partial, compression="zstd")


def read_trajectories(path: Path) -> list[Trajectory]:
    """The responses in a file, as they were when they were written."""
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return [_trajectory(row) for row in rows]


def _row(step: int, group: Group, trajectory: Trajectory) -> dict[str, Any]:
    policy = trajectory.policy
    return trajectory.model_dump() | {
        "policy": None if policy is None else policy.model_dump_json(),
        "step": step,
        "prompt": group.prompt.text,
        "answer": group.prompt.answer,
        "prompt_position": group.prompt.position,
        "generated_tokens": trajectory.generated_tokens,
        "erased_tokens": trajectory.erased_tokens,
        "erasures": trajectory.erasures,
    }


def _trajectory(row: dict[str, Any]) -> Trajectory:
    fields = {key: value for key, value in row.items() if key not in _OF_THE_FILE_ONLY}
    policy = fields.pop("policy")
    fields["policy"] = None if policy is None else ErasurePolicy.model_validate_json(policy)
    return Trajectory.model_validate(fields)
