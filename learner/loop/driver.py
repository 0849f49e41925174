"""The driver of one run: starts its parts, has them train, evaluate and export, and stops them whatever happens."""

import asyncio
import logging
import time
from typing import Any

from common.config.run import RunConfig
from learner.environments.problems import Problems
from learner.loop.checkpoints import Checkpoints
from learner.loop.driver_state import DriverState, RunRecord, newest_state
from learner.loop.parts import Parts
from learner.loop.publishing import publish
from learner.loop.trainer import Trainer
from learner.policy.group import LearnerLost
from learner.run.display import Display
from learner.run.errors import Interrupted, PartError, part
from learner.run.interrupt import StopRequest
from learner.run.run_directory import RunDirectory, require_space

log = logging.getLogger(__name__)

CLOSE_SECONDS = 60.0


class Driver:
    """Runs one training run from `state` to its end. `run` is called once."""

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        state: DriverState,
        parts: Parts,
        problems: Problems,
        record: RunRecord,
        display: Display,
    ) -> None:
        self._config = config
        self._directory = directory
        self._parts = parts
        self._rollouts, self._learner, self._rewards = parts.rollouts, parts.learner, parts.rewards
        self._problems = problems
        self._record = record
        self._display = display
        self._checkpoints = Checkpoints(config, directory, parts.learner, display)
        self._restarts = 0
        self._trainer = self._trainer_from(state)
        self.start_seconds = 0.0

    async def run(self) -> None:
        """Start all parts, train, evaluate, export the policy; stop all parts whatever happens.

        Raises PartError if a part fails and Interrupted if the user asks to stop. In both cases the last finished
        step is kept as a checkpoint if the learner still holds it.
        """
        with StopRequest(self._announce_stop, self._display.stop) as stop:
            try:
                await self._start(stop)
                # Also of the step that is resumed after: its evaluation may have been interrupted.
                await self._trainer.evaluate_if_due(stop)
                await self._train(stop)
                await self._trainer.evaluate(stop)
                await self._export()
            except Interrupted:
                await self._checkpoints.write(self._trainer.state)
                raise
            except PartError as error:
                await self._checkpoints.rescue(self._trainer.state, error)
                raise
            finally:
                await self._close()

    def _announce_stop(self) -> None:
        self._display.message("stopping with a checkpoint; Ctrl-C again stops at once, without one")

    async def _start(self, stop: StopRequest) -> None:
        started = time.monotonic()
        self._display.phase("starting the replicas and the learner")
        await stop.unless_stopped(self._start_parts())
        await self._load(self._trainer.state)
        self.start_seconds = time.monotonic() - started

    def _trainer_from(self, state: DriverState) -> Trainer:
        return Trainer(
            self._config,
            self._directory,
            state,
            self._parts,
            self._problems,
            self._record,
            self._display,
            self._checkpoints,
            self._restarts,
        )

    async def _train(self, stop: StopRequest) -> None:
        """Train until no step is left, and write a checkpoint.

        A lost rank costs the steps since the last checkpoint, and not the run.
        """
        beginning = self._trainer.state
        furthest, in_a_row = -1, 0
        while True:
            try:
                await self._trainer.train(stop)
                await self._checkpoints.write(self._trainer.state)
                return
            except PartError as error:
                step = self._trainer.state.step
                in_a_row = in_a_row + 1 if step <= furthest else 1
                furthest = max(furthest, step)
                most = self._config.learner.max_restarts_in_a_row
                if not isinstance(error.__cause__, LearnerLost) or in_a_row > most:
                    raise
                log.warning("restart %d of %d of the learner: %s", in_a_row, most, error)
                self._display.message(f"{error}; the learner is restarted from the last checkpoint")
            await self._restart_learner(stop, beginning)
            await self._trainer.evaluate_if_due(stop)

    async def _restart_learner(self, stop: StopRequest, beginning: DriverState) -> None:
        """New ranks with the last checkpoint's weights; without one `beginning`, which has those of the model."""
        self._restarts += 1
        await self._checkpoints.cancel()
        self._directory.set_damaged_checkpoints_aside()
        state = newest_state(self._directory) if self._directory.checkpoint_steps() else beginning
        self._record.rewind(state.step)
        self._display.phase("restarting the learner")
        with part("learner"):
            await stop.unless_stopped(self._learner.restart())
        self._trainer = self._trainer_from(state)
        await self._load(state)

    async def _load(self, state: DriverState) -> None:
        """Give learner and replicas the weights of `state`, and the rollout side what it knew then."""
        await self._checkpoints.load(state)
        with part("rollout"):
            await self._rollouts.restore(state.rollouts)
        # Also at version 0: a sync that can't work, or replicas with other weights, show before the first step.
        seconds = self._config.sync.deadline_seconds
        self._checkpoints.weight_bytes = await publish(self._learner, self._rollouts, state.policy_version, seconds)

    async def _start_parts(self) -> None:
        # Actors have working directories of their own.
        log_directory, config = self._directory.log.resolve(), self._config
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_named("learner", self._learner.start()))
                tasks.create_task(_named("rollout", self._rollouts.start(config, log_directory)))
        except ExceptionGroup as group:
            # The first to fail is the cause; the other was only cancelled, or failed of the same.
            raise group.exceptions[0] from group.exceptions[0].__cause__

    async def _export(self) -> None:
        self._display.phase("exporting the policy")
        with part("export"):
            require_space(self._directory.policy, self._checkpoints.weight_bytes)
            await self._learner.export_huggingface(self._directory.policy)

    async def _close(self) -> None:
        self._display.phase("stopping the replicas and the learner")
        await self._checkpoints.cancel()
        for name, closing in (
            ("rollout", self._rollouts.close()),
            ("learner", self._learner.close()),
            ("reward", self._rewards.close()),
        ):
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await closing
            except Exception:
                # The end of the cluster takes with it what did not close; the run's result does not depend on it.
                log.exception("%s did not close", name)


async def _named(name: str, work: Any) -> None:
    with part(name):
        await work
