"""Rewards that run in worker processes, and what is done about those that fail."""

import logging
import math
import os

from common.config.data import FunctionReward, MathReward, ReasoningGymReward
from learner.environments.rewards.base import Reading, RewardError, RewardItem, Score, Tally
from learner.environments.rewards.worker_process import Load
from learner.environments.rewards.workers import WorkerPool
from learner.run.errors import InputError

log = logging.getLogger(__name__)

MOST_WORKERS = 8
"""What `workers: null` takes at most: the engines need the cores too."""


class WorkerRewards:
    """A reward function in worker processes. What is not ready in time, or fails, gets 0, is counted and logged."""

    def __init__(self, load: Load, name: str, settings: MathReward | FunctionReward | ReasoningGymReward) -> None:
        self._name = name
        self._settings = settings
        workers = settings.workers or min(MOST_WORKERS, len(os.sched_getaffinity(0)))
        self._pool = WorkerPool(load, workers, settings.start_seconds)
        self.reads_tokens = False

    async def start(self) -> Reading:
        outcome = await self._pool.start()
        if outcome.failure is not None:
            raise InputError(f"reward {self._name}: {outcome.message}")
        assert outcome.reading is not None
        self.reads_tokens = outcome.reading.tokens
        return outcome.reading

    async def score(self, item: RewardItem) -> Score:
        limit = self._settings.timeout_seconds
        outcome = await self._pool.call(item, limit)
        if outcome.failure is None:
            return Score(outcome.value)
        reason = f"not ready within {limit:g} s" if outcome.failure == "timeout" else outcome.message
        message = f"reward {self._name}, prompt {item.prompt_id!r}, sample {item.sample}: {reason}"
        log.warning("%s, so it is 0\n%s", message, outcome.traceback)
        return Score(0.0, outcome.failure, message, outcome.traceback)

    def judge(self, tally: Tally) -> None:
        settings, error = self._settings, tally.last_error
        if error is None:
            if tally.timeouts == tally.responses:
                raise RewardError(
                    f"none of the {tally.responses} calls of {self._name} was ready within "
                    f"{settings.timeout_seconds:g} s (reward.timeout_seconds)"
                )
            return
        if settings.on_error == "fail":
            raise RewardError(f"{error.message} (reward.on_error: fail)")
        allowed = math.ceil(settings.max_error_share * tally.responses)
        if tally.errors > allowed or tally.errors + tally.timeouts == tally.responses:
            raise RewardError(
                f"{tally.errors} of {tally.responses} rewards failed, and {tally.timeouts} were not ready in time: "
                f"reward.max_error_share ({settings.max_error_share:g}) allows {allowed} to fail. "
                f"The last: {error.message}"
            )

    async def close(self) -> None:
        await self._pool.close()
