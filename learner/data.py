"""Prompts: from the chain task, local files or Hugging Face data sets, and the order in which training uses them."""

import hashlib
import json
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

from common.config.data import ChainData, ColumnMapping, FileData, HuggingFaceData
from common.config.run import RunConfig
from common.seeds import derive_seed
from common.trajectory import Prompt
from learner.errors import InputError
from learner.tasks import Split, chain

Messages = list[dict[str, str]]


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Row:
    """A problem as the data set holds it: before the chat template and the tokenizer.

    `messages` is null for a task without a chat template; then `text` is what the model sees. `columns`: all of the
    row, for the reward.
    """

    id: str
    text: str
    answer: str
    messages: Messages | None = None
    columns: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts of one split that fit, and how many were longer than `max_prompt_tokens` and left out."""

    prompts: list[Prompt]
    dropped: int


def read_rows(config: RunConfig, split: Split) -> list[Row]:
    """All problems of a split, without a tokenizer, so that bad data is refused before anything starts.

    Raises InputError that says what is wrong with the data, and where.
    """
    data = config.data
    if isinstance(data, ChainData):
        return _chain_rows(data, config.seed, split)
    if isinstance(data, FileData):
        path = Path(data.train_path if split == "train" else data.test_path)
        records = list(_read_file(path))
        return _rows(records, data.columns, data.chat, data.system_prompt, str(path), split)
    return _hub_rows(data, config.seed, split)


def with_columns(rows: Iterable[Row], names: Collection[str] | None) -> list[Row]:
    """The rows with these of their columns only; None keeps all."""
    if names is None:
        return list(rows)
    return [replace(row, columns={k: v for k, v in row.columns.items() if k in names}) for row in rows]


def rows_digest(rows: Iterable[Row]) -> str:
    """SHA-256 of the rows in their order, without the columns that only the reward reads."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def tokenise(rows: Sequence[Row], tokenizer: Tokenizer, max_prompt_tokens: int, split: Split) -> PromptSet:
    """The rows as prompts; those longer than the limit are counted and left out.

    Raises InputError if none is left.
    """
    texts = [_model_text(row, tokenizer) for row in rows]
    chat = rows[0].messages is not None
    # A chat template writes the special tokens itself.
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=not chat)["input_ids"]
    prompts = [
        Prompt(id=row.id, text=row.text, token_ids=ids, answer=row.answer, columns=row.columns)
        for row, ids in zip(rows, encoded, strict=True)
        if 0 < len(ids) <= max_prompt_tokens
    ]
    if not prompts:
        raise InputError(
            f"none of the {len(rows)} {split} prompts fits into rollout.max_prompt_tokens ({max_prompt_tokens}): "
            f"the shortest has {min(map(len, encoded))} tokens"
        )
    return PromptSet(prompts, dropped=len(rows) - len(prompts))


