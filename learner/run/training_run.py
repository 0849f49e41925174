"""One training run from its configuration to its report: checks, model, cluster, driver, plots."""

import asyncio
import importlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from common.config import RunConfig
from common.interfaces import ROLLOUTS, Rollouts
from learner.environments.data import read_rows, rows_digest
from learner.environments.problems import Problems, check_tokenizer, make_problems, make_prompt_sets
from learner.environments.rewards import Rewards, make_rewards, row_check
from learner.environments.rows import Row, with_columns
from learner.environments.tasks import SPLITS, Split
from learner.evaluation.comparison import comparison_baselines
from learner.loop.driver import Driver
from learner.loop.driver_state import DriverState, RunRecord, newest_state
from learner.loop.parts import Parts
from learner.loop.trainer import is_finished
from learner.policy.group import LearnerGroup
from learner.policy.model_directory import check_model, ensure_model, is_made_first, load_tokenizer, with_absolute_model
from learner.run.cluster import ray_cluster
from learner.run.display import Display
from learner.run.errors import InputError, Interrupted, PartError, part
from learner.run.fork import check_fork, fork, has_only_begun
from learner.run.memory import PeakMemory
from learner.run.plots import draw_plots
from learner.run.quiet import LOG_NAME, quiet_output
from learner.run.report import build_report, comparison_table, final_table, write_report
from learner.run.run_directory import RunDirectory, check_resumable, check_unused, directory_of, holds_run, write_text
from learner.run.trajectory_writer import TrajectoryWriter

log = logging.getLogger(__name__)

MOST_STEPS_OF_BASELINE = 4
"""A baseline erases nothing, so it needs more steps for the same tokens; this many times the run's at most."""


class RunFailedError(Exception):
    """A run failed; its message is for the user, the file `log_path` has the traceback."""

    def __init__(self, message: str, log_path: Path) -> None:
        super().__init__(message)
        self.log_path = log_path


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What is checked and read before a run's directory is touched."""

    rows: dict[Split, list[Row]]
    rewards: Rewards
    notes: list[str]

    @property
    def digest(self) -> str:
        """What tells whether a run goes on with the same data."""
        return rows_digest([*self.rows["train"], *self.rows["test"]])


def train(config: RunConfig, *, resume: bool, source: Path | None = None) -> dict[str, Any]:
    """Run or continue a training run; returns its report. `source`: the run whose checkpoint a new one goes on from.

    Raises InputError if something given can't be used (a new run then leaves nothing behind), RunFailedError if a
    part fails and Interrupted if the user stops it.
    """
    # Before the data is read, which can take long.
    if resume:
        check_resumable(config)
    else:
        check_unused(config)
    if source is not None:
        check_fork(source, config)
    with _prepared(config) as prepared:
        directory = RunDirectory.resume(config) if resume else RunDirectory.create(config)
        try:
            if source is not None:
                _fork(source, directory, config, prepared)
            return _run_in(directory, config, prepared)
        except InputError:
            if not resume and (source is None or has_only_begun(directory)):
                directory.discard(forked=source is not None)
            raise
        finally:
            directory.close()


def _fork(source: Path, directory: RunDirectory, config: RunConfig, prepared: _Prepared) -> None:
    try:
        for text in fork(source, directory, config, prepared.digest):
            print(text, flush=True)
    except BaseException:
        shutil.rmtree(directory.path)
        raise


def compare(config: RunConfig, *, resume: bool) -> list[dict[str, Any]]:
    """The run, then the baselines from the same start with the same number of generated tokens.

    Raises as `train` does; what is wrong with a baseline is said before the run begins.
    """
    baselines = comparison_baselines(config)
    if not resume:
        for planned in (config, *baselines):
            check_unused(planned)
    reports = [train(config, resume=resume and holds_run(directory_of(config)))]
    limits = {"token_budget": reports[0]["generated_tokens"], "steps": MOST_STEPS_OF_BASELINE * config.steps}
    for baseline in baselines:
        limited = baseline.model_copy(update=limits)
        reports.append(train(limited, resume=resume and holds_run(directory_of(limited))))
    text = json.dumps(reports, indent=2) + "\n"
    write_text(directory_of(config) / "comparison.json", text)
    return reports


@contextmanager
def _prepared(config: RunConfig) -> Iterator[_Prepared]:
    """Look for the model, read the data and load the reward function, which needs no Ray; stop it afterwards."""
    if not is_made_first(config):
        check_model(config)
    check, notes = row_check(config.reward), list[str]()
    rows = {split: read_rows(config, split, check, notes.append) for split in SPLITS}
    columns = {name for split in rows.values() for row in split for name in row.columns}
    rewards = make_rewards(config.reward, columns, config.data)
    try:
        reading = asyncio.run(rewards.start())
        rows = {split: with_columns(of_split, reading.columns) for split, of_split in rows.items()}
        yield _Prepared(rows, rewards, notes)
    finally:
        asyncio.run(rewards.close())


