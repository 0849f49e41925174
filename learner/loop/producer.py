"""The producer: draws prompts, has their responses generated and rewarded, and puts the groups into the buffer."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from common.config.run import RunConfig
from common.packed import PackedResponse
from learner.environments.rewards import Tally
from learner.loop.buffer import Buffer, ScoredGroup
from learner.loop.ledger import Draw, Ledger
from learner.loop.parts import Parts
from learner.loop.rollout import GRACE_SECONDS, Progress, generate_groups
from learner.loop.scoring import Scoring
from learner.loop.treatment import TreatedShare, first_treated_sample, training_requests
from learner.run.errors import part


class Busy:
    """Measures for how long anything was going on, however much of it at a time."""

    def __init__(self) -> None:
        self._under_way = 0
        self._began = 0.0
        self._seconds = 0.0

    def seconds(self, now: float) -> float:
        """In all, up to `now`, which is the monotonic clock's."""
        return self._seconds + (now - self._began if self._under_way else 0.0)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Something goes on in the block."""
        if not self._under_way:
            self._began = time.monotonic()
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._seconds += time.monotonic() - self._began


class Producer:
    """Keeps the buffer filled. `run` is called once, and goes on until it is cancelled.

    `version`: the policy that is published; its owner moves it on. `generating`: for how long responses were generated,
    and `generated_tokens` how many of them.

    Where nothing may be stale, all groups of a step are asked for at once: they begin in the order of the prompts, and
    there is nothing to be gained by asking for another one when one is done.
    """

    def __init__(
        self,
        config: RunConfig,
        parts: Parts,
        ledger: Ledger,
        buffer: Buffer,
        share: TreatedShare,
    ) -> None:
        self._config = config
        self._rollouts, self._rewards = parts.rollouts, parts.rewards
        self._ledger = ledger
        self._buffer = buffer
        self._share = share
        self.version = 0
        self.generating = Busy()
        self.generated_tokens = 0
        self.progress = Progress(config.rollout.engine.silence_seconds + GRACE_SECONDS)
        self._at_once = 1 if config.max_staleness else config.rollout.groups_per_step
        self._judged = Tally(config.responses_per_step)
        self._judged_groups = 0
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def run(self) -> None:
        """Generate as long as there is room. The first failure ends it."""
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    await self._buffer.room(self._at_once)
                    draws = [self._ledger.draw(self.version) for _ in range(self._at_once)]
                    self._under_way += 1
                    self._idle.clear()
                    tasks.create_task(self._produce(draws)).add_done_callback(self._produced)
        except BaseExceptionGroup as group:
            # The others were cancelled, or failed of the same.
            raise group.exceptions[0] from group.exceptions[0].__cause__

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing new is begun in the block."""
        self._buffer.close()
        try:
            yield
        finally:
            self._buffer.open()

    async def idle(self) -> None:
        """Wait until nothing is under way any more. Raises what ended the generation."""
        await self._idle.wait()
        self._buffer.check()

    async def _produce(self, draws: list[Draw]) -> None:
        config, step = self._config, self.version + 1
        applies = self._share.applies
        first_treated = first_treated_sample(config, applies)
        prompts = [draw.prompt for draw in draws]
        requests = [training_requests(config, draw, applies) for draw in draws]
        judged = self._judged_with(len(draws))
        async with Scoring(self._rewards, prompts, judged, step) as scoring:

            def finished(response: PackedResponse) -> None:
                self.generated_tokens += response.generated_tokens
                scoring.add(response)

            with part("rollout", step), self.generating.working():
                groups = await generate_groups(self._rollouts, prompts, requests, self.progress, finished)
            scored = await scoring.finish(groups)
        for draw, group, tally in zip(draws, scored.groups, scored.tallies, strict=True):
            version = min(response.oldest_version for response in group.trajectories)
            self._buffer.put(ScoredGroup(draw, group, version, first_treated, tally))

    def _judged_with(self, groups: int) -> Tally:
        """The tally of as many groups as a step has, drawn one after another."""
        if self._judged_groups >= self._config.rollout.groups_per_step:
            self._judged, self._judged_groups = Tally(self._config.responses_per_step), 0
        self._judged_groups += groups
        return self._judged

    def _produced(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._buffer.fail(error)
        self._under_way -= 1
        if not self._under_way:
            self._idle.set()
