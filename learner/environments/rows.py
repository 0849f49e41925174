"""Rows: problems as a data set holds them, from its records by the column mapping."""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from common.config.data import FileData, HuggingFaceData, ReasoningGymData
from learner.environments.records import BadRowError, BadRows, Record, check_text, json_kind

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Row:
    """A problem as the data set holds it: before the chat template and the tokenizer.

    `messages` is null for a task without a chat template; then `text` is what the model sees. `columns`: all of the
    row, for the reward. `place`: where the row stands in its source.
    """

    id: str
    text: str
    answer: str
    messages: Messages | None = None
    columns: dict[str, Any] = field(default_factory=dict, repr=False)
    place: str = field(default="", repr=False, compare=False)


Check = Callable[[Row], None]
"""Raises BadRowError for a row that the reward can't work with."""


def accept(row: Row) -> None:
    """The check of a reward that works with every row."""


def with_columns(rows: Iterable[Row], names: Collection[str] | None) -> list[Row]:
    """The rows with these of their columns only; None keeps all."""
    if names is None:
        return list(rows)
    return [replace(row, columns={k: v for k, v in row.columns.items() if k in names}) for row in rows]


def rows_of(
    records: Iterable[Record], data: FileData | HuggingFaceData, split: str, bad: BadRows, check: Check
) -> tuple[list[Row], int]:
    """The rows that can be used, and the number of records; those that can't be used are added to `bad`."""
    rows: list[Row] = []
    known: set[str] = set()
    count = 0
    for record in records:
        count += 1
        try:
            row = _row(record, data, split)
            if row.id in known:
                raise BadRowError(f"column {data.columns.id!r} repeats the value of an earlier row")
            check(row)
        except BadRowError as error:
            bad.add(record.place, str(error))
        else:
            known.add(row.id)
            rows.append(row)
    return rows, count


def _row(record: Record, data: FileData | HuggingFaceData, split: str) -> Row:
    if record.fault is not None:
        raise BadRowError(record.fault)
    names = data.columns
    text, messages = conversation(_column(record, names.prompt), data, f"column {names.prompt!r}")
    answer = _answer(_column(record, names.answer), f"column {names.answer!r}")
    identity = f"{split}-{record.number}"
    if names.id is not None:
        identity = _identity(_column(record, names.id), f"column {names.id!r}")
    return Row(identity, text, answer, messages, record.columns, record.place)


def _column(record: Record, name: str) -> Any:
    """A column's value; dots lead into columns that hold objects, if no column has the whole name."""
    if name in record.columns:
        return record.columns[name]
    found: Any = record.columns
    passed = ""
    for part in name.split("."):
        if not isinstance(found, dict):
            raise BadRowError(f"no column {name!r}: {passed!r} is no object but {json_kind(found)}")
        if part not in found:
            there = ", ".join(sorted(map(str, found)))
            raise BadRowError(
                f"no column {name!r}; {f'in {passed!r} there are' if passed else 'the columns are'} {there}"
            )
        found = found[part]
        passed = f"{passed}.{part}" if passed else part
    return found


def _answer(value: Any, what: str) -> str:
    """A reference answer as text. Numbers are written as Python writes them."""
    if isinstance(value, str):
        return check_text(value, what)
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise BadRowError(f"{what} holds NaN or a number beyond all limits, which is no answer; text would be kept")
        return str(value)
    raise BadRowError(f"{what} must hold text or a number, not {json_kind(value)}")


def _identity(value: Any, what: str) -> str:
    if isinstance(value, str) and value:
        return check_text(value, what)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise BadRowError(f"{what} must hold text or a whole number, not {json_kind(value) if value != '' else 'nothing'}")


def conversation(
    prompt: Any, data: FileData | HuggingFaceData | ReasoningGymData, what: str
) -> tuple[str, Messages | None]:
    """The prompt's text, and its messages where a chat template applies. A prompt may be a list of messages."""
    if isinstance(prompt, str) and prompt.strip():
        check_text(prompt, what)
        system = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
        return prompt, [*system, {"role": "user", "content": prompt}] if data.chat else None
    if isinstance(prompt, list) and prompt and all(_is_message(item) for item in prompt):
        if not data.chat:
            raise BadRowError(f"{what} holds chat messages, which need data.chat: true")
        messages = [{key: check_text(message[key], what) for key in ("role", "content")} for message in prompt]
        return messages[-1]["content"], messages
    found = "empty text" if isinstance(prompt, str) else json_kind(prompt)
    raise BadRowError(f"{what} must hold text or a list of messages with a role and content, not {found}")


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
