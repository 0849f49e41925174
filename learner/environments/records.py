"""Records of data files, each with its place, and the account of those that can't be used."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from learner.run.errors import InputError

NAMED_PLACES = 3
NAMED_REASONS = 5
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Record:
    """One record: its number from 0, where it stands, and its columns; or the reason why it has none."""

    number: int
    place: str
    columns: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None


class BadRowError(ValueError):
    """A row that can't be used. The message is the reason, without the place and without values of the row."""


@dataclass(slots=True)
class BadRows:
    """The rows of one source that can't be used, by reason. `policy`: `data.on_bad_row`; null for data without it."""

    source: str
    policy: Literal["fail", "skip"] | None
    places: dict[str, list[str]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(map(len, self.places.values()))

    def add(self, place: str, reason: str) -> None:
        self.places.setdefault(reason, []).append(place)

    def conclude(self, rows: int) -> str:
        """What to tell of them, empty if there are none. Raises InputError unless they may be skipped, and not all."""
        if not self.count:
            return ""
        text = f"{self.source}: {self.count} of {rows} rows can't be used: {'; '.join(self._reasons())}"
        if self.policy is None:
            raise InputError(text)
        if self.policy == "fail":
            raise InputError(f"{text}. data.on_bad_row: skip would leave them out")
        if self.count == rows:
            raise InputError(f"{text}. None is left")
        return f"{text}. They are left out (data.on_bad_row: skip)"

    def _reasons(self) -> Iterator[str]:
        for reason, places in list(self.places.items())[:NAMED_REASONS]:
            more = f" and {len(places) - NAMED_PLACES} more" if len(places) > NAMED_PLACES else ""
            yield f"{reason} ({', '.join(places[:NAMED_PLACES])}{more})"
        if len(self.places) > NAMED_REASONS:
            rest = list(self.places.values())[NAMED_REASONS:]
            yield f"{len(rest)} more reasons ({sum(map(len, rest))} rows)"


def read_records(path: Path) -> Iterator[Record]:
    """The records of a `.jsonl`, `.ndjson` or `.parquet` file. Raises InputError if the file can't be read at all."""
    if not path.is_file():
        raise InputError(f"data file {path} does not exist" if not path.exists() else f"{path} is not a file")
    if path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.suffix in (".jsonl", ".ndjson"):
        yield from _json_lines(path)
    else:
        raise InputError(f"data file {path}: the name must end in .jsonl or .parquet, not {path.suffix!r}")


def check_text(text: str, what: str) -> str:
    """The text. Raises BadRowError if it holds half of a surrogate pair, which no tokenizer and no file takes."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise BadRowError(f"{what} holds half of a surrogate pair (such as \\ud800), which is no character")
    return text


def _json_lines(path: Path) -> Iterator[Record]:
    number = 0
    try:
        with path.open("rb") as lines:
            for line_number, line in enumerate(lines, start=1):
                # Some editors begin UTF-8 files with a byte order mark.
                content = line.removeprefix(_BYTE_ORDER_MARK) if line_number == 1 else line
                if content.strip():
                    yield _json_record(content, number, f"line {line_number}")
                    number += 1
    except OSError as error:
        raise InputError(f"data file {path}: {error.strerror or error}") from error


def _json_record(line: bytes, number: int, place: str) -> Record:
    try:
        found = json.loads(line.decode())
    except UnicodeDecodeError:
        return Record(number, place, fault="it is not UTF-8 text")
    except json.JSONDecodeError as error:
        return Record(number, place, fault=f"it is not valid JSON ({error.msg})")
    except (ValueError, RecursionError) as error:
        # A whole number of thousands of digits, or thousands of brackets.
        return Record(number, place, fault=f"it is not valid JSON ({type(error).__name__})")
    if not isinstance(found, dict):
        return Record(number, place, fault=f"it is not an object with columns but {json_kind(found)}")
    return Record(number, place, found)


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"data file {path} can't be read as Parquet: {error}") from error
    for number, columns in enumerate(table.to_pylist()):
        yield Record(number, f"row {number + 1}", columns)


def json_kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return "text"
        case int() | float():
            return "a number"
        case list():
            return "a list"
        case dict():
            return "an object"
    return f"a value of kind {type(value).__name__}"
