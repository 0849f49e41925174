"""`--dry-run`: everything of a run that can be checked and shown without an engine, and without the network."""

import asyncio
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from common.config import RunConfig, dump_yaml
from common.config.data import FunctionReward, HuggingFaceData
from common.sentinels import model_sentinels
from learner.environments.data import PromptSet, read_rows
from learner.environments.problems import check_tokenizer, make_problems, make_prompt_sets
from learner.environments.rewards import Reading, make_rewards, row_check
from learner.environments.rows import Row, with_columns
from learner.environments.tasks import SPLITS, Split
from learner.evaluation.comparison import comparison_baselines
from learner.policy.model_directory import check_model, is_hub_name, is_made_first, load_tokenizer
from learner.run.errors import InputError
from learner.run.fork import check_fork
from learner.run.run_directory import check_resumable, write_dry_run
from learner.run.sizes import derived_sizes

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
"""A dry run loads nothing down: what is in the caches of the hub is checked, the rest is said to be unchecked."""
SHOWN_PROMPT_LINES = 40


@dataclass(slots=True)
class Findings:
    """What is wrong, what could not be checked and why, and what there is to show."""

    wrong: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    shown: list[tuple[str, str]] = field(default_factory=list)

    @contextmanager
    def checking(self, unchecked: str = "") -> Iterator[None]:
        """Collect what is wrong in the block; with `unchecked` it is only said that it could not be checked."""
        try:
            yield
        except InputError as error:
            text = f"{unchecked}: {error}" if unchecked else str(error)
            told = self.unchecked if unchecked else self.wrong
            # Both splits may fail of the same file.
            if text not in told:
                told.append(text)


def dry_run(config: RunConfig, *, resume: bool = False, compare: bool = False, source: Path | None = None) -> list[str]:
    """Print the resolved configuration and what it comes to; returns what is wrong, a line each.

    If nothing is wrong, the configuration is left in the run's directory, unless that is in use. `source`: the run that
    is to be forked.
    """
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    found = Findings()
    with found.checking():
        if resume:
            check_resumable(config)
        elif source is not None:
            check_fork(source, config)
    with found.checking():
        if compare:
            comparison_baselines(config)
    found.shown += derived_sizes(config)
    tokenizer = _model(config, found)
    rows = _rows(config, found)
    rows = _reward(config, rows, found)
    if tokenizer is not None and rows is not None:
        _prompts(config, tokenizer, rows, found)
    print(dump_yaml(config), end="")
    for name, value in found.shown:
        _print(name, value)
    for text in found.unchecked:
        _print("NOT CHECKED", text)
    if not found.wrong:
        written = write_dry_run(config)
        print(f"# written to {written}" if written else "# not written: the run's directory already holds a run")
    return found.wrong


def _model(config: RunConfig, found: Findings) -> Any:
    """The tokenizer, if there is one to be read."""
    path = config.model.path
    if is_made_first(config):
        found.unchecked.append(f"model.path: {path} is not there yet; the run makes it first (model.warm_start)")
        from learner.warm_start import build_tokenizer

        return build_tokenizer()
    if is_hub_name(path) and _cached(config) is None:
        found.unchecked.append(
            f"model.path: {path} is no directory here, and not in this machine's Hugging Face cache: a run would load "
            "it down. Neither its tokenizer, chat template, sentinels and positions nor the lengths of the prompts and "
            "the memory were checked"
        )
        return None
    tokenizer = None
    with found.checking(f"model.path: of {path} only a part is in the cache" if is_hub_name(path) else ""):
        check_model(config)
        tokenizer = load_tokenizer(config)
        found.shown.append(("sentinels", str(model_sentinels(config.model))))
        _memory(config, found)
    if tokenizer is not None:
        with found.checking():
            check_tokenizer(config, tokenizer)
    return tokenizer


