"""A run that goes on from another's checkpoint under another name."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.config import RunConfig
from common.config.loading import renamed
from learner.loop.driver_state import newest_state
from learner.loop.ledger import LedgerState
from learner.run.errors import InputError
from learner.run.fork import check_fork, fork
from learner.run.run_directory import RunDirectory, read_jsonl
from tests.fake_parts import FakeRollouts
from tests.unit.learner.test_driver import Killed, after, config, fail, run, timeless


def killed_run(tmp_path: Path) -> RunConfig:
    settings = config(tmp_path, "old")
    with pytest.raises(Killed):
        run(settings, FakeRollouts(after(5 + 2, fail(Killed()))))
    return settings


def forked(settings: RunConfig, tmp_path: Path, data: str = "") -> list[str]:
    source = tmp_path / "runs" / "old"
    check_fork(source, settings)
    directory = RunDirectory.create(settings)
    try:
        return fork(source, directory, settings, data)
    finally:
        directory.close()


def test_a_fork_without_changes_ends_as_the_run_would_have(tmp_path: Path):
    settings = renamed(killed_run(tmp_path), "new")
    before = sorted(path for path in (tmp_path / "runs" / "old").rglob("*") if path.is_file())
    forked(settings, tmp_path)
    whole = run(config(tmp_path, "whole"))
    gone_on = run(settings, resume=True)
    assert timeless(gone_on.directory) == timeless(whole.directory)
    assert newest_state(gone_on.directory) == newest_state(whole.directory)
    assert [e.step for e in gone_on.record.evaluations] == [0, 0, 6, 6]
    # What it came from is as it was, although the fork has deleted its own checkpoint of step 4.
    assert sorted(path for path in (tmp_path / "runs" / "old").rglob("*") if path.is_file()) == before
    assert json.loads((gone_on.directory.path / "fork.json").read_text())["step"] == 4
    resumed = run(config(tmp_path, "old"), resume=True)
    assert resumed.damage == []
    assert timeless(resumed.directory) == timeless(whole.directory)


def test_a_fork_may_have_other_settings_and_evaluates_what_it_measures(tmp_path: Path):
    killed_run(tmp_path)
    changes: dict[str, Any] = {"evaluation": {"problems": 2, "responses_per_problem": 2}, "seed": 9, "steps": 7}
    settings = config(tmp_path, "new", **changes)
    told = forked(settings, tmp_path)
    assert told[-1].startswith("going on from step 4 of ")
    origin = json.loads((tmp_path / "runs" / "new" / "fork.json").read_text())
    assert [line.split(":")[0] for line in origin["changed"]] == ["evaluation.problems", "seed", "steps"]
    gone_on = run(settings, resume=True)
    assert [line["step"] for line in read_jsonl(gone_on.directory.metrics)] == list(range(1, 8))
    assert [e.step for e in gone_on.record.evaluations] == [4, 4, 7, 7]


def test_a_fork_on_other_data_reads_it_from_its_beginning(tmp_path: Path):
    killed_run(tmp_path)
    state = newest_state(RunDirectory.resume(config(tmp_path, "old")))
    assert state.ledger.drawn > 0
    # The driver of these tests leaves the digest empty.
    path = tmp_path / "runs" / "old" / "checkpoints" / "step_4"
    from common.manifest import verify_manifest, write_manifest
    from learner.loop.driver_state import save_state

    save_state(path, state.model_copy(update={"data": "before"}))
    write_manifest(path)
    settings = config(tmp_path, "new")
    told = forked(settings, tmp_path, data="now")
    assert "the data is not that of" in told[0]
    directory = RunDirectory.resume(settings)
    assert directory.set_damaged_checkpoints_aside() == []
    new = newest_state(directory)
    assert (new.step, new.ledger, new.data) == (4, LedgerState(), "now")
    directory.close()
    verify_manifest(path)


def test_a_fork_takes_the_newest_checkpoint_that_is_whole(tmp_path: Path):
    settings = renamed(killed_run(tmp_path), "new")
    weights = tmp_path / "runs" / "old" / "checkpoints" / "step_4" / "learner" / "weight.json"
    weights.write_text("0")
    told = forked(settings, tmp_path)
    assert "step_4 is damaged" in told[0]
    assert RunDirectory.resume(settings).checkpoint_steps() == [2]
    weights.unlink()
    (weights.parents[2] / "step_2" / "driver.json").unlink()
    directory = RunDirectory.create(renamed(settings, "newer"))
    with pytest.raises(InputError, match="has no checkpoint that is whole"):
        fork(tmp_path / "runs" / "old", directory, renamed(settings, "newer"), "")


def test_settings_that_the_checkpoint_s_files_depend_on_can_not_change(tmp_path: Path):
    killed_run(tmp_path)
    source = tmp_path / "runs" / "old"
    impossible: list[dict[str, Any]] = [
        {"model": {"path": "other"}},
        {"model": {"dtype": "bfloat16"}},
        {"learner": {"ranks": 2}},
        {"learner": {"zero_stage": 3}},
    ]
    for changes in impossible:
        ((part, (name,)),) = changes.items()
        with pytest.raises(InputError, match=rf"{part}\.{name}"):
            check_fork(source, config(tmp_path, "new", **changes))
    possible: dict[str, Any] = {"learner": {"optimizer": {"learning_rate": 0.1}, "minibatches_per_step": 4}}
    check_fork(source, config(tmp_path, "new", **possible))
