"""Trajectories as Parquet, one row a response, and back: the schema of `common/trajectory.py`, nothing lost."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from numpy.typing import NDArray

from common.config import ErasurePolicy
from common.packed import (
    ERASED,
    HAS_BASELINE,
    HAS_COLUMN,
    HAS_THRESHOLD,
    JUDGED,
    VALUES,
    Fetch,
    Floats,
    Group,
    PackedResponse,
    TokenArrays,
    fetched,
    no_fetch,
)
from common.trajectory import MEASURED, Prompt, Trajectory
from learner.run.run_directory import replacing

ROW_GROUP_TOKENS = 1_000_000

Row = tuple[Prompt, PackedResponse]

_INTEGERS = pa.list_(pa.int32())
_NUMBERS = pa.list_(pa.float64())

_STATISTICS = pa.struct(
    [(name, pa.float64()) for name in ("count", "mean", "variance", "prior_strength", "prior_mean", "prior_variance")]
)
_HISTORY = pa.struct([(name, pa.float64()) for name in ("uncertainty", "mean", "deviation")])
_JUDGEMENT = pa.struct(
    [
        *((name, pa.float64()) for name in MEASURED),
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


def write_trajectories(path: Path, step: int, groups: Sequence[Group], fetch: Fetch = no_fetch) -> None:
    """Write a step's responses, with every attempt of theirs. `fetch`: what gives the arrays that are elsewhere."""
    rows = [(group.prompt, response) for group in groups for response in group.trajectories]
    with replacing(path) as partial, parquet.ParquetWriter(partial, SCHEMA, compression="zstd") as writer:
        for part in _row_groups(rows):
            tokens = fetched([response for _, response in part], fetch)
            writer.write_table(_table(step, part, tokens))


def read_trajectories(path: Path) -> list[Trajectory]:
    """The responses in a file, as they were when they were written."""
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return [_trajectory(row) for row in rows]


def _row_groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of at most about `ROW_GROUP_TOKENS` together, so that a step of any size is written in little memory."""
    part: list[Row] = []
    tokens = 0
    for row in rows:
        part.append(row)
        tokens += row[1].generated_tokens
        if tokens >= ROW_GROUP_TOKENS:
            yield part
            part, tokens = [], 0
    if part:
        yield part


def _table(step: int, rows: Sequence[Row], tokens: Sequence[TokenArrays]) -> pa.Table:
    responses = [response for _, response in rows]
    prompts = [arrays.prompt_token_ids for arrays in tokens]
    columns: dict[str, Any] = {
        "step": [step] * len(rows),
        "prompt": [prompt.text for prompt, _ in rows],
        "answer": [prompt.answer for prompt, _ in rows],
        "prompt_position": [prompt.position for prompt, _ in rows],
        "policy": [None if r.policy is None else r.policy.model_dump_json() for r in responses],
        "prompt_token_ids": _lists([len(prompt) for prompt in prompts], np.concatenate(prompts), pa.int32()),
        "attempts": _attempts(responses, tokens),
    }
    arrays = []
    for column in SCHEMA:
        values = columns.get(column.name)
        if values is None:
            values = [getattr(response, column.name) for response in responses]
        arrays.append(values if isinstance(values, pa.Array) else pa.array(values, column.type))
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _attempts(responses: Sequence[PackedResponse], tokens: Sequence[TokenArrays]) -> pa.Array:
    """The column `attempts`: all attempts of all responses as one array of each field, cut into lists by offsets."""
    tables = [response.attempts for response in responses]
    numbers = np.concatenate([table.numbers for table in tables])
    flags = np.concatenate([table.flags for table in tables])
    values = np.concatenate([table.values for table in tables])
    spans = np.concatenate([table.spans for table in tables])
    counts = np.concatenate([np.bincount(table.spans[:, 0], minlength=len(table)) for table in tables])
    lengths = np.concatenate([table.lengths for table in tables])
    number = {name: values[:, place] for place, name in enumerate(VALUES)}
    fields: dict[str, pa.Array] = {
        name: pa.array(numbers[:, place]) for place, name in enumerate(("segment", "attempt", "start", "end"))
    }
    fields["token_ids"] = _lists(lengths, np.concatenate([arrays.token_ids for arrays in tokens]), pa.int32())
    for name, flag in HAS_COLUMN.items():
        own = [_present(r, getattr(arrays, name), flag) for r, arrays in zip(responses, tokens, strict=True)]
        fields[name] = _lists(np.where(flags & flag, lengths, 0), np.concatenate(own), pa.float64())
    fields["temperature"] = pa.array(number["temperature"])
    span = pa.StructArray.from_arrays(
        [pa.array(spans[:, place].astype(type_)) for place, type_ in ((1, np.int32), (2, np.int32), (3, np.int64))],
        fields=list(_ATTEMPT.field("versions").type.value_type),
    )
    fields["versions"] = pa.ListArray.from_arrays(_offsets(counts), span, type=_ATTEMPT.field("versions").type)
    fields["verdict"] = pa.array(["accepted", "erased"]).take(pa.array((flags & ERASED).astype(np.int8)))
    fields["judgement"] = _judgements(flags, number)
    attempts = pa.StructArray.from_arrays([fields[field.name] for field in _ATTEMPT], fields=list(_ATTEMPT))
    return pa.ListArray.from_arrays(_offsets([len(table) for table in tables]), attempts)


def _judgements(flags: NDArray[np.uint8], number: Mapping[str, NDArray[np.float64]]) -> pa.Array:
    missing = {"baseline": flags & HAS_BASELINE == 0, "threshold": flags & HAS_THRESHOLD == 0}
    unjudged = flags & JUDGED == 0
    fields: list[pa.Array] = []
    for field in _JUDGEMENT:
        if pa.types.is_struct(field.type):
            inner = [pa.array(number[f"{field.name}.{part.name}"]) for part in field.type]
            fields.append(pa.StructArray.from_arrays(inner, fields=list(field.type)))
        elif pa.types.is_integer(field.type):
            whole = np.where(unjudged, 0.0, number[field.name]).astype(np.int32)
            fields.append(pa.array(whole, field.type))
        else:
            fields.append(pa.array(number[field.name], field.type, mask=missing.get(field.name)))
    return pa.StructArray.from_arrays(fields, fields=list(_JUDGEMENT), mask=pa.array(unjudged))


def _present(response: PackedResponse, values: Floats, flag: int) -> Floats:
    """Of a per-token column what belongs to attempts that have it."""
    has = response.attempts.having(flag)
    if has.all() or not values.size:
        return values
    return values[np.repeat(has, response.attempts.lengths)]


def _lists(lengths: Any, values: NDArray[Any], type_: pa.DataType) -> pa.Array:
    return pa.ListArray.from_arrays(_offsets(lengths), pa.array(values.astype(type_.to_pandas_dtype()), type_))


def _offsets(lengths: Any) -> pa.Array:
    return pa.array(np.concatenate(([0], np.cumsum(lengths))), pa.int32())


def _trajectory(row: dict[str, Any]) -> Trajectory:
    fields = {key: value for key, value in row.items() if key not in _OF_THE_FILE_ONLY}
    policy = fields.pop("policy")
    fields["policy"] = None if policy is None else ErasurePolicy.model_validate_json(policy)
    return Trajectory.model_validate(fields)