def _cached(config: RunConfig) -> Path | None:
    """The directory of a hub's model in the cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(config.model.path, "config.json", revision=config.model.revision)
    return Path(file).parent if isinstance(file, str) else None


def _memory(config: RunConfig, found: Findings) -> None:
    from learner.planning.machine import gpu_memory, memory_lines
    from learner.planning.shape import read_shape

    found.shown += memory_lines(config, read_shape(config.model), gpu_memory())


def _rows(config: RunConfig, found: Findings) -> dict[Split, list[Row]] | None:
    """The rows of both splits; None if one of them can't be read."""
    rows: dict[Split, list[Row]] = {}
    check = row_check(config.reward)
    for split in SPLITS:
        with found.checking(_not_cached(config)):
            rows[split] = read_rows(config, split, check, lambda text: found.shown.append(("data", text)))
    return rows if len(rows) == len(SPLITS) else None


def _not_cached(config: RunConfig) -> str:
    """What to say if a data set that may be on the hub can't be loaded; empty if it is to be here."""
    data = config.data
    if not isinstance(data, HuggingFaceData) or not _offline() or Path(data.name).exists():
        return ""
    return "data: the data set may not be in this machine's cache, and a dry run loads nothing down"


def _offline() -> bool:
    return all(os.environ.get(name) == value for name, value in OFFLINE.items())


def _reward(config: RunConfig, rows: dict[Split, list[Row]] | None, found: Findings) -> dict[Split, list[Row]] | None:
    """Load the reward; the rows with the columns that it reads."""
    columns = None if rows is None else {name for split in rows.values() for row in split for name in row.columns}

    async def load() -> Reading:
        rewards = make_rewards(config.reward, columns, config.data)
        try:
            return await rewards.start()
        finally:
            await rewards.close()

    with found.checking():
        reading = asyncio.run(load())
        name = config.reward.function if isinstance(config.reward, FunctionReward) else config.reward.kind
        found.shown.append(("reward", f"{name} reads {reading.text}"))
        if rows is not None:
            rows = {split: with_columns(rows[split], reading.columns) for split in SPLITS}
    return rows


def _prompts(config: RunConfig, tokenizer: Any, rows: Mapping[Split, list[Row]], found: Findings) -> None:
    with found.checking():
        notes: list[str] = []
        sets = make_prompt_sets(config, tokenizer, rows, notes.append)
        for split in SPLITS:
            found.shown.append((f"{split} prompts", _lengths(sets[split], config.rollout.max_prompt_tokens)))
        found.shown.append(("epochs", _epochs(config, len(sets["train"].prompts))))
        first = sets["train"].prompts[0]
        text = tokenizer.decode(first.token_ids)
        found.shown.append((f"first prompt, {first.id}, {len(first.token_ids)} tokens", "\n" + text))
        make_problems(config, tokenizer, sets, notes.append)
        found.shown += [("note", text) for text in notes if "are longer than" not in text]


def _lengths(prompts: PromptSet, limit: int) -> str:
    lengths = prompts.lengths
    return (
        f"{len(lengths):,} of {min(lengths):,} to {max(lengths):,} tokens, median {median(lengths):,.0f}; "
        f"{prompts.dropped:,} ({prompts.dropped / len(lengths):.1%}) are longer than rollout.max_prompt_tokens "
        f"({limit:,}) and left out"
    )


def _epochs(config: RunConfig, prompts: int) -> str:
    groups = config.rollout.groups_per_step
    return f"{config.steps * groups / prompts:.2f} = {config.steps:,} steps x {groups} groups / {prompts:,} prompts"


def _print(name: str, value: str) -> None:
    """A comment of YAML, so that the whole output can be read as a configuration."""
    first, *others = ("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in value.split("\n"))
    print(f"# {name}: {first}".rstrip())
    for line in others[:SHOWN_PROMPT_LINES]:
        print(f"#   | {line}".rstrip())
    if len(others) > SHOWN_PROMPT_LINES:
        print(f"#   | ... and {len(others) - SHOWN_PROMPT_LINES} lines more")
