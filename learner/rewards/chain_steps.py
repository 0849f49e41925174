"""The chain task's reward: 1 if every written step is right. A fraction of a millisecond, so no process for it."""

from collections.abc import Iterable

from learner.data import Row
from learner.errors import InputError
from learner.rewards.base import RewardError, RewardItem, Score, Tally
from learner.tasks import chain


class ChainRewards:
    """See `common.config.data.ChainReward`."""

    async def start(self) -> frozenset[str]:
        return frozenset()

    async def score(self, item: RewardItem) -> Score:
        try:
            problem = chain.parse_prompt(item.prompt)
        except ValueError as error:
            # `check_prompts` refuses such a data set at the start.
            raise RewardError(f"prompt {item.prompt_id!r}: {error}") from error
        return Score(float(chain.check(problem, item.response).correct))

    def judge(self, tally: Tally) -> None:
        """Every response has a reward."""

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
