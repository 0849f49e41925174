"""A run's problems: its data as prompts of the model, checked before anything starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.config.run import RunConfig
from common.trajectory import Prompt
from learner.environments.data import Note, PromptSet, PromptStream, check_template_options, tokenise
from learner.environments.rows import Row
from learner.environments.tasks import Split
from learner.run.errors import InputError


@dataclass(frozen=True, slots=True)
class Problems:
    """The run's data: training prompts in order, and held-out prompts."""

    stream: PromptStream
    held_out: Sequence[Prompt]


def check_tokenizer(config: RunConfig, tokenizer: Any) -> None:
    """Raise InputError if the settings ask for what the tokenizer can't do."""
    check_template_options(tokenizer, config.data)
    if config.rollout.stop and not tokenizer.is_fast:
        raise InputError(f"rollout.stop: the tokenizer of {config.model.path} has no tokenizer.json, which it needs")


def make_problems(config: RunConfig, tokenizer: Any, sets: Mapping[Split, PromptSet], note: Note) -> Problems:
    """The problems of a run from the prompts of both splits; `note` gets lines on what is left out or missing.

    Raises InputError if there are too few.
    """
    limit = config.rollout.max_prompt_tokens
    for split, prompts in sets.items():
        if prompts.dropped:
            note(
                f"{prompts.dropped} {split} prompts are longer than rollout.max_prompt_tokens ({limit}) and left "
                f"out; {len(prompts.prompts)} remain"
            )
    held_out = sets["test"].prompts
    if len(held_out) < config.evaluation.problems:
        note(
            f"evaluation.problems is {config.evaluation.problems}, but there are {len(held_out)} test prompts: all of "
            "them are taken"
        )
    stream = PromptStream(sets["train"].prompts, config.seed, config.rollout.groups_per_step)
    return Problems(stream, held_out[: config.evaluation.problems])


def make_prompt_sets(
    config: RunConfig, tokenizer: Any, rows: Mapping[Split, list[Row]], note: Note
) -> dict[Split, PromptSet]:
    """The prompts of each split; `note` gets lines on rows that are left out. Raises InputError if none is left."""
    return {split: tokenise(of_split, tokenizer, config, split, note) for split, of_split in rows.items()}
