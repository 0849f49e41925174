"""Evaluations during a run: of the policy that the replicas hold, while nothing is generated for training."""

import time

from common.config.run import RunConfig
from learner.environments.problems import Problems
from learner.environments.rewards import Tally
from learner.environments.step_checks import count_steps
from learner.evaluation.evaluate import MODES, Mode, evaluate_groups, evaluation_requests
from learner.loop.driver_state import RunRecord
from learner.loop.parts import Parts
from learner.loop.rollout import GRACE_SECONDS, Progress, generate_groups
from learner.loop.scoring import Scoring
from learner.run.display import Display
from learner.run.errors import part
from learner.run.interrupt import StopRequest


class Evaluations:
    """Makes the evaluations of a run that are due and were not made before."""

    def __init__(
        self,
        config: RunConfig,
        problems: Problems,
        parts: Parts,
        record: RunRecord,
        display: Display,
    ) -> None:
        self._config = config
        self._problems = problems
        self._rollouts, self._rewards = parts.rollouts, parts.rewards
        self._record = record
        self._display = display

    def is_due(self, step: int) -> bool:
        """Whether there should be one of the policy after `step` steps."""
        every = self._config.evaluation.every_steps
        # A forked run that measures something else has no evaluation yet.
        return step == 0 or (every > 0 and step % every == 0) or not self._record.evaluations

    async def evaluate(self, stop: StopRequest, step: int, when: str) -> None:
        """Evaluate the policy after `step` steps in both modes, unless that was done before.

        It teaches the thresholds nothing, but those of the run's beginning: without it they would know nothing.
        """
        with part("rollout"):
            before = await self._rollouts.state() if step else []
        done = {(e.step, e.mode) for e in self._record.evaluations}
        for mode in MODES:
            if (step, mode) not in done:
                self._display.phase(f"evaluating {when}, {mode} sampling")
                await self._evaluate_mode(stop, step, mode)
        with part("rollout"):
            await self._rollouts.restore(before)

    async def _evaluate_mode(self, stop: StopRequest, step: int, mode: Mode) -> None:
        config, prompts = self._config, self._problems.held_out
        started = time.monotonic()
        requests = evaluation_requests(config, prompts, mode)
        judged = Tally(sum(map(len, requests)))
        progress = Progress(config.rollout.engine.silence_seconds + GRACE_SECONDS)
        with part(f"evaluation ({mode})", step):
            async with Scoring(self._rewards, prompts, judged, step) as scoring:
                generating = generate_groups(self._rollouts, prompts, requests, progress, scoring.add)
                scored = await stop.unless_stopped(scoring.finish(await stop.unless_stopped(generating)))
            counts = count_steps(config, scored.groups)
            seconds, tally = time.monotonic() - started, scored.tally
            k = config.evaluation.responses_per_problem
            evaluation = evaluate_groups(
                step,
                mode,
                k,
                scored.groups,
                counts,
                seconds,
                tally.timeouts,
                tally.errors,
                tally.unusable_answers,
                success_threshold=config.evaluation.success_threshold,
            )
        self._record.add_evaluation(evaluation)
        self._display.message(
            f"{mode} accuracy after {step} steps: Avg@{k} {evaluation.avg_at_k:.3f}, "
            f"Pass@{k} {evaluation.pass_at_k:.3f}{scored}"
        )
