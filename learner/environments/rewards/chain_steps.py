"""The chain task's reward: 1 if every written step is right. A fraction of a millisecond, so no process for it."""

from learner.environments.records import BadRowError
from learner.environments.rewards.base import Reading, RewardError, RewardItem, Score, Tally
from learner.environments.rows import Row
from learner.environments.tasks import chain


class ChainRewards:
    """See `common.config.data.ChainReward`."""

    reads_tokens = False

    async def start(self) -> Reading:
        return Reading(frozenset(), "prompt, response")

    async def score(self, item: RewardItem) -> Score:
        try:
            problem = chain.parse_prompt(item.prompt)
        except ValueError as error:
            # `check_prompt` refuses such a data set at the start.
            raise RewardError(f"prompt {item.prompt_id!r}: {error}") from error
        return Score(float(chain.check(problem, item.response).correct))

    def judge(self, tally: Tally) -> None:
        """Every response has a reward."""

    async def close(self) -> None:
        pass


def check_prompt(row: Row) -> None:
    """Raise BadRowError for a problem that is no chain: its responses could not be rewarded."""
    try:
        chain.parse_prompt(row.text)
    except ValueError as error:
        raise BadRowError(
            "reward.kind 'chain' can't check it: not a chain prompt. 'math' and 'function' can check others"
        ) from error
