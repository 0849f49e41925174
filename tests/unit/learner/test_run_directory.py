"""A run's directory: never shared, never overwritten, never half-written, not even on a full disk."""

import gc
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.config import RunConfig, load_config
from common.manifest import MANIFEST, write_manifest
from learner.loop.driver_state import DriverState, newest_state, save_state
from learner.run.errors import DiskFullError, InputError
from learner.run.run_directory import (
    RunDirectory,
    append_line,
    can_continue,
    check_unused,
    read_jsonl,
    replacing,
    require_space,
    write_dry_run,
    write_text,
)
from learner.run.trajectory_files import read_trajectories, write_trajectories
from tests.configs import run_config
from tests.trajectories import random_groups, unpacked


def config(tmp_path: Path, **changes: Any) -> RunConfig:
    return run_config(name="run", runs_directory=str(tmp_path / "runs"), **changes)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses to write past `size` bytes of any file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def add_checkpoint(directory: RunDirectory, step: int) -> None:
    directory.checkpoint(step).mkdir()
    save_state(directory.checkpoint(step), DriverState(step=step, generated_tokens=100 * step))
    (directory.checkpoint(step) / "learner").mkdir()
    (directory.checkpoint(step) / "learner" / "weights").write_bytes(random.Random(step).randbytes(300))
    write_manifest(directory.checkpoint(step))


def test_a_new_run_stores_its_configuration_and_its_places(tmp_path: Path):
    given = config(tmp_path)
    directory = RunDirectory.create(given)
    assert load_config(directory.path / "config.yaml") == given
    for place in (directory.log, directory.checkpoints, directory.trajectories, directory.plots):
        assert place.is_dir()


def test_a_run_is_never_overwritten(tmp_path: Path):
    directory = RunDirectory.create(config(tmp_path))
    append_line(directory.metrics, '{"step": 1}')
    directory.close()
    with pytest.raises(InputError, match=r"already holds a run.*--resume.*--name"):
        RunDirectory.create(config(tmp_path, steps=9))
    assert read_jsonl(directory.metrics) == [{"step": 1}]
    assert load_config(directory.path / "config.yaml").steps == 4


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run").write_text("mine")
    with pytest.raises(InputError, match="is no directory"):
        check_unused(config(tmp_path))


def test_what_a_dry_run_leaves_does_not_count_as_a_run(tmp_path: Path):
    given = config(tmp_path)
    assert write_dry_run(given) == tmp_path / "runs" / "run" / "config.yaml"
    RunDirectory.create(given).close()
    assert write_dry_run(given) is None


def test_a_second_process_can_not_use_the_directory(tmp_path: Path):
    directory = RunDirectory.create(config(tmp_path))
    code = (
        "from filelock import FileLock, Timeout\n"
        "import sys\n"
        "try:\n    FileLock(sys.argv[1]).acquire(timeout=0)\n"
        "except Timeout:\n    sys.exit(7)\n"
    )
    taken = subprocess.run([sys.executable, "-c", code, str(directory.path / ".lock")], check=False)
    assert taken.returncode == 7
    with pytest.raises(InputError, match="another process is using"):
        RunDirectory.resume(config(tmp_path))
    directory.close()
    RunDirectory.resume(config(tmp_path)).close()


def test_resuming_nothing_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="holds no run to resume"):
        RunDirectory.resume(config(tmp_path))