def _run_in(directory: RunDirectory, config: RunConfig, prepared: _Prepared) -> dict[str, Any]:
    log_path = directory.log / LOG_NAME
    with quiet_output(directory.log) as terminal:
        display = Display(terminal)
        display.start()
        outcome: dict[str, Any] | Exception
        try:
            outcome = _run(directory, config, prepared, display)
            display.show(final_table(outcome, directory.path))
        except InputError as error:
            outcome = InputError(str(error))
        except (Interrupted, KeyboardInterrupt):
            outcome = Interrupted()
        except PartError as error:
            log.exception("the run failed")
            outcome = RunFailedError(str(error), log_path)
        except Exception as error:
            log.exception("the run failed unexpectedly")
            outcome = RunFailedError(f"unexpected {type(error).__name__}: {error}", log_path)
        finally:
            display.stop()
    # Raised anew, here: what the first error's frames held, and complains when it is collected, did so in the log.
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _run(directory: RunDirectory, config: RunConfig, prepared: _Prepared, display: Display) -> dict[str, Any]:
    started = time.monotonic()
    for damage in directory.set_damaged_checkpoints_aside():
        text = f"{damage}; it is set aside, and the checkpoint before it is taken"
        log.warning(text)
        display.message(text)
    state = newest_state(directory)
    if is_finished(config, state) and directory.report.is_file():
        limit = "steps" if state.step >= config.steps else "token_budget"
        display.message(f"{directory.path} is finished after {state.step} steps; raise `{limit}` to continue it")
        return cast(dict[str, Any], json.loads(directory.report.read_text(encoding="utf-8")))
    # Without a checkpoint the run begins anew, evaluations included: they leave their mark on the thresholds.
    directory.truncate(state.step if directory.checkpoint_steps() else -1)
    digest = prepared.digest
    if state.data not in ("", digest):
        raise InputError(
            f"the data is not what {directory.path} was trained on so far (rows were added, removed or changed), so "
            "its place in it means nothing: restore the data, or go on under another name with --fork NAME"
        )
    state = state.model_copy(update={"data": digest})
    if state.step:
        display.message(f"continuing {directory.path} after step {state.step}")
    with closing(RunRecord(directory, state.step + 1)) as record:
        with PeakMemory() as memory:
            ensure_model(config, lambda phase, done, total: display.phase(f"warm start: {phase}", done, total))
            problems = _problems(config, prepared, display)
            display.phase("starting Ray")
            with ray_cluster(config, directory.log.resolve()), closing(TrajectoryWriter()) as writer:
                driver = _driver(directory, config, state, prepared, problems, record, display, writer)
                asyncio.run(driver.run())
        seconds = {"start": driver.start_seconds, "process": time.monotonic() - started}
        return _conclude(directory, config, record, seconds, memory.peak_gib)


def _problems(config: RunConfig, prepared: _Prepared, display: Display) -> Problems:
    display.phase("reading the tokenizer and the prompts")
    tokenizer = load_tokenizer(config)
    check_tokenizer(config, tokenizer)

    def note(text: str) -> None:
        log.warning(text)
        display.message(text)

    for text in prepared.notes:
        note(text)
    return make_problems(config, tokenizer, make_prompt_sets(config, tokenizer, prepared.rows, note), note)


def _driver(
    directory: RunDirectory,
    config: RunConfig,
    state: DriverState,
    prepared: _Prepared,
    problems: Problems,
    record: RunRecord,
    display: Display,
    writer: TrajectoryWriter,
) -> Driver:
    config = with_absolute_model(config)
    learner = LearnerGroup(config, directory.log.resolve())
    parts = Parts(load_rollouts(), learner, prepared.rewards, writer.write)
    return Driver(config, directory, state, parts, problems, record, display)


def load_rollouts() -> Rollouts:
    """The rollout side, by name: `learner` must not import `rollout_server`."""
    module, _, name = ROLLOUTS.partition(":")
    return cast(Rollouts, getattr(importlib.import_module(module), name)())


def _conclude(
    directory: RunDirectory, config: RunConfig, record: RunRecord, seconds: Mapping[str, float], peak_memory_gib: float
) -> dict[str, Any]:
    metrics, evaluations = record.metrics, record.evaluations
    with part("plots"):
        draw_plots(directory.plots, metrics, evaluations)
    report = build_report(config.name, config.preset, metrics, evaluations, seconds, peak_memory_gib)
    write_report(directory.report, report)
    return report


def show_comparison(reports: Sequence[Mapping[str, Any]]) -> None:
    """Print the runs side by side."""
    Display(sys.stdout).show(comparison_table(reports))
