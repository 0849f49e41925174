"""The chain task's reward: 1 if every written step is right. Milliseconds for a whole step, so no process for it."""

from collections.abc import Iterable, Sequence

from learner.data import Row
from learner.errors import InputError
from learner.rewards.base import RewardError, RewardItem, Scores
from learner.tasks import chain


class ChainRewards:
    """See `common.config.data.ChainReward`."""

    async def start(self) -> None:
        pass

    async def score(self, items: Sequence[RewardItem]) -> Scores:
        return Scores([_score(item) for item in items])

    async def close(self) -> None:
        pass


def check_prompts(rows: Iterable[Row]) -> None:
    """Raise InputError for a problem that is no chain: its responses could not be rewarded."""
    for row in rows:
        try:
            chain.parse_prompt(row.text)
        except ValueError as error:
            raise InputError(
                f"reward.kind 'chain' can't check prompt {row.id!r}: {error}. Choose 'math' or 'function'"
            ) from error


def _score(item: RewardItem) -> float:
    try:
        problem = chain.parse_prompt(item.prompt)
    except ValueError as error:
        raise RewardError(f"prompt {item.prompt_id!r}: {error}") from error
    return float(chain.check(problem, item.response).correct)
