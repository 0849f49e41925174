"""The scorer that a task of `reasoning-gym` brings along, as a reward."""

import logging
import re
from typing import Any

from common.config.data import ReasoningGymData, ReasoningGymReward
from learner.environments.procedural import PACKAGE, make_dataset
from learner.environments.rewards.base import Reading, RewardItem
from learner.environments.rewards.descriptions import described, shown
from learner.environments.rewards.worker_process import Loaded
from learner.run.errors import InputError

log = logging.getLogger(__name__)

COLUMNS = frozenset({"question", "answer", "metadata"})
"""What a problem consists of; the scorer gets all of it."""


def load_scorer(data: ReasoningGymData, reward: ReasoningGymReward) -> Loaded:
    """The task's `score_answer`. Raises InputError if the task can't be made, or can't score an answer of its own."""
    dataset = make_dataset(data.name, data.config, 0, 1)
    entry = dataset[0]
    try:
        dataset.score_answer(answer=entry["answer"], entry=entry)
    except Exception as error:
        raise InputError(f"{data.name!r} of {PACKAGE} can't score its own answer: {described(error)}") from error

    def score(item: RewardItem) -> Any:
        answer = given_answer(item.response, reward.answer_tag)
        try:
            return dataset.score_answer(answer=answer, entry=dict(item.row))
        except Exception as error:
            # Some scorers read an answer without a check: what they fail at is no answer.
            log.warning("%s: %s is scored 0: %s", data.name, shown(answer), described(error))
            return 0.0

    where = "response" if reward.answer_tag is None else f"<{reward.answer_tag}> in response"
    return Loaded(score, Reading(COLUMNS, f"{where}, {', '.join(sorted(COLUMNS))}"))


def given_answer(response: str, tag: str | None) -> str:
    """What the last `<tag>...</tag>` holds, else the whole response; without the space around it."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", response, re.DOTALL) if tag else []
    text: str = found[-1] if found else response
    return text.strip()
