"""A run's directory `runs/<name>/`: who may use it, and how files get into it without ever being half-written."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from common.config import ConfigError, RunConfig, dump_yaml, load_config
from common.manifest import DamagedError, verify_manifest
from learner.run.errors import DiskFullError, InputError, writing

CONFIG = "config.yaml"
LOCK = ".lock"
PARTIAL = ".partial"
DAMAGED = ".damaged"
CHECKPOINT_STATE = "driver.json"
CHANGEABLE_ON_RESUME = (
    "steps",
    "token_budget",
    "evaluation.every_steps",
    "checkpoint",
    "warnings",
    "runs_directory",
    "sync",
    "learner.step_seconds",
    "learner.tokens_per_microbatch",
    "learner.gradient_checkpointing",
    "learner.threads_per_rank",
    "learner.max_restarts_in_a_row",
    "data.generate_seconds",
    "reward.timeout_seconds",
    "reward.workers",
    "reward.start_seconds",
    "reward.on_error",
    "reward.max_error_share",
    "rollout.engine",
)
"""Settings, and parts of the configuration, that may differ from the stored ones when a run is resumed: how long it
goes on and what it leaves, deadlines, memory, where and on how many replicas it runs. None changes what is learnt from
a response; `docs/training.md` says what each does change."""

_CHANGEABLE = tuple(f"{setting}." for setting in CHANGEABLE_ON_RESUME)


class RunDirectory:
    """One run's files. Made by `create` or `resume`, which lock it; `close` gives it back.

    `config.yaml`, `metrics.jsonl`, `evaluations.jsonl`, `ledger.jsonl`, `report.json`, TensorBoard events in
    `tensorboard/`, `trajectories/step_N.parquet`, `checkpoints/step_N/`, `plots/*.png`, `log/`, and `policy/`, the
    final model.
    """

    def __init__(self, path: Path, lock: FileLock) -> None:
        self.path = path
        self._lock = lock
        self.log = path / "log"
        self.tensorboard = path / "tensorboard"
        self.trajectories = path / "trajectories"
        self.checkpoints = path / "checkpoints"
        self.plots = path / "plots"
        self.policy = path / "policy"
        self.metrics = path / "metrics.jsonl"
        self.evaluations = path / "evaluations.jsonl"
        self.ledger = path / "ledger.jsonl"
        self.report = path / "report.json"

    @classmethod
    def create(cls, config: RunConfig) -> "RunDirectory":
        """A new run's directory. Raises InputError if it holds a run already."""
        path = directory_of(config)
        check_unused(config)
        directory = cls(path, _locked(path))
        directory._prepare(config)
        return directory

    @classmethod
    def resume(cls, config: RunConfig) -> "RunDirectory":
        """An earlier run's directory. Raises InputError if there is none or its configuration is another."""
        check_resumable(config)
        path = directory_of(config)
        directory = cls(path, _locked(path))
        try:
            check_resumable(config)
        except InputError:
            directory.close()
            raise
        directory._prepare(config)
        return directory

    def close(self) -> None:
        """Give the directory back."""
        self._lock.release()

    def discard(self, forked: bool = False) -> None:
        """Delete a new run that could not begin, unless it holds a step or a checkpoint by now.

        `forked`: those that it holds are another run's.
        """
        if forked or (not self.metrics.exists() and not self.checkpoint_steps()):
            shutil.rmtree(self.path)

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint after `step` steps lies."""
        return self.checkpoints / f"step_{step}"

    def checkpoint_steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first. What is half-written has another name."""
        return self.steps_in(self.checkpoints)

    @staticmethod
    def steps_in(checkpoints: Path) -> list[int]:
        """The same, of another run's directory of checkpoints."""
        found = (re.fullmatch(r"step_(\d+)", path.name) for path in checkpoints.glob("step_*"))
        return sorted(int(match[1]) for match in found if match)

    def set_damaged_checkpoints_aside(self) -> list[str]:
        """Rename the newest checkpoints until one is whole; returns what was wrong with those before it.

        Raises InputError, and renames nothing, if there are checkpoints and all are damaged.
        """
        damaged: list[tuple[Path, str]] = []
        for step in reversed(self.checkpoint_steps()):
            path = self.checkpoint(step)
            try:
                verify_manifest(path)
                break
            except DamagedError as error:
                damaged.append((path, f"{path} is damaged: {error}"))
        else:
            if damaged:
                raise InputError(
                    "\n".join(text for _, text in damaged) + f"\n{self.path} has no checkpoint that is whole: restore "
                    f"one, or delete {self.checkpoints} to begin anew"
                )
        for path, _ in damaged:
            aside = path.with_name(path.name + DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        return [text for _, text in damaged]

    def delete_old_checkpoints(self, every: int, keep: int) -> None:
        """Delete all but the newest checkpoint and the newest `keep` of every `every`-th step (0: of any).

        Where there are fewer of these, other steps' take their place, so that `keep` there are. Those that were set
        aside go with the steps that they were of.
        """
        steps = self.checkpoint_steps()
        regular = [step for step in steps if every == 0 or step % every == 0]
        kept = {*regular[-keep:], *steps[-1:]}
        kept |= {*[step for step in steps if step not in kept][len(steps) - max(keep, len(kept)) :]}
        for step in steps:
            if step not in kept:
                self._delete_checkpoint(step)
        for aside in self.checkpoints.glob(f"step_*{DAMAGED}"):
            number = aside.name.removeprefix("step_").removesuffix(DAMAGED)
            if number.isdecimal() and steps and int(number) <= steps[-1]:
                shutil.rmtree(aside)

    def truncate(self, step: int) -> None:
        """Forget everything after `step` steps: it is about to be done again."""
        for path in filter(Path.exists, (self.metrics, self.evaluations, self.ledger)):
            kept = [line for line in read_jsonl(path) if line["step"] <= step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        for path in self.trajectories.glob("step_*.parquet"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()
        for later in self.checkpoint_steps():
            if later > step:
                self._delete_checkpoint(later)
        self.report.unlink(missing_ok=True)

    def _delete_checkpoint(self, step: int) -> None:
        old = self.checkpoint(step)
        gone = old.with_name(old.name + PARTIAL)
        # Renamed first: a deletion that stops half-way must not leave what looks like a checkpoint.
        old.rename(gone)
        shutil.rmtree(gone)

    def _prepare(self, config: RunConfig) -> None:
        # First: a directory with anything else but no configuration could be neither resumed nor begun.
        write_text(self.path / CONFIG, dump_yaml(config))
        with writing(self.path):
            for directory in (self.log, self.tensorboard, self.trajectories, self.checkpoints, self.plots):
                directory.mkdir(exist_ok=True)
            for place in (self.path, self.checkpoints):
                for old in place.glob(f"*.old{PARTIAL}"):
                    path = old.with_name(old.name.removesuffix(f".old{PARTIAL}"))
                    if not path.exists():
                        old.rename(path)
                for partial in place.glob(f"*{PARTIAL}"):
                    shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def directory_of(config: RunConfig) -> Path:
    """Where a run with this configuration writes."""
    return Path(config.runs_directory) / config.name


def check_unused(config: RunConfig) -> None:
    """Raise InputError if the run's directory holds a run already, or can't be a directory."""
    path = directory_of(config)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} exists and is no directory: choose another --name")
    if holds_run(path):
        raise InputError(
            f"{path} already holds a run, and runs are never overwritten: continue it with --resume, or choose "
            "another --name"
        )


def holds_run(path: Path) -> bool:
    """Whether a directory holds more than the configuration that a dry run leaves."""
    return path.is_dir() and any(entry.name not in (CONFIG, LOCK) for entry in path.iterdir())


def can_continue(config: RunConfig) -> bool:
    """Whether the run's directory holds a run, however little of it, that can be resumed."""
    path = directory_of(config)
    return (path / CONFIG).is_file() and holds_run(path)


def write_dry_run(config: RunConfig) -> Path | None:
    """Leave the resolved configuration in the run's directory, unless a run is there; returns where."""
    path = directory_of(config)
    if holds_run(path):
        return None
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    write_text(path / CONFIG, dump_yaml(config))
    return path / CONFIG


def stored_config(path: Path) -> RunConfig:
    """The configuration that a run was started with."""
    try:
        return load_config(path / CONFIG)
    except ConfigError as error:
        raise InputError(f"the stored configuration of {path} can't be used: {error}") from error


def check_resumable(config: RunConfig) -> None:
    """Raise InputError unless there is a run in the directory of `config` that it continues."""
    path = directory_of(config)
    if not (path / CONFIG).is_file():
        raise InputError(f"{path} holds no run to resume")
    # A run that failed before it kept anything may have failed of its configuration.
    kept = (path / "evaluations.jsonl", path / "metrics.jsonl")
    if any(file.exists() for file in kept) or RunDirectory.steps_in(path / "checkpoints"):
        check_same_run(stored_config(path), config)


def check_same_run(stored: RunConfig, given: RunConfig) -> None:
    """Raise InputError, listing the differences, unless `given` continues the run of `stored`."""
    differing = [line for key, line in differences(stored, given) if not f"{key}.".startswith(_CHANGEABLE)]
    if differing:
        raise InputError(
            "the configuration is not that of the run to resume:\n"
            + "\n".join(differing)
            + f"\nOnly {', '.join(CHANGEABLE_ON_RESUME)} may change; --fork NAME goes on from its checkpoint "
            "under another name, with other settings"
        )


def differences(stored: RunConfig, given: RunConfig) -> list[tuple[str, str]]:
    """Each setting that differs, by name, with a line that says how."""
    before, now = dict(_flat(stored.model_dump(mode="json"))), dict(_flat(given.model_dump(mode="json")))
    return [
        (key, f"  {key}: {before.get(key, 'not set')!r} in the run, {now.get(key, 'not set')!r} now")
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _locked(path: Path) -> FileLock:
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"another process is using {path}: wait for it, or choose another --name") from error
    except OSError as error:
        raise InputError(f"{path} can't be written to: {error.strerror or error}") from error
    return lock


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; it takes the place of `path` when the block ends without an error, and only then."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with writing(path):
            yield partial
            if partial.is_file():
                _flush_to_disk(partial)
            old = path.with_name(f"{path.name}.old{PARTIAL}")
            if path.is_dir():
                # Renamed, not deleted: at no moment may there be neither the old one nor the new one.
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            partial.replace(path)
            _flush_to_disk(path.parent)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise


def require_space(path: Path, size: int) -> None:
    """Raise DiskFullError if `size` bytes at `path` would not fit.

    For files that libraries write, of which some answer to a full disk with an error that does not say so.
    """
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise DiskFullError(path, f"it needs about {size:,} bytes, {free:,} are free")


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Append one line or nothing: what is there stays as it was if the disk is full."""
    with writing(path), path.open("ab", buffering=0) as file:
        size = file.tell()
        data = (line + "\n").encode()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects in a JSON-lines file; a last line that a killed process left unfinished is not one.

    Raises InputError that names the line, if another is damaged.
    """
    if not path.is_file():
        return []
    objects = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            objects.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}, line {number} is damaged: {error}") from error
    return objects


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
