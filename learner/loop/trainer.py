"""The training loop: take scored groups, train on them, publish the new policy."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from statistics import fmean
from typing import Any

from common import metrics as names
from common.config.run import RunConfig
from learner.environments.problems import Problems
from learner.environments.step_checks import count_steps
from learner.loop.buffer import Buffer, Taken
from learner.loop.checkpoints import Checkpoints
from learner.loop.driver_state import DriverState, RunRecord
from learner.loop.drops import Drops, generated_tokens
from learner.loop.evaluations import Evaluations
from learner.loop.ledger import Ledger
from learner.loop.parts import Parts
from learner.loop.producer import Producer
from learner.loop.publishing import publish
from learner.loop.scoring import joined, reward_metrics
from learner.loop.step_clock import StepClock
from learner.loop.step_metrics import rollout_metrics
from learner.loop.treatment import TreatedShare, plain_outcome
from learner.loop.watch import Watch
from learner.run.display import Display
from learner.run.errors import Interrupted, part
from learner.run.interrupt import StopRequest
from learner.run.run_directory import RunDirectory

log = logging.getLogger(__name__)

CANCEL_SECONDS = 30.0


class Trainer:
    """Trains step after step. `state` is that of the last finished step."""

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        state: DriverState,
        parts: Parts,
        problems: Problems,
        record: RunRecord,
        display: Display,
        checkpoints: Checkpoints,
        learner_restarts: int = 0,
    ) -> None:
        self._config = config
        self._directory = directory
        self._rollouts, self._learner, self._write = parts.rollouts, parts.learner, parts.write
        self._record = record
        self._display = display
        self._checkpoints = checkpoints
        self._evaluations = Evaluations(config, problems, parts, record, display)
        self._watch = Watch(config.warnings)
        self._drops = Drops(state.drops)
        self._share = TreatedShare(config.rollout.group_share, state.success_rate)
        count = config.rollout.groups_per_step
        self._ledger = Ledger(problems.stream, count, state.ledger)
        self._buffer = Buffer(self._ledger, config.max_staleness, count, (config.steps - state.step) * count)
        self._producer = Producer(config, parts, self._ledger, self._buffer, self._share)
        self._learner_restarts = learner_restarts
        self.state = state

    @property
    def is_finished(self) -> bool:
        """Whether no step is left."""
        return is_finished(self._config, self.state)

    async def train(self, stop: StopRequest) -> None:
        """Train until no step is left. Raises PartError if a part fails, and Interrupted if the user asks to stop."""
        self._producer.version = self.state.policy_version
        clock = StepClock(self._producer)
        async with self._producing():
            while not self.is_finished:
                if stop.requested:
                    raise Interrupted
                step = self.state.step + 1
                self._display.phase("training", self.state.step, self._config.steps)
                clock.mark("waiting")
                taken = await stop.unless_stopped(
                    self._buffer.take(self._config.rollout.groups_per_step, self.state.policy_version)
                )
                clock.mark("taken")
                rollouts_state = await self._ready(step)
                clock.mark("ready")
                metrics = await self._learn(step, taken)
                clock.mark("trained")
                metrics |= await self._publish(step)
                metrics |= self._rollouts.take_counts()
                clock.mark("published")
                metrics |= self._finish(step, taken, metrics, rollouts_state)
                self._tell(step, taken, metrics | clock.finish())
                # The arrays of what was trained are not needed while the next step is waited for.
                del taken
                self._checkpoints.begin(self.state)
                if self._evaluations.is_due(step):
                    with clock.left_out(), self._producer.paused():
                        await stop.unless_stopped(self._producer.idle())
                        await self.evaluate(stop)
                if self._checkpoints.stays(step):
                    await self._checkpoints.finished()

    async def evaluate_if_due(self, stop: StopRequest) -> None:
        """As `evaluate`, if an evaluation of the last finished step should be there by now."""
        if self._evaluations.is_due(self.state.step):
            await self.evaluate(stop)

    async def evaluate(self, stop: StopRequest) -> None:
        """Evaluate the current policy in both modes, unless that was done before. Nothing else may be generated."""
        step = self.state.step
        when = "after training" if self.is_finished else f"after step {step}" if step else "before training"
        await self._evaluations.evaluate(stop, step, when)
        if step == 0:
            with part("rollout"):
                self.state = self.state.model_copy(update={"rollouts": await self._rollouts.state()})

    @asynccontextmanager
    async def _producing(self) -> AsyncIterator[None]:
        """Responses are generated in the block. What is under way at its end is given up, and generated again later."""
        producing = asyncio.create_task(self._producer.run())
        producing.add_done_callback(self._buffer.ended)
        try:
            yield
        finally:
            producing.cancel()
            # What does not end in time is given up: the parts are closed next.
            _, late = await asyncio.wait({producing}, timeout=CANCEL_SECONDS)
            if late:
                log.error("generation did not end within %g s of being cancelled", CANCEL_SECONDS)

    async def _ready(self, step: int) -> list[Any]:
        """Wait until the learner may train; returns what the rollout side has learnt of the thresholds."""
        with part("rollout", step):
            state = await self._rollouts.state()
        await self._checkpoints.finished()
        return state

    async def _learn(self, step: int, taken: Taken) -> dict[str, Any]:
        """Train on what was taken."""
        self._checkpoints.held_step = None
        groups = [group.group for group in taken.groups]
        metrics: dict[str, Any] = {}
        # Recorded while the learner works: it takes the driver's time, not the step's.
        recording = asyncio.create_task(asyncio.to_thread(self._record_rollout, step, taken))
        try:
            with part("learner", step):
                metrics |= await self._learner.train_step(groups, step)
        finally:
            metrics |= await recording
        return metrics

    def _record_rollout(self, step: int, taken: Taken) -> dict[str, Any]:
        groups = [group.group for group in taken.groups]
        with part("trajectories", step):
            self._write(self._directory.trajectories / f"step_{step}.parquet", step, groups)
            counts = count_steps(self._config, groups)
            return rollout_metrics(groups, [group.first_treated for group in taken.groups], counts)

    async def _publish(self, step: int) -> dict[str, Any]:
        """Give the replicas the policy that came of the step."""
        with self._producer.progress.held():
            size = await publish(self._learner, self._rollouts, step, self._config.sync.deadline_seconds)
        self._producer.version = step
        self._checkpoints.weight_bytes = size
        return {names.SYNC_BYTES: size}

    def _finish(self, step: int, taken: Taken, metrics: dict[str, Any], rollouts_state: list[Any]) -> dict[str, Any]:
        """Enter the step into the ledger and the state; returns what there is to tell of them."""
        groups = [group.group for group in taken.groups]
        first_treated = [group.first_treated for group in taken.groups]
        self._share.update(*plain_outcome(groups, first_treated, self._config.evaluation.success_threshold))
        self._buffer.trained(taken.groups)
        dropped = generated_tokens(response for group in taken.dropped for response in group.group.trajectories)
        told = self._drops.add(taken) | reward_metrics(joined([group.tally for group in taken.groups]))
        total = self.state.generated_tokens + metrics[names.GENERATED_TOKENS] + dropped
        self.state = DriverState(
            step=step,
            policy_version=step,
            ledger=self._ledger.state(),
            success_rate=self._share.success_rate,
            generated_tokens=total,
            drops=self._drops.counts,
            rollouts=rollouts_state,
            data=self.state.data,
        )
        self._checkpoints.held_step = step
        return told | {
            names.STEP: step,
            names.POLICY_VERSION: step,
            names.PLAIN_SUCCESS_RATE: self._share.success_rate,
            names.TOTAL_GENERATED_TOKENS: total,
            names.STALENESS_MEAN: fmean(taken.staleness),
            names.STALENESS_MAX: max(taken.staleness),
            names.BUFFER_DEPTH: taken.depth,
            names.LEARNER_RESTARTS: self._learner_restarts,
        }

    def _tell(self, step: int, taken: Taken, metrics: dict[str, Any]) -> None:
        """Record the step, and show it."""
        for text in self._watch.check(step, metrics):
            log.warning(text)
            self._display.message(text)
        metrics[names.WARNINGS] = self._watch.active
        self._record.add_turns(turns(step, taken))
        self._record.add_step(metrics)
        self._display.step(metrics, self._config.steps)


def turns(step: int, taken: Taken) -> dict[str, Any]:
    """A step's line in `ledger.jsonl`."""
    trained = [
        {
            "turn": group.draw.number,
            "epoch": group.draw.epoch,
            "prompt": group.draw.prompt.id,
            "staleness": taken.version - group.version,
        }
        for group in taken.groups
    ]
    return {"step": step, "trained": trained, "dropped": [group.draw.number for group in taken.dropped]}


def is_finished(config: RunConfig, state: DriverState) -> bool:
    """Whether no step is left, by number or by token budget."""
    budget = config.token_budget
    return state.step >= config.steps or (budget is not None and state.generated_tokens >= budget)
