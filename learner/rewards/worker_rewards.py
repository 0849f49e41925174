"""Rewards that run in worker processes, and what is done about those that fail."""

import logging
import os
from collections.abc import Callable

from common.config.data import FunctionReward, MathReward
from learner.errors import InputError
from learner.rewards.base import RewardError, RewardItem, Score, Tally
from learner.rewards.worker_process import RewardFunction
from learner.rewards.workers import WorkerPool

log = logging.getLogger(__name__)

MOST_WORKERS = 8
"""What `workers: null` takes at most: the engines need the cores too."""


class WorkerRewards:
    """A reward function in worker processes. What is not ready in time, or fails, gets 0, is counted and logged."""

    def __init__(self, load: Callable[[], RewardFunction], name: str, settings: MathReward | FunctionReward) -> None:
        self._name = name
        self._settings = settings
        self._pool = WorkerPool(load, settings.workers or min(MOST_WORKERS, os.cpu_count() or 1))

    async def start(self) -> None:
        outcome = await self._pool.start()
        if outcome.error is not None:
            raise InputError(f"reward {self._name}: {outcome.error}")

    async def score(self, item: RewardItem) -> Score:
        limit = self._settings.timeout_seconds
        outcome = await self._pool.call(item, limit)
        place = f"reward {self._name}, prompt {item.prompt_id!r}, sample {item.sample}"
        if outcome.timed_out:
            log.warning("%s: not ready within %g s, so it is 0", place, limit)
            return Score(0.0, timed_out=True)
        if outcome.error is not None:
            error = f"{place}: {outcome.error}"
            log.warning("%s, so it is 0\n%s", error, outcome.traceback)
            return Score(0.0, error=error, traceback=outcome.traceback)
        if outcome.warning:
            log.warning("%s: %s, so it is 0", place, outcome.warning)
        return Score(outcome.value)

    def judge(self, tally: Tally) -> None:
        settings, failure = self._settings, tally.last_failure
        if tally.timeouts == tally.responses:
            raise RewardError(
                f"none of the {tally.responses} calls of {self._name} was ready within "
                f"{settings.timeout_seconds:g} s (reward.timeout_seconds)"
            )
        if failure is None:
            return
        traceback = f"\n{failure.traceback.rstrip()}" if failure.traceback else ""
        if settings.on_error == "fail":
            raise RewardError(f"{failure.error} (reward.on_error: fail){traceback}")
        if tally.errors > settings.max_error_share * tally.responses:
            raise RewardError(
                f"{tally.errors} of {tally.responses} rewards failed, more than reward.max_error_share "
                f"({settings.max_error_share:g}) allows; the last: {failure.error}{traceback}"
            )

    async def close(self) -> None:
        await self._pool.close()