def _model_text(row: Row, tokenizer: Tokenizer) -> str:
    if row.messages is None:
        return row.text
    try:
        return cast(str, tokenizer.apply_chat_template(row.messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:
        raise InputError(
            f"prompt {row.id!r}: the tokenizer's chat template fails ({error}); data.chat=false leaves it out"
        ) from error


def _chain_rows(data: ChainData, seed: int, split: Split) -> list[Row]:
    count = data.train_problems if split == "train" else data.test_problems
    try:
        problems = chain.generate(derive_seed(seed, "data", split), split, count, data.length)
    except ValueError as error:
        raise InputError(f"data: {error}") from error
    return [
        Row(id=f"{split}-{index}", text=problem.prompt, answer=problem.solution)
        for index, problem in enumerate(problems)
    ]


def _read_file(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"data file {path} does not exist" if not path.exists() else f"{path} is not a file")
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix in (".jsonl", ".ndjson"):
        yield from _read_jsonl(path)
    else:
        raise InputError(f"data file {path}: the name must end in .jsonl or .parquet, not {path.suffix!r}")


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _json_record(line, f"{path}, line {number}")
    except OSError as error:
        raise InputError(f"data file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"data file {path} is not UTF-8 text: {error}") from error


def _json_record(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not valid JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise InputError(f"{place}: expected an object with columns, found {type(record).__name__}")
    return record


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"data file {path} can't be read as Parquet: {error}") from error
    yield from table.to_pylist()


def _hub_rows(data: HuggingFaceData, seed: int, split: Split) -> list[Row]:
    held_out = split == "test" and data.test_split is None
    name = data.train_split if split == "train" or held_out else cast(str, data.test_split)
    table = _load_hub(data, name)
    order = list(range(len(table)))
    if data.test_split is None:
        if len(order) <= data.test_problems:
            raise InputError(
                f"data set {data.name!r}, split {name!r}: data.test_problems ({data.test_problems}) holds out all of "
                f"its {len(order)} rows; lower it or name data.test_split"
            )
        random.Random(derive_seed(seed, "held-out problems")).shuffle(order)
        order = order[: data.test_problems] if held_out else order[data.test_problems :]
    elif split == "test":
        order = order[: data.test_problems]
    if split == "train" and data.max_train_problems is not None:
        order = order[: data.max_train_problems]
    place = f"data set {data.name!r}, split {name!r}"
    return _rows([table[i] for i in order], data.columns, data.chat, data.system_prompt, place, split)


def _load_hub(data: HuggingFaceData, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(data.name, data.subset, split=split, revision=data.revision)
    except Exception as error:
        # The hub, the cache and each loader raise their own kinds; all of them mean that this name gives no data.
        raise InputError(f"data set {data.name!r}, split {split!r} can't be loaded: {error}") from error


def _rows(
    records: Sequence[dict[str, Any]],
    columns: ColumnMapping,
    chat: bool,
    system_prompt: str | None,
    place: str,
    split: Split,
) -> list[Row]:
    if not records:
        raise InputError(f"{place} holds no rows")
    rows = []
    for number, record in enumerate(records, start=1):
        where = f"{place}, row {number}"
        identity = f"{split}-{number - 1}" if columns.id is None else str(_column(record, columns.id, where))
        prompt = _column(record, columns.prompt, where)
        answer = _column(record, columns.answer, where)
        if not isinstance(answer, str | int | float):
            raise InputError(
                f"{where}: column {columns.answer!r} must hold text or a number, not {type(answer).__name__}"
            )
        text, messages = _conversation(prompt, chat, system_prompt, f"{where}: column {columns.prompt!r}")
        rows.append(Row(identity, text, str(answer), messages, record))
    ids = {row.id for row in rows}
    if len(ids) < len(rows):
        raise InputError(f"{place}: column {columns.id!r} has {len(ids)} distinct values in {len(rows)} rows")
    return rows


def _column(record: dict[str, Any], name: str, where: str) -> Any:
    if name not in record:
        raise InputError(f"{where}: no column {name!r}; the columns are {', '.join(sorted(record))}")
    return record[name]


def _conversation(prompt: Any, chat: bool, system_prompt: str | None, where: str) -> tuple[str, Messages | None]:
    """The prompt's text, and its messages where a chat template applies. A prompt may be a list of messages."""
    if isinstance(prompt, str) and prompt.strip():
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        return prompt, [*system, {"role": "user", "content": prompt}] if chat else None
    if isinstance(prompt, list) and prompt and all(_is_message(item) for item in prompt):
        if not chat:
            raise InputError(f"{where} holds chat messages, which need data.chat=true")
        return str(prompt[-1]["content"]), [{"role": m["role"], "content": m["content"]} for m in prompt]
    raise InputError(f"{where} must hold text or a list of chat messages, found {prompt!r:.80}")


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)


class PromptStream:
    """The order in which training draws prompts: epochs, each shuffled by its own seed.

    A draw that no longer fits into an epoch begins the next one, so that no prompt is twice in one step. The place
    (`epoch`, `position`) is all there is to a checkpoint: every prompt before it was trained on, none after it.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, prompts_per_draw: int) -> None:
        if len(prompts) < prompts_per_draw:
            raise InputError(
                f"{len(prompts)} train prompts are fewer than rollout.groups_per_step ({prompts_per_draw})"
            )
        self._prompts = prompts
        self._seed = seed
        self._count = prompts_per_draw
        self.epoch = 0
        self.position = 0

    def draw(self) -> list[Prompt]:
        """The next prompts, each with its place in the epoch's order."""
        if self.position + self._count > len(self._prompts):
            self.epoch += 1
            self.position = 0
        order = self._order()
        start = self.position
        self.position += self._count
        return [
            self._prompts[order[place]].model_copy(update={"position": place}) for place in range(start, self.position)
        ]

    def restore(self, epoch: int, position: int) -> None:
        """Go back to a place that a checkpoint recorded."""
        self.epoch, self.position = epoch, position

    def _order(self) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(derive_seed(self._seed, "epoch", self.epoch)).shuffle(order)
        return order
