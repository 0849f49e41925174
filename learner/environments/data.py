"""Prompts: from the chain task, local files or Hugging Face data sets, and the order in which training uses them."""

import hashlib
import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from common.config.data import ChainData, Data, FileData, HuggingFaceData, ReasoningGymData
from common.config.run import RunConfig
from common.seeds import derive_seed
from common.trajectory import Prompt
from learner.environments.procedural import read_problems
from learner.environments.records import BadRowError, BadRows, Record, read_records
from learner.environments.rows import Check, Row, accept, conversation, rows_of
from learner.environments.tasks import Split, chain
from learner.run.errors import InputError

log = logging.getLogger(__name__)

Note = Callable[[str], object]
"""Takes a line for the user."""


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts of one split that fit, and how many were longer than `max_prompt_tokens` and left out.

    `lengths`: tokens of each, of those that were left out too.
    """

    prompts: list[Prompt]
    dropped: int
    lengths: list[int]


def read_rows(config: RunConfig, split: Split, check: Check = accept, note: Note = log.warning) -> list[Row]:
    """All problems of a split, without a tokenizer, so that bad data is refused before anything starts.

    `check` is the reward's; `note` gets a line on the rows that are left out, if `data.on_bad_row` says so. Raises
    InputError that says what is wrong with the data, and where.
    """
    data = config.data
    if isinstance(data, ChainData):
        return _chain_rows(data, config.seed, split)
    if isinstance(data, ReasoningGymData):
        return _procedural_rows(data, config.seed, split, check, note)
    if isinstance(data, FileData):
        path = Path(data.train_path if split == "train" else data.test_path)
        source, records = str(path), read_records(path)
    else:
        source, records = _hub_records(data, config.seed, split)
    bad = BadRows(source, data.on_bad_row)
    rows, count = rows_of(records, data, split, bad, check)
    if not count:
        raise InputError(f"{source} holds no rows")
    if text := bad.conclude(count):
        note(text)
    return rows


def rows_digest(rows: Iterable[Row]) -> str:
    """SHA-256 of the rows in their order, without the columns that only the reward reads."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def tokenise(
    rows: Sequence[Row], tokenizer: Tokenizer, config: RunConfig, split: Split, note: Note = log.warning
) -> PromptSet:
    """The rows as prompts; those longer than `rollout.max_prompt_tokens` are counted and left out.

    `note` gets a line on rows that the chat template can't write, if `data.on_bad_row` leaves them out. Raises
    InputError if none is left.
    """
    limit = config.rollout.max_prompt_tokens
    data = config.data
    bad = BadRows(f"{split} prompts", data.on_bad_row if isinstance(data, FileData | HuggingFaceData) else None)
    texts: list[str] = []
    kept: list[Row] = []
    for row in rows:
        try:
            texts.append(_model_text(row, tokenizer, template_options(data)))
            kept.append(row)
        except BadRowError as error:
            bad.add(row.place or f"prompt {row.id!r}", str(error))
    if text := bad.conclude(len(rows)):
        note(text)
    # A chat template writes the special tokens itself.
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=kept[0].messages is None)["input_ids"]
    prompts = [
        Prompt(id=row.id, text=row.text, token_ids=ids, answer=row.answer, columns=row.columns)
        for row, ids in zip(kept, encoded, strict=True)
        if 0 < len(ids) <= limit
    ]
    if not prompts:
        raise InputError(
            f"none of the {len(kept)} {split} prompts fits into rollout.max_prompt_tokens ({limit}): "
            f"the shortest has {min(map(len, encoded))} tokens"
        )
    return PromptSet(prompts, len(kept) - len(prompts), list(map(len, encoded)))


def template_options(data: Data) -> Mapping[str, Any]:
    """What the chat template gets besides the messages."""
    return {} if isinstance(data, ChainData) else data.chat_template_kwargs


def check_template_options(tokenizer: Any, data: Data) -> None:
    """Raise InputError if the chat template does not read one of `data.chat_template_kwargs`."""
    templates = tokenizer.chat_template or ""
    text = "\n".join(templates.values()) if isinstance(templates, dict) else str(templates)
    unknown = [name for name in template_options(data) if not re.search(rf"\b{re.escape(name)}\b", text)]
    if unknown:
        raise InputError(
            f"data.chat_template_kwargs: the tokenizer's chat template does not read {', '.join(unknown)}"
            + ("" if text else "; the tokenizer has no chat template")
        )


def _model_text(row: Row, tokenizer: Tokenizer, options: Mapping[str, Any]) -> str:
    if row.messages is None:
        return row.text
    try:
        text = tokenizer.apply_chat_template(row.messages, tokenize=False, add_generation_prompt=True, **options)
    except Exception as error:
        message = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BadRowError(f"the tokenizer's chat template fails ({message}); data.chat: false leaves it out") from error
    return cast(str, text)


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


def _procedural_rows(data: ReasoningGymData, seed: int, split: Split, check: Check, note: Note) -> list[Row]:
    problems = read_problems(data, seed)
    entries = problems.train if split == "train" else problems.test
    if split == "train":
        note(problems.description)
    bad = BadRows(problems.description, None)
    rows = []
    for number, entry in enumerate(entries):
        place = f"{split} problem {number}"
        try:
            text, messages = conversation(entry["question"], data, "the question")
            # Where several answers are right, the task names none.
            answer = "" if entry["answer"] is None else str(entry["answer"])
            row = Row(f"{split}-{number}", text, answer, messages, entry, place)
            check(row)
            rows.append(row)
        except BadRowError as error:
            bad.add(place, str(error))
    bad.conclude(len(entries))
    return rows


def _hub_records(data: HuggingFaceData, seed: int, split: Split) -> tuple[str, Iterator[Record]]:
    """Where the split's records come from, and the records in their order."""
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
    records = (Record(number, f"row {index + 1}", table[index]) for number, index in enumerate(order))
    return f"data set {data.name!r}, split {name!r}", records


def _load_hub(data: HuggingFaceData, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(data.name, data.subset, split=split, revision=data.revision)
    except Exception as error:
        # The hub, the cache and each loader raise their own kinds; all of them mean that this name gives no data.
        raise InputError(f"data set {data.name!r}, split {split!r} can't be loaded: {error}") from error


class PromptStream:
    """The order in which training comes to prompts: epochs, each shuffled by its own seed, one after the other."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, prompts_per_step: int) -> None:
        if len(prompts) < prompts_per_step:
            raise InputError(
                f"{len(prompts)} train prompts are fewer than rollout.groups_per_step ({prompts_per_step})"
            )
        self._prompts = prompts
        self._seed = seed
        self._orders: dict[int, list[int]] = {}

    def __len__(self) -> int:
        """Prompts of an epoch."""
        return len(self._prompts)

    def at(self, number: int) -> Prompt:
        """The prompt whose turn comes after `number` others, with its place in its epoch's order."""
        epoch, position = divmod(number, len(self._prompts))
        return self._prompts[self._order(epoch)[position]].model_copy(update={"position": position})

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(len(self._prompts)))
            random.Random(derive_seed(self._seed, "epoch", epoch)).shuffle(order)
            # Turns of two epochs may be asked for alternately, never of more.
            self._orders = {known: self._orders[known] for known in self._orders if abs(known - epoch) == 1}
            self._orders[epoch] = order
        return self._orders[epoch]
