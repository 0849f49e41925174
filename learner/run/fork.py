"""Forking: a new run that goes on from another's checkpoint, with other settings. The other run is left as it is."""

import json
import os
import shutil
from pathlib import Path

from common.config import RunConfig
from common.manifest import DamagedError, verify_manifest, write_manifest
from learner.loop.driver_state import DriverState, save_state
from learner.loop.ledger import LedgerState
from learner.run.errors import InputError, writing
from learner.run.run_directory import (
    CHECKPOINT_STATE,
    CONFIG,
    RunDirectory,
    differences,
    read_jsonl,
    replacing,
    stored_config,
    write_text,
)

FORK = "fork.json"
FIXED_ON_FORK = (
    "model.path",
    "model.revision",
    "model.dtype",
    "learner.ranks",
    "learner.zero_stage",
    "learner.grad_accum_dtype",
)
"""Settings that a checkpoint's files depend on: whose weights they are, how they are divided among the ranks, and which
of DeepSpeed's optimizers wrote them."""

_DECIDES_EVALUATIONS = ("evaluation", "data", "reward", "rollout", "model")


def check_fork(source: Path, config: RunConfig) -> None:
    """Raise InputError unless a run with `config` can go on from a checkpoint of the run in `source`."""
    if not (source / CONFIG).is_file():
        raise InputError(f"{source} holds no run to fork")
    if not list((source / "checkpoints").glob("step_*")):
        raise InputError(f"{source} has no checkpoint to fork")
    fixed = tuple(f"{setting}." for setting in FIXED_ON_FORK)
    impossible = [line for key, line in differences(stored_config(source), config) if f"{key}.".startswith(fixed)]
    if impossible:
        raise InputError(
            f"the checkpoints of {source} can't be continued with other values of these settings:\n"
            + "\n".join(impossible)
        )


def fork(source: Path, directory: RunDirectory, config: RunConfig, data: str) -> list[str]:
    """Begin the new run in `directory` with the newest whole checkpoint of `source`; returns what to tell the user.

    Metrics and evaluations up to there come with it; evaluations only if what they measure is the same. `data`: digest
    of the new run's rows. If they are others, they are read from their beginning.
    """
    before = stored_config(source)
    told: list[str] = []
    step, state = _copy_newest(source, directory, data, told)
    changed = [(key, line.strip()) for key, line in differences(before, config) if key != "name"]
    same_data = state.data in ("", data)
    same_measure = _measures_the_same([key for key, _ in changed], state, data)
    kept = {"metrics.jsonl": True, "ledger.jsonl": same_data, "evaluations.jsonl": same_measure}
    for name, keep in kept.items():
        if keep and (lines := [line for line in read_jsonl(source / name) if line["step"] <= step]):
            write_text(directory.path / name, "".join(json.dumps(line) + "\n" for line in lines))
    origin = {"run": str(source), "step": step, "changed": [line for _, line in changed]}
    write_text(directory.path / FORK, json.dumps(origin, indent=2) + "\n")
    return [*told, f"going on from step {step} of {source} as {directory.path}, with {len(changed)} other settings"]


def has_only_begun(directory: RunDirectory) -> bool:
    """Whether a forked run holds nothing but what it was begun with."""
    path = directory.path / FORK
    step = json.loads(path.read_text(encoding="utf-8"))["step"] if path.is_file() else 0
    return directory.checkpoint_steps() == [step] and all(
        line["step"] <= step for line in read_jsonl(directory.metrics)
    )


def _measures_the_same(changed: list[str], state: DriverState, data: str) -> bool:
    decisive = [key for key in changed if key.split(".")[0] in _DECIDES_EVALUATIONS]
    harmless = ("evaluation.every_steps", "rollout.engine.", "rollout.group_share.", "rollout.treatment.")
    return state.data in ("", data) and all(key.startswith(harmless) for key in decisive)


def _copy_newest(source: Path, directory: RunDirectory, data: str, told: list[str]) -> tuple[int, DriverState]:
    """Bring the newest whole checkpoint into `directory`; returns its step, and its state as it was in `source`."""
    steps = RunDirectory.steps_in(source / "checkpoints")
    for step in reversed(steps):
        origin = source / "checkpoints" / f"step_{step}"
        target = directory.checkpoint(step)
        try:
            with writing(target):
                shutil.copytree(origin, target.with_name(target.name + ".copied"), copy_function=_link)
            copy = target.with_name(target.name + ".copied")
            verify_manifest(copy)
        except DamagedError as error:
            told.append(f"{origin} is damaged: {error}; the checkpoint before it is taken")
            shutil.rmtree(target.with_name(target.name + ".copied"))
            continue
        state = DriverState.model_validate_json((copy / CHECKPOINT_STATE).read_bytes())
        with replacing(target) as partial:
            copy.rename(partial)
            if state.data not in ("", data):
                told.append(f"the data is not that of {source}: it is read from its beginning")
                save_state(partial, state.model_copy(update={"ledger": LedgerState(), "data": data}))
                write_manifest(partial)
        return step, state
    raise InputError("\n".join([*told, f"{source} has no checkpoint that is whole"]))


def _link(origin: str, target: str) -> None:
    """The same file under a second name: no file of a checkpoint is ever written to again."""
    try:
        os.link(origin, target)
    except OSError:
        shutil.copy2(origin, target)
