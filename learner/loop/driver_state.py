"""The driver's part of a checkpoint, and the run's record of itself."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from common import metrics as names
from common.config import StrictModel
from learner.evaluation.evaluate import Evaluation
from learner.loop.drops import DropCounts
from learner.loop.ledger import LedgerState
from learner.run.errors import InputError
from learner.run.run_directory import CHECKPOINT_STATE, RunDirectory, append_line, read_jsonl, write_text


class DriverState(StrictModel):
    """Everything of the driver that decides the next step. All random choices derive from the configured seed and their
    place.

    `ledger`: which prompts were trained, and whose turn is next. `success_rate`: the running success rate of plain
    responses. `generated_tokens`: for training, those of dropped responses, too. `drops`: how many were dropped.
    `rollouts`: what the rollout side has learnt of the thresholds. `data`: digest of the rows of both splits, without
    which the ledger means nothing.
    """

    step: int = 0
    policy_version: int = 0
    ledger: LedgerState = LedgerState()
    success_rate: float = 0.0
    generated_tokens: int = 0
    drops: DropCounts = DropCounts()
    rollouts: list[Any] = Field(default_factory=list)
    data: str = ""


def save_state(checkpoint: Path, state: DriverState) -> None:
    """Write the state into a checkpoint."""
    write_text(checkpoint / CHECKPOINT_STATE, state.model_dump_json(indent=2) + "\n")


def newest_state(directory: RunDirectory) -> DriverState:
    """The state of the newest checkpoint, or that of a run's beginning if there is none."""
    steps = directory.checkpoint_steps()
    if not steps:
        return DriverState()
    path = directory.checkpoint(steps[-1]) / CHECKPOINT_STATE
    try:
        return DriverState.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise InputError(
            f"{path} can't be read, delete its checkpoint to resume from an earlier one: {error}"
        ) from error


class RunRecord:
    """`metrics.jsonl`, `evaluations.jsonl`, `ledger.jsonl` and the TensorBoard events of a run."""

    def __init__(self, directory: RunDirectory, first_step: int) -> None:
        self._directory = directory
        self._tensorboard = _summary_writer(directory, first_step)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One object a step, of all processes of the run."""
        return read_jsonl(self._directory.metrics)

    @property
    def evaluations(self) -> list[Evaluation]:
        """All evaluations so far, oldest first."""
        return [Evaluation.model_validate(line) for line in read_jsonl(self._directory.evaluations)]

    def add_step(self, metrics: Mapping[str, Any]) -> None:
        """Append one step's metrics. JSON has no infinity and no NaN; they become null."""
        values = {name: _json_number(value) for name, value in metrics.items()}
        append_line(self._directory.metrics, json.dumps(values, allow_nan=False))
        for name, value in values.items():
            if value is not None and name != names.STEP:
                self._tensorboard.add_scalar(name, value, metrics[names.STEP])
        self._tensorboard.flush()

    def add_turns(self, line: Mapping[str, Any]) -> None:
        """Append which turns one step trained and dropped."""
        append_line(self._directory.ledger, json.dumps(line))

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """Append one evaluation."""
        append_line(self._directory.evaluations, evaluation.model_dump_json())
        for name in ("avg_at_k", "pass_at_k"):
            tag = names.evaluation_name(evaluation.mode, name)
            self._tensorboard.add_scalar(tag, getattr(evaluation, name), evaluation.step)

    def rewind(self, step: int) -> None:
        """Forget everything after `step` steps: it is about to be done again."""
        self.close()
        self._directory.truncate(step)
        self._tensorboard = _summary_writer(self._directory, step + 1)

    def close(self) -> None:
        """Flush what TensorBoard has not written yet."""
        self._tensorboard.close()


def _summary_writer(directory: RunDirectory, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory.tensorboard), purge_step=first_step)


def _json_number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
