"""A plan against a run that was measured: the run's own lengths and shares, the plan's seconds and bytes."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import metrics as names
from common.config import RunConfig
from learner.planning.assumptions import Assumptions
from learner.planning.capacity import Plan, make_plan
from learner.planning.machine import RANK_GIB
from learner.planning.memory import GIB
from learner.planning.setup import Setup
from learner.run.errors import InputError

LEAST_STEPS = 3


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure. `planned` and `measured` have the same unit, which is in the name."""

    name: str
    planned: float
    measured: float

    @property
    def ratio(self) -> float:
        return self.planned / self.measured if self.measured else float("nan")


def read_steps(run: Path) -> list[Mapping[str, Any]]:
    """The metrics of a run's steps but the first, which compiles and fills caches. Raises InputError."""
    path = run / "metrics.jsonl"
    try:
        steps = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"--against: {path} can't be read: {error}") from error
    if len(steps) < LEAST_STEPS:
        raise InputError(
            f"--against: {run} has {len(steps)} step(s), at least {LEAST_STEPS} are needed to compare with"
        )
    return steps[1:]


def run_assumptions(config: RunConfig, steps: Sequence[Mapping[str, Any]], given: Assumptions) -> Assumptions:
    """`given` with the lengths and shares that the run had: medians over its steps."""
    responses = _median(steps, names.RESPONSE_TOKENS)
    signal = 1.0 - _median(steps, names.SKIPPED_SHARE)
    count = config.responses_per_step
    run = max(signal * count, 1.0)
    changes = {
        "mean_response_tokens": responses,
        "mean_prompt_tokens": max(_median(steps, names.LEARNER_TOKENS) / run - responses, 1.0),
        "signal_share": run / count,
        "padding_share": _median(steps, names.PADDING_SHARE),
    }
    treated = config.treated_per_group * config.rollout.groups_per_step
    erased = _median(steps, names.ERASED_TOKENS) / max(treated, 1)
    changes["erased_share"] = erased / (erased + responses)
    return given.model_copy(update=changes)


def compare(setup: Setup, assumptions: Assumptions, run: Path) -> tuple[Plan, list[Comparison]]:
    """The plan of the run, and each figure that the run measured beside the plan's."""
    steps = read_steps(run)
    plan = make_plan(setup, run_assumptions(setup.config, steps, assumptions))
    made, work = plan.generation, plan.work
    rows = [
        ("generated tokens of a step", work.generated_tokens, names.GENERATED_TOKENS),
        ("generation, seconds", made.seconds, names.ROLLOUT_SECONDS),
        ("train, seconds", plan.training.seconds, names.TRAIN_SECONDS),
        ("weight sync, seconds", plan.sync.seconds, names.SYNC_SECONDS),
        ("step, seconds", plan.step_seconds, names.STEP_SECONDS),
        ("generated tokens/s while generating", work.generated_tokens / made.seconds, names.TOKENS_PER_SECOND),
        ("weights, bytes", plan.sync.bytes, names.SYNC_BYTES),
    ]
    found = [Comparison(name, planned, _median(steps, metric)) for name, planned, metric in rows]
    peak = max(step.get(names.LEARNER_MEMORY) or 0.0 for step in steps)
    if peak:
        base = plan.assumptions.gpu_overhead_gib if setup.on_gpu else RANK_GIB
        found.append(Comparison("learner rank, GiB at its peak", plan.learner.total / GIB + base, peak))
    return plan, found


def _median(steps: Sequence[Mapping[str, Any]], name: str) -> float:
    values = [step[name] for step in steps if step.get(name) is not None]
    return float(statistics.median(values)) if values else 0.0
