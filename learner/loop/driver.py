"""The synchronous training loop: rollout, reward, train, sync, one after the other, a step at a time.

An asynchronous loop would replace `Driver._train` and keep the rest.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common import metrics as names
from common.config.run import RunConfig
from common.interfaces import Rollouts
from common.manifest import write_manifest
from common.packed import Group
from common.trajectory import Prompt, ResponseRequest
from learner.environments.problems import Problems
from learner.environments.rewards import Rewards
from learner.environments.step_checks import count_steps
from learner.evaluation.evaluate import MODES, Mode, evaluate_groups, evaluation_requests
from learner.loop.driver_state import DriverState, RunRecord, newest_state, save_state
from learner.loop.rollout import generate_groups
from learner.loop.scoring import Scoring
from learner.loop.step_metrics import rollout_metrics
from learner.loop.treatment import TreatedShare, first_treated_sample, plain_outcome, training_requests
from learner.loop.watch import Watch
from learner.planning.memory import CHECKPOINT_COPIES
from learner.policy.group import LearnerGroup
from learner.run.display import Display
from learner.run.errors import DiskFullError, Interrupted, PartError, part
from learner.run.interrupt import StopRequest
from learner.run.run_directory import RunDirectory, replacing, require_space
from learner.run.trajectory_files import write_trajectories

log = logging.getLogger(__name__)

CLOSE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Parts:
    """What the driver drives, not yet started (rewards are)."""

    rollouts: Rollouts
    learner: LearnerGroup
    rewards: Rewards


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
        self._state = state
        self._rollouts, self._learner, self._rewards = parts.rollouts, parts.learner, parts.rewards
        self._problems = problems
        self._record = record
        self._display = display
        self._share = TreatedShare(config.rollout.group_share, state.success_rate)
        self._problems.stream.restore(state.epoch, state.position)
        self._watch = Watch(config.warnings)
        self._clock = 0.0
        # The step whose weights the learner holds; None while it has none, or is in the middle of a step.
        self._learner_step: int | None = None
        self._weight_bytes = 0
        # A checkpoint that is being written while the next step generates.
        self._saving: asyncio.Task[None] | None = None
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
                await self._evaluate_if_due(stop)
                await self._train(stop)
                await self._checkpoint()
                await self._evaluate(stop)
                await self._export()
            except Interrupted:
                await self._checkpoint()
                raise
            except PartError as error:
                await self._rescue(error)
                raise
            finally:
                await self._close()

    def _announce_stop(self) -> None:
        self._display.message("stopping with a checkpoint; Ctrl-C again stops at once, without one")

    async def _start(self, stop: StopRequest) -> None:
        started = time.monotonic()
        self._display.phase("starting the replicas and the learner")
        await stop.unless_stopped(self._start_parts())
        state = self._state
        with part("checkpoint"):
            if state.step:
                await self._learner.load_checkpoint(self._directory.checkpoint(state.step) / "learner")
        self._learner_step = state.step
        with part("rollout"):
            await self._rollouts.restore(state.rollouts)
        # Also at version 0: a sync that can't work, or replicas with other weights, show before the first step.
        await self._sync(state.policy_version)
        self.start_seconds = time.monotonic() - started

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

    async def _train(self, stop: StopRequest) -> None:
        config = self._config
        self._clock = time.monotonic()
        while not self._is_finished():
            if stop.requested:
                raise Interrupted
            step = self._state.step + 1
            self._display.phase("training", self._state.step, config.steps)
            metrics = await self._step(step, stop)
            for text in self._watch.check(step, metrics):
                log.warning(text)
                self._display.message(text)
            metrics[names.WARNINGS] = self._watch.active
            self._record.add_step(metrics)
            self._display.step(metrics, config.steps)
            if config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0:
                await self._checkpoint()
            elif config.checkpoint.latest and not self._is_finished():
                self._saving = asyncio.create_task(self._write_checkpoint(self._state))
            paused = time.monotonic()
            await self._evaluate_if_due(stop)
            self._clock += time.monotonic() - paused

    def _is_finished(self) -> bool:
        return is_finished(self._config, self._state)

    async def _step(self, step: int, stop: StopRequest) -> dict[str, Any]:
        """One step: its metrics, after which `_state` is that of the finished step."""
        config, share_applies = self._config, self._share.applies
        first_treated = first_treated_sample(config, share_applies)
        prompts = self._problems.stream.draw()
        requests = [training_requests(config, step, prompt, share_applies) for prompt in prompts]
        begin = time.monotonic()
        async with self._scoring(step, prompts, requests) as scoring:
            with part("rollout", step):
                generating = generate_groups(self._rollouts, config, prompts, requests, scoring.add)
                groups = await stop.unless_stopped(generating)
            generated = time.monotonic()
            scored = await stop.unless_stopped(scoring.finish(groups))
        groups = scored.groups
        rewarded = time.monotonic()
        with part("rollout", step):
            rollouts_state = await self._rollouts.state()
        await self._saved()
        ready = time.monotonic()
        self._learner_step = None
        metrics: dict[str, Any] = {names.STEP: step, names.POLICY_VERSION: step} | scored.metrics
        # Recorded while the learner works: it takes the driver's time, not the step's.
        recording = asyncio.create_task(asyncio.to_thread(self._record_rollout, step, groups, first_treated))
        try:
            with part("learner", step):
                metrics |= await self._learner.train_step(groups, step)
        finally:
            metrics |= await recording
        trained = time.monotonic()
        metrics[names.SYNC_BYTES] = await self._sync(step)
        synced = time.monotonic()
        self._finish_step(step, groups, first_treated, rollouts_state, metrics)
        rollout_seconds = generated - begin
        parts = {
            names.ROLLOUT_SECONDS: rollout_seconds,
            names.TRAIN_SECONDS: trained - ready,
            names.SYNC_SECONDS: synced - trained,
        }
        now = time.monotonic()
        metrics |= parts | {
            names.STEP_SECONDS: now - self._clock,
            names.OTHER_SECONDS: now - self._clock - sum(parts.values()),
            names.CHECKPOINT_WAIT_SECONDS: ready - rewarded,
            names.TOKENS_PER_SECOND: metrics[names.GENERATED_TOKENS] / rollout_seconds,
        }
        # Whatever follows, such as writing the metrics or a checkpoint, is in the next step's time.
        self._clock = now
        return metrics

    def _record_rollout(self, step: int, groups: list[Group], first_treated: int) -> dict[str, Any]:
        with part("trajectories", step):
            write_trajectories(self._directory.trajectories / f"step_{step}.parquet", step, groups)
            counts = count_steps(self._config, groups)
            return rollout_metrics(groups, first_treated, counts)

    def _finish_step(
        self, step: int, groups: list[Group], first_treated: int, rollouts_state: list[Any], metrics: dict[str, Any]
    ) -> None:
        threshold = self._config.evaluation.success_threshold
        self._share.update(*plain_outcome(groups, first_treated, threshold))
        stream, before = self._problems.stream, self._state
        total = before.generated_tokens + metrics[names.GENERATED_TOKENS]
        self._state = DriverState(
            step=step,
            policy_version=step,
            epoch=stream.epoch,
            position=stream.position,
            success_rate=self._share.success_rate,
            generated_tokens=total,
            rollouts=rollouts_state,
            data=before.data,
        )
        self._learner_step = step
        metrics |= {
            names.PLAIN_SUCCESS_RATE: self._share.success_rate,
            names.TOTAL_GENERATED_TOKENS: total,
        }

    async def _sync(self, version: int) -> int:
        """Push the learner's weights to all replicas; returns the bytes of one copy."""
        deadline = self._config.sync.deadline_seconds
        with part("weight sync"):
            async with self._learner.publishing(version) as update:
                report = await self._rollouts.sync(update, deadline)
        if report.version != version:
            raise PartError("weight sync", f"replicas hold version {report.version}, not {version}")
        self._weight_bytes = report.bytes
        return report.bytes

    def _scoring(self, step: int, prompts: Sequence[Prompt], requests: Sequence[Sequence[ResponseRequest]]) -> Scoring:
        return Scoring(self._rewards, prompts, sum(map(len, requests)), step)

    async def _evaluate_if_due(self, stop: StopRequest) -> None:
        step, every = self._state.step, self._config.evaluation.every_steps
        # A forked run that measures something else has no evaluation yet.
        if step == 0 or (every and step % every == 0) or not self._record.evaluations:
            await self._evaluate(stop)

    async def _evaluate(self, stop: StopRequest) -> None:
        """Evaluate the current policy in both modes, unless that was done before."""
        step = self._state.step
        when = "after training" if self._is_finished() else f"after step {step}" if step else "before training"
        done = {(e.step, e.mode) for e in self._record.evaluations}
        for mode in MODES:
            if (step, mode) not in done:
                self._display.phase(f"evaluating {when}, {mode} sampling")
                await self._evaluate_mode(stop, step, mode)
        with part("rollout"):
            if step:
                # Training goes on as if nothing had been evaluated, whether or not an evaluation was resumed.
                await self._rollouts.restore(self._state.rollouts)
            else:
                state = await self._rollouts.state()
                self._state = self._state.model_copy(update={"rollouts": state})

    async def _evaluate_mode(self, stop: StopRequest, step: int, mode: Mode) -> None:
        config, prompts = self._config, self._problems.held_out
        started = time.monotonic()
        requests = evaluation_requests(config, prompts, mode)
        with part(f"evaluation ({mode})", step):
            async with self._scoring(step, prompts, requests) as scoring:
                generating = generate_groups(self._rollouts, config, prompts, requests, scoring.add)
                scored = await stop.unless_stopped(scoring.finish(await stop.unless_stopped(generating)))
            counts = count_steps(config, scored.groups)
            seconds = time.monotonic() - started
            k = config.evaluation.responses_per_problem
            evaluation = evaluate_groups(
                step,
                mode,
                k,
                scored.groups,
                counts,
                seconds,
                scored.tally.timeouts,
                scored.tally.errors,
                scored.tally.unusable_answers,
                success_threshold=config.evaluation.success_threshold,
            )
        self._record.add_evaluation(evaluation)
        self._display.message(
            f"{mode} accuracy after {step} steps: Avg@{k} {evaluation.avg_at_k:.3f}, "
            f"Pass@{k} {evaluation.pass_at_k:.3f}{scored}"
        )

    async def _checkpoint(self) -> None:
        """Write a checkpoint of the last finished step, if the learner holds that step and there is none yet.

        The first evaluation changes the state of step 0, of which there may be one from before it.
        """
        await self._saved()
        state = self._state
        written = state.step in self._directory.checkpoint_steps() and newest_state(self._directory) == state
        if self._learner_step != state.step or written:
            return
        self._display.phase(f"writing the checkpoint of step {state.step}")
        await self._write_checkpoint(state)

    async def _write_checkpoint(self, state: DriverState) -> None:
        """Write a checkpoint of the weights that the learner holds, which are those of `state`."""
        settings = self._config.checkpoint
        size = CHECKPOINT_COPIES[self._config.model.dtype] * self._weight_bytes
        require_space(self._directory.checkpoint(state.step), size)
        with part("checkpoint", state.step), replacing(self._directory.checkpoint(state.step)) as partial:
            partial.mkdir()
            await self._learner.save_checkpoint(partial / "learner")
            save_state(partial, state)
            await asyncio.to_thread(write_manifest, partial)
        with part("checkpoint", state.step):
            self._directory.delete_old_checkpoints(settings.every_steps, settings.keep)

    async def _saved(self) -> None:
        """Wait for the checkpoint that is being written: the learner must stay as it is for so long."""
        saving, self._saving = self._saving, None
        if saving is not None:
            await saving

    async def _rescue(self, error: PartError) -> None:
        """Keep the last finished step after a failure elsewhere; not on a full disk or by a failed learner."""
        if self._state.step == 0 or isinstance(error, DiskFullError) or error.part in ("learner", "checkpoint"):
            return
        try:
            await self._checkpoint()
        except PartError as second:
            # The first failure is the one to report.
            log.exception("no checkpoint after the failure of %s: %s", error.part, second)

    async def _export(self) -> None:
        self._display.phase("exporting the policy")
        with part("export"):
            require_space(self._directory.policy, self._weight_bytes)
            await self._learner.export_huggingface(self._directory.policy)

    async def _close(self) -> None:
        self._display.phase("stopping the replicas and the learner")
        if self._saving is not None:
            self._saving.cancel()
            await asyncio.gather(self._saving, return_exceptions=True)
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


def is_finished(config: RunConfig, state: DriverState) -> bool:
    """Whether no step is left, by number or by token budget."""
    budget = config.token_budget
    return state.step >= config.steps or (budget is not None and state.generated_tokens >= budget)


async def _named(name: str, work: Any) -> None:
    with part(name):
        await work