def test_resuming_with_another_configuration_lists_the_differences(tmp_path: Path):
    directory = RunDirectory.create(config(tmp_path))
    append_line(directory.metrics, '{"step": 1}')
    directory.close()
    free: dict[str, Any] = {
        "steps": 9,
        "checkpoint": {"every_steps": 1},
        "learner": {"step_seconds": 99.0, "tokens_per_microbatch": 4096, "gradient_checkpointing": True},
        "sync": {"deadline_seconds": 98.0},
        "rollout": {"engine": {"response_seconds": 97.0, "max_concurrent_responses": 8, "replicas": 3}},
    }
    # Accuracy before and after would be of other problems.
    changed = config(tmp_path, **free, seed=5, evaluation={"problems": 3, "every_steps": 2})
    with pytest.raises(InputError) as caught:
        RunDirectory.resume(changed)
    differences = [line.strip() for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert differences == ["evaluation.problems: 64 in the run, 3 now", "seed: 0 in the run, 5 now"]
    RunDirectory.resume(config(tmp_path, **free, evaluation={"every_steps": 2})).close()
    assert load_config(directory.path / "config.yaml").steps == 9


def test_a_run_that_was_moved_is_resumed_where_it_lies(tmp_path: Path):
    directory = RunDirectory.create(config(tmp_path))
    append_line(directory.metrics, '{"step": 1}')
    directory.close()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").rename(tmp_path / "elsewhere" / "runs")
    moved = RunDirectory.resume(config(tmp_path / "elsewhere"))
    moved.close()
    assert read_jsonl(moved.metrics) == [{"step": 1}]


def test_a_run_that_has_measured_nothing_may_be_resumed_with_other_settings(tmp_path: Path):
    RunDirectory.create(config(tmp_path)).close()
    RunDirectory.resume(config(tmp_path, seed=5)).close()
    assert load_config(tmp_path / "runs" / "run" / "config.yaml").seed == 5


def test_a_run_with_a_checkpoint_alone_goes_on_with_its_own_settings_only(tmp_path: Path):
    directory = RunDirectory.create(config(tmp_path))
    add_checkpoint(directory, 0)
    directory.close()
    with pytest.raises(InputError, match="seed: 0 in the run, 5 now"):
        RunDirectory.resume(config(tmp_path, seed=5))


def test_only_whole_checkpoints_count_and_the_newest_are_kept(tmp_path: Path):
    directory = RunDirectory.create(config(tmp_path))
    for step in (8, 9, 10):
        add_checkpoint(directory, step)
    (directory.checkpoints / "step_12.partial").mkdir()
    assert directory.checkpoint_steps() == [8, 9, 10]
    assert newest_state(directory).step == 10
    directory.delete_old_checkpoints(1, 2)
    assert directory.checkpoint_steps() == [9, 10]


@pytest.mark.parametrize(
    ("every", "keep", "steps", "kept"),
    [
        (10, 2, [9, 10, 20, 30, 31], [20, 30, 31]),
        (10, 2, [20, 30, 31, 32], [20, 30, 32]),
        (10, 2, [20, 30, 39, 40], [30, 40]),
        (10, 2, [1, 2, 3], [2, 3]),
        (10, 1, [1, 2, 3], [3]),
        (10, 3, [8, 9, 10, 11], [9, 10, 11]),
        (0, 2, [1, 2, 3], [2, 3]),
        (5, 2, [], []),
    ],
)
def test_the_newest_checkpoint_is_kept_beside_the_regular_ones(
    tmp_path: Path, every: int, keep: int, steps: list[int], kept: list[int]
):
    directory = RunDirectory.create(config(tmp_path))
    for step in steps:
        directory.checkpoint(step).mkdir()
    directory.delete_old_checkpoints(every, keep)
    assert directory.checkpoint_steps() == kept


def damage(directory: RunDirectory, step: int) -> None:
    path = directory.checkpoint(step) / "learner" / "weights"
    path.write_bytes(path.read_bytes()[:-1])


def test_damaged_checkpoints_are_set_aside_and_the_one_before_them_is_taken(tmp_path: Path):
    directory = RunDirectory.create(config(tmp_path))
    for step in (3, 4, 5):
        add_checkpoint(directory, step)
    damage(directory, 5)
    (directory.checkpoint(4) / MANIFEST).unlink()
    said = directory.set_damaged_checkpoints_aside()
    assert ["step_5" in said[0], "step_4" in said[1], len(said)] == [True, True, 2]
    assert "learner/weights has 299 bytes, 300 were written" in said[0]
    assert directory.checkpoint_steps() == [3]
    assert newest_state(directory).step == 3
    assert directory.set_damaged_checkpoints_aside() == []
    # Kept to be looked at, until the run is past them.
    assert sorted(path.name for path in directory.checkpoints.iterdir()) == [
        "step_3",
        "step_4.damaged",
        "step_5.damaged",
    ]
    add_checkpoint(directory, 4)
    directory.delete_old_checkpoints(1, 2)
    assert sorted(path.name for path in directory.checkpoints.iterdir()) == ["step_3", "step_4", "step_5.damaged"]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew_by_itself(tmp_path: Path):
    directory = RunDirectory.create(config(tmp_path))
    for step in (3, 4):
        add_checkpoint(directory, step)
        damage(directory, step)
    with pytest.raises(InputError, match=r"(?s)step_4 is damaged.*step_3 is damaged.*no checkpoint that is whole"):
        directory.set_damaged_checkpoints_aside()
    assert directory.checkpoint_steps() == [3, 4]


def test_a_checkpoint_that_was_being_replaced_when_the_process_died_is_still_there(tmp_path: Path):
    directory = RunDirectory.create(config(tmp_path))
    add_checkpoint(directory, 3)
    directory.checkpoint(3).rename(directory.checkpoints / "step_3.old.partial")
    directory.close()
    again = RunDirectory.resume(config(tmp_path))
    assert again.set_damaged_checkpoints_aside() == []
    assert newest_state(again).step == 3


def test_going_back_to_a_checkpoint_forgets_what_came_after(tmp_path: Path):
    directory = RunDirectory.create(config(tmp_path))
    for step in range(1, 6):
        append_line(directory.metrics, json.dumps({"step": step}))
        (directory.trajectories / f"step_{step}.parquet").write_text("x")
        add_checkpoint(directory, step)
    append_line(directory.evaluations, '{"step": 0}')
    append_line(directory.evaluations, '{"step": 5}')
    write_text(directory.report, "{}")
    directory.truncate(3)
    assert directory.checkpoint_steps() == [1, 2, 3]
    assert [line["step"] for line in read_jsonl(directory.metrics)] == [1, 2, 3]
    assert read_jsonl(directory.evaluations) == [{"step": 0}]
    assert sorted(p.name for p in directory.trajectories.iterdir()) == [f"step_{n}.parquet" for n in (1, 2, 3)]
    assert not directory.report.exists()


@pytest.mark.parametrize("calls", range(8))
def test_a_run_that_was_killed_while_its_directory_was_made_can_be_begun_or_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
):
    original, made = Path.mkdir, 0

    class Killed(BaseException):
        pass

    def mkdir(path: Path, *arguments: Any, **options: Any) -> None:
        nonlocal made
        made += 1
        if made > calls:
            raise Killed
        original(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", mkdir)
        with suppress(Killed):
            RunDirectory.create(config(tmp_path)).close()
        gc.collect()  # The lock ends with its process.
    make = RunDirectory.resume if can_continue(config(tmp_path)) else RunDirectory.create
    make(config(tmp_path)).close()


def test_a_line_that_a_killed_process_left_unfinished_is_not_read(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "rew')
    assert read_jsonl(path) == [{"step": 1}]


def test_a_damaged_line_is_named(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\x00\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2 is damaged"):
        read_jsonl(path)


def test_a_write_that_fails_leaves_the_old_file_and_no_new_one(tmp_path: Path):
    path = tmp_path / "report.json"
    write_text(path, "old")

    def write_half() -> None:
        with replacing(path) as partial:
            partial.write_text("new")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_loses_nothing_and_says_what_to_do(tmp_path: Path):
    metrics, report = tmp_path / "metrics.jsonl", tmp_path / "report.json"
    append_line(metrics, json.dumps({"step": 1}))
    write_text(report, "old")
    with files_of_at_most(64):
        with pytest.raises(DiskFullError, match=r"the disk is full: cannot write .*metrics\.jsonl.*--resume"):
            append_line(metrics, json.dumps({"step": 2, "text": "x" * 200}))
        with pytest.raises(DiskFullError):
            write_text(report, "x" * 200)
    assert read_jsonl(metrics) == [{"step": 1}]
    assert metrics.read_text().endswith("}\n")
    assert report.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.json"]
    append_line(metrics, json.dumps({"step": 2}))
    assert [line["step"] for line in read_jsonl(metrics)] == [1, 2]


def test_a_file_that_fills_the_disk_keeps_its_whole_lines(tmp_path: Path):
    metrics = tmp_path / "metrics.jsonl"
    written = 0

    def fill() -> None:
        nonlocal written
        while True:
            append_line(metrics, json.dumps({"step": written, "text": "x" * 4000}))
            written += 1

    with files_of_at_most(2**16), pytest.raises(DiskFullError):
        fill()
    assert written == 16
    assert metrics.read_text().endswith("}\n")
    assert [line["step"] for line in read_jsonl(metrics)] == list(range(written))


def test_trajectories_that_do_not_fit_are_not_there(tmp_path: Path):
    path = tmp_path / "step_1.parquet"
    with files_of_at_most(2**12), pytest.raises(DiskFullError, match=r"step_1\.parquet"):
        write_trajectories(path, 1, random_groups(0, 8, 8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [lambda path: write_text(path, "new"), lambda path: write_trajectories(path, 1, [])])
def test_no_space_left_on_the_device_keeps_the_old_file(tmp_path: Path, write: Callable[[Path], None]):
    path = tmp_path / "file"
    write_text(path, "old")
    # The kernel answers every write to /dev/full with ENOSPC.
    (tmp_path / "file.partial").symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match="No space left on device"):
        write(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_will_not_fit_is_refused_with_the_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Of 20 free blocks 4 are reserved for root.
    blocks = SimpleNamespace(f_frsize=4096, f_blocks=32, f_bfree=20, f_bavail=16)
    monkeypatch.setattr(os, "statvfs", lambda path: blocks)
    require_space(tmp_path / "step_1", 65_536)
    with pytest.raises(DiskFullError, match=r"step_1 \(it needs about 100,000 bytes, 65,536 are free\)"):
        require_space(tmp_path / "step_1", 100_000)


def test_trajectories_come_back_as_they_were_written(tmp_path: Path):
    groups = random_groups(seed=3, groups=3, size=4)
    path = tmp_path / "step_7.parquet"
    write_trajectories(path, 7, groups)
    assert read_trajectories(path) == [t for group in groups for t in unpacked(group)]
