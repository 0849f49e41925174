"""Problems of the package `reasoning-gym`, which makes them from a seed.

Some of its tasks depend on the order of Python's sets, which differs from process to process. So problems are made in a
process of their own with a fixed order: a resumed run then finds the same ones. A task that hangs is killed with it.
"""

import dataclasses
import difflib
import functools
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common.config.base import StrictModel
from common.config.data import ReasoningGymData
from common.seeds import derive_seed
from learner.environments.tasks import Split
from learner.run.errors import InputError

PACKAGE = "reasoning-gym"
DRAWS_EACH = 20
"""How often a task may be asked, for each problem that is wanted, before it counts as exhausted."""
LARGEST_SEED = 2**31
"""numpy's generators, which some tasks use, take no larger ones."""

Entry = dict[str, Any]
"""A problem as the package has it: `question`, `answer` (null where several are right), `metadata`."""


class Task(StrictModel):
    """Which problems to make."""

    name: str
    config: dict[str, Any]
    size: int
    test_size: int
    seed: int

    @classmethod
    def of(cls, data: ReasoningGymData, seed: int) -> "Task":
        """`seed`: the run's."""
        own = seed if data.seed is None else data.seed
        return cls(name=data.name, config=data.config, size=data.size, test_size=data.test_size, seed=own)


@dataclasses.dataclass(frozen=True, slots=True)
class Problems:
    """The problems of both splits, and a line about the task."""

    train: list[Entry]
    test: list[Entry]
    description: str


def read_problems(data: ReasoningGymData, seed: int) -> Problems:
    """The task's problems, the same for the same arguments in every process.

    Raises InputError: the package is missing, the name or an option unknown, an option's value not possible, too few
    problems, or none in time.
    """
    return _from_own_process(Task.of(data, seed).model_dump_json(), data.generate_seconds)


# Whoever asks for one split asks for the other next.
@functools.lru_cache(maxsize=1)
def _from_own_process(task: str, seconds: float) -> Problems:
    with tempfile.TemporaryDirectory(prefix="e3rl-problems-") as folder:
        result = Path(folder) / "problems"
        command = [sys.executable, "-m", __name__, str(result), task]
        environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            made = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            raise InputError(
                f"data: {PACKAGE} did not make the problems within {seconds:g} s (data.generate_seconds)"
            ) from None
        if made.returncode or not result.is_file():
            last = next(reversed(made.stderr.strip().splitlines()), f"exit status {made.returncode}")
            raise InputError(f"data: the process that makes problems with {PACKAGE} failed: {last}")
        found = pickle.loads(result.read_bytes())
    if isinstance(found, str):
        raise InputError(found)
    return Problems(*found)


def make_dataset(name: str, config: dict[str, Any], seed: int, size: int) -> Any:
    """The package's own data set. Raises InputError that says what is wrong with the name or the options."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise InputError(f"data.kind 'reasoning_gym' needs the package: pip install {PACKAGE} ({error})") from error
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, 3, 0.5)
        hint = f"; there is {', '.join(map(repr, near))}" if near else ""
        raise InputError(f"data.name: {PACKAGE} has no task {name!r} among its {len(DATASETS)}{hint}")
    fields = {field.name: field for field in dataclasses.fields(DATASETS[name][1])}
    options = sorted(fields.keys() - {"seed", "size"})
    if unknown := sorted(config.keys() - fields.keys()):
        raise InputError(f"data.config: {name!r} has no option {', '.join(unknown)}; it has {', '.join(options)}")
    try:
        given = {key: _as_field(key, value, fields[key].default) for key, value in config.items()}
        return create_dataset(name, **given, seed=seed, size=size)
    except InputError:
        raise
    except Exception as error:
        # Its tasks check their options with assertions, and fail at what those leave out.
        raise InputError(f"data.config: {name!r} can't be made: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What an assertion says alone, of any other exception also its kind."""
    return str(error) if isinstance(error, AssertionError) and str(error) else f"{type(error).__name__}: {error}"


def _as_field(key: str, value: Any, default: Any) -> Any:
    """A value of YAML as the field has it: a tuple, or the parts of a mixture of tasks."""
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(value)
    if key == "datasets":
        from reasoning_gym.composite import DatasetSpec

        if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
            raise InputError("data.config.datasets must be a list of {name, weight, config}")
        return [DatasetSpec(**{"weight": 1.0, "config": {}} | part) for part in value]
    return value


def draw(task: Task) -> tuple[list[Entry], list[Entry], str]:
    """What `Problems` holds: distinct problems, of which no training problem is a held-out one."""
    test = _distinct(task, "test", task.test_size, set())
    train = _distinct(task, "train", task.size, {entry["question"] for entry in test})
    config = make_dataset(task.name, task.config, 0, 1).config
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in ("seed", "size")}
    shown = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return train, test, f"{task.name} of {PACKAGE}, {shown}"


def _distinct(task: Task, split: Split, count: int, left_out: set[str]) -> list[Entry]:
    draws = DRAWS_EACH * count
    dataset = make_dataset(task.name, task.config, derive_seed(task.seed, PACKAGE, split) % LARGEST_SEED, draws)
    found: dict[str, Entry] = {}
    for number in range(draws):
        try:
            entry = dataset[number]
        except Exception as error:
            raise InputError(f"data: problem {number} of {task.name!r} can't be made: {_reason(error)}") from error
        if entry["question"] not in left_out:
            found.setdefault(entry["question"], entry)
        if len(found) == count:
            return list(found.values())
    setting = "data.size" if split == "train" else "data.test_size"
    raise InputError(
        f"data: {task.name!r} has only {len(found)} distinct {split} problems in {draws:,} tries, {setting} asks for "
        f"{count}: lower it, or widen the task with data.config"
        + (" (held-out problems are left out of training)" if split == "train" else "")
    )


def _main(result: str, task: str) -> None:
    """What the process of its own does. Writes what `draw` returns, as built-in types, or what is wrong."""
    try:
        found: Any = draw(Task.model_validate_json(task))
    except InputError as error:
        found = str(error)
    Path(result).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
