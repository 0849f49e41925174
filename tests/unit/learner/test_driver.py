"""The training loop with a rollout side and a learner that need no Ray: order, resume, interruption, failures."""

import asyncio
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from common import metrics as names
from common.config import RunConfig
from common.interfaces import Rollouts
from common.manifest import MANIFEST
from learner.environments.data import PromptStream, read_rows, tokenise
from learner.environments.problems import Problems
from learner.environments.rewards import ChainRewards, Rewards
from learner.loop.driver import Driver
from learner.loop.driver_state import RunRecord, newest_state
from learner.loop.ledger import Ledger
from learner.loop.parts import Parts
from learner.loop.rollout import Progress, generate_groups
from learner.policy.group import LearnerGroup, LearnerLost
from learner.run.display import Display
from learner.run.errors import DiskFullError, Interrupted, PartError
from learner.run.run_directory import RunDirectory, read_jsonl
from learner.run.trajectory_files import read_trajectories
from tests.configs import run_config
from tests.fake_parts import TOKENIZER, FakeLearner, FakeRollouts


class Killed(BaseException):
    """Ends the process's work at once, as kill -9 does: nothing of the driver's handling is for it."""


def config(tmp_path: Path, name: str = "run", **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "steps": 6,
        "seed": 2,
        "data": {"source": "chain", "length": 4, "train_problems": 9, "test_problems": 3},
        "evaluation": {"problems": 3, "responses_per_problem": 2},
        "checkpoint": {"every_steps": 2, "keep": 2},
    }
    return run_config(name=name, runs_directory=str(tmp_path / "runs"), **settings | changes)


class Run:
    """One process's part of a run."""

    def __init__(
        self,
        settings: RunConfig,
        rollouts: FakeRollouts,
        learner: FakeLearner,
        resume: bool,
        rewards: Rewards | None = None,
    ) -> None:
        self.directory = RunDirectory.resume(settings) if resume else RunDirectory.create(settings)
        self.damage = self.directory.set_damaged_checkpoints_aside()
        state = newest_state(self.directory)
        self.directory.truncate(state.step if self.directory.checkpoint_steps() else -1)
        sets = {
            split: tokenise(read_rows(settings, split), TOKENIZER, settings, split).prompts
            for split in ("train", "test")
        }
        stream = PromptStream(sets["train"], settings.seed, settings.rollout.groups_per_step)
        self.record = RunRecord(self.directory, state.step + 1)
        display = Display(sys.stdout)
        # The driver calls nothing of a LearnerGroup that a FakeLearner does not have.
        parts = Parts(rollouts, cast(LearnerGroup, learner), rewards or ChainRewards())
        problems = Problems(stream, sets["test"])
        self.driver = Driver(settings, self.directory, state, parts, problems, self.record, display)

    def go(self) -> None:
        try:
            asyncio.run(self.driver.run())
        finally:
            self.record.close()
            self.directory.close()


def run(
    settings: RunConfig,
    rollouts: FakeRollouts | None = None,
    learner: FakeLearner | None = None,
    resume: bool = False,
) -> Run:
    result = Run(settings, rollouts or FakeRollouts(), learner or FakeLearner(), resume)
    result.go()
    return result


def timeless(directory: RunDirectory) -> list[dict[str, Any]]:
    """The metrics that do not depend on how fast the machine is."""
    return [
        {key: value for key, value in line.items() if "seconds" not in key and "per_second" not in key}
        for line in read_jsonl(directory.metrics)
    ]


def after(count: int, act: Callable[[], None]) -> Callable[[int], None]:
    """A hook that acts at its `count`-th call."""

    def hook(call: int) -> None:
        if call == count:
            act()

    return hook


def fail(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def test_a_run_leaves_all_its_files_and_metrics(tmp_path: Path):
    learner, rollouts = FakeLearner(), FakeRollouts()
    directory = run(config(tmp_path), rollouts, learner).directory
    lines = read_jsonl(directory.metrics)
    assert [line["step"] for line in lines] == list(range(1, 7))
    for line in lines:
        # The fake learner reports two of the learner's metrics only; test_train.py has all of them.
        assert line.keys() <= names.ALL
        assert not [name for name in names.ALL - line.keys() if not name.startswith("learner/")]
        parts = (names.ROLLOUT_SECONDS, names.TRAIN_SECONDS, names.SYNC_SECONDS, names.OTHER_SECONDS)
        assert sum(line[part] for part in parts) == pytest.approx(line[names.STEP_SECONDS])
        assert all(line[part] >= 0 for part in parts)
    totals = [line[names.TOTAL_GENERATED_TOKENS] for line in lines]
    assert totals == [sum(line[names.GENERATED_TOKENS] for line in lines[: n + 1]) for n in range(6)]
    assert {(e.step, e.mode) for e in RunRecord(directory, 7).evaluations} == {
        (step, mode) for step in (0, 6) for mode in ("plain", "erasable")
    }
    assert directory.checkpoint_steps() == [4, 6]
    assert (directory.policy / "config.json").is_file()
    assert list(directory.tensorboard.glob("events.*"))
    assert [update.version for update in learner.exported] == list(range(7))
    assert learner.released == learner.exported
    assert rollouts.events[-1] == learner.events[-1] == "close"


def test_trajectories_hold_text_reward_and_the_version_that_sampled_them(tmp_path: Path):
    directory = run(config(tmp_path)).directory
    for step in (1, 6):
        trajectories = read_trajectories(directory.trajectories / f"step_{step}.parquet")
        assert len(trajectories) == 8
        assert [t.sample for t in trajectories] == [0, 1, 2, 3] * 2
        for trajectory in trajectories:
            assert trajectory.text == TOKENIZER.decode(trajectory.token_ids)
            assert trajectory.reward in (0.0, 1.0)
            assert set(trajectory.token_versions) == {step - 1}


CHECKPOINTS = {
    "of every step": {"every_steps": 0, "keep": 2},
    "of every second step": {"every_steps": 2, "keep": 2, "latest": False},
    "none": {"every_steps": 0, "latest": False},
}


def comparable(directory: RunDirectory) -> list[dict[str, Any]]:
    return [line | {names.LEARNER_RESTARTS: 0} for line in timeless(directory)]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_a_lost_rank_costs_only_the_steps_since_the_last_checkpoint(tmp_path: Path, checkpoint: dict[str, Any]):
    whole = run(config(tmp_path, "whole", checkpoint=checkpoint))
    lost = after(4, fail(LearnerLost("training step 4: learner rank 1 died")))
    calls: list[int] = []
    learner = FakeLearner(on_train=lambda step: (calls.append(step), lost(len(calls)))[-1])
    disturbed = run(config(tmp_path, "disturbed", checkpoint=checkpoint), learner=learner)
    assert learner.events.count("restart") == 1
    assert [line[names.LEARNER_RESTARTS] for line in timeless(disturbed.directory)][-1] == 1
    assert comparable(disturbed.directory) == comparable(whole.directory)
    assert [e.avg_at_k for e in disturbed.record.evaluations] == [e.avg_at_k for e in whole.record.evaluations]
    turns = [line["trained"] for line in read_jsonl(disturbed.directory.ledger)]
    assert turns == [line["trained"] for line in read_jsonl(whole.directory.ledger)]


def test_ranks_that_are_lost_again_and_again_end_the_run(tmp_path: Path):
    calls: list[int] = []

    def die_in_step_3(step: int) -> None:
        calls.append(step)
        if step == 3:
            raise LearnerLost("training step 3: learner rank 0 died")

    learner = FakeLearner(on_train=die_in_step_3)
    with pytest.raises(PartError, match=r"^learner: step 3: training step 3: learner rank 0 died$"):
        run(config(tmp_path), learner=learner)
    assert calls == [1, 2, 3, 3, 3, 3]
    assert learner.events.count("restart") == 3


@pytest.mark.parametrize("killed_in_step", [1, 4, 5, 6])
def test_a_run_that_was_killed_and_resumed_equals_one_that_was_not(tmp_path: Path, killed_in_step: int):
    whole = run(config(tmp_path, "whole"))
    settings = config(tmp_path, "killed")
    # Two evaluations come before the first step's rollout.
    killed = FakeRollouts(after(killed_in_step + 2, fail(Killed())))
    with pytest.raises(Killed):
        run(settings, killed)
    resumed = run(settings, resume=True)
    assert timeless(resumed.directory) == timeless(whole.directory)
    for step in range(1, 7):
        name = f"step_{step}.parquet"
        assert read_trajectories(resumed.directory.trajectories / name) == read_trajectories(
            whole.directory.trajectories / name
        )
    state = newest_state(resumed.directory)
    assert state == newest_state(whole.directory)


@pytest.mark.parametrize("name", ["driver.json", "learner/weight.json", MANIFEST])
def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before_and_ends_the_same(tmp_path: Path, name: str):
    whole = run(config(tmp_path, "whole"))
    settings = config(tmp_path, "damaged")
    with pytest.raises(Killed):
        run(settings, FakeRollouts(after(5 + 2, fail(Killed()))))
    path = tmp_path / "runs" / "damaged" / "checkpoints" / "step_4" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    resumed = run(settings, resume=True)
    assert len(resumed.damage) == 1
    assert name in resumed.damage[0]
    assert timeless(resumed.directory) == timeless(whole.directory)
    assert newest_state(resumed.directory) == newest_state(whole.directory)


def test_evaluations_in_between_change_nothing_of_the_training(tmp_path: Path):
    without = run(config(tmp_path, "without"))
    evaluated = {"problems": 3, "responses_per_problem": 2, "every_steps": 2}
    with_them = run(config(tmp_path, "with", evaluation=evaluated))
    assert timeless(with_them.directory) == timeless(without.directory)
    assert [e.step for e in RunRecord(with_them.directory, 7).evaluations] == [0, 0, 2, 2, 4, 4, 6, 6]


def test_an_evaluation_that_was_interrupted_is_made_up_for(tmp_path: Path):
    settings = config(tmp_path, evaluation={"problems": 3, "responses_per_problem": 2, "every_steps": 2})
    # The second half of the evaluation after step 2: two evaluations, two steps and one evaluation come before.
    stopped = FakeRollouts(after(6, lambda: os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises(Interrupted):
        run(settings, stopped)
    directory = run(settings, resume=True).directory
    modes = [(e.step, e.mode) for e in RunRecord(directory, 7).evaluations]
    assert modes == [(step, mode) for step in (0, 2, 4, 6) for mode in ("plain", "erasable")]


def test_what_the_first_evaluation_taught_the_thresholds_outlives_two_stops(tmp_path: Path):
    settings = config(tmp_path, "stopped")
    # In the second half of the first evaluation, which is done anew, and then in the first step.
    for call in (2, 2):
        stopped = FakeRollouts(after(call, lambda: os.kill(os.getpid(), signal.SIGINT)))
        with pytest.raises(Interrupted):
            run(settings, stopped, resume=(tmp_path / "runs" / "stopped").exists())
    resumed, whole = run(settings, resume=True), run(config(tmp_path, "whole"))
    assert len(read_jsonl(resumed.directory.metrics)) == 6
    assert newest_state(resumed.directory) == newest_state(whole.directory)


def test_a_finished_run_can_be_continued_with_more_steps(tmp_path: Path):
    run(config(tmp_path))
    longer = run(config(tmp_path, steps=8), resume=True).directory
    assert [line["step"] for line in read_jsonl(longer.metrics)] == list(range(1, 9))
    whole = run(config(tmp_path, "whole", steps=8)).directory
    assert timeless(longer) == timeless(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_the_run_with_a_checkpoint(tmp_path: Path, number: signal.Signals):
    rollouts = FakeRollouts(after(7, lambda: os.kill(os.getpid(), number)))
    learner = FakeLearner()
    settings = config(tmp_path, checkpoint={"every_steps": 0})
    with pytest.raises(Interrupted):
        run(settings, rollouts, learner)
    directory = tmp_path / "runs" / "run"
    # The signal came in the rollout of step 5, which is abandoned or finished; nothing is lost either way.
    checkpoint = max(directory.glob("checkpoints/step_*"))
    done = len(read_jsonl(directory / "metrics.jsonl"))
    assert done in (4, 5)
    assert checkpoint.name == f"step_{done}"
    assert learner.events[-1] == "close"
    resumed = run(settings, resume=True)
    whole = run(config(tmp_path, "whole", checkpoint={"every_steps": 0}))
    assert timeless(resumed.directory) == timeless(whole.directory)


@pytest.mark.parametrize("moment", ["generating", "training"])
def test_a_run_that_is_killed_in_a_step_has_the_last_finished_one_on_disk(tmp_path: Path, moment: str):
    settings = config(tmp_path, checkpoint={"every_steps": 0, "keep": 1})
    kill = fail(Killed())
    rollouts = FakeRollouts(after(5 + 2, kill) if moment == "generating" else lambda call: None)
    learner = FakeLearner(after(5, kill) if moment == "training" else lambda step: None)
    # The kill comes before the checkpoint of step 4 can be written only where nothing was awaited in between.
    rollouts.pause_seconds = 0.05
    with pytest.raises(Killed):
        run(settings, rollouts, learner)
    expected = {"generating": ["step_3", "step_4"], "training": ["step_4"]}[moment]
    found = [path.name for path in (tmp_path / "runs" / "run" / "checkpoints").iterdir()]
    assert len(found) == 1
    assert found[0] in expected
    resumed = run(settings, resume=True)
    assert timeless(resumed.directory) == timeless(run(config(tmp_path, "whole")).directory)


def test_checkpoints_of_the_latest_step_can_be_turned_off(tmp_path: Path):
    settings = config(tmp_path, checkpoint={"every_steps": 4, "latest": False})
    with pytest.raises(Killed):
        run(settings, learner=FakeLearner(after(6, fail(Killed()))))
    assert [path.name for path in (tmp_path / "runs" / "run" / "checkpoints").iterdir()] == ["step_4"]


def test_training_waits_for_the_checkpoint_of_the_step_before(tmp_path: Path):
    """The weights that are being written must be those of the step whose state is beside them."""

    class SlowToSave(FakeLearner):
        saving = False

        async def save_checkpoint(self, directory: Path) -> None:
            self.saving = True
            before = self.weight
            await asyncio.sleep(0.05)
            await super().save_checkpoint(directory)
            assert before == self.weight
            self.saving = False

        async def train_step(self, groups: Any, step: int) -> dict[str, float]:
            assert not self.saving
            return await super().train_step(groups, step)

    directory = run(config(tmp_path, "slow", checkpoint={"every_steps": 0}), learner=SlowToSave()).directory
    waits = [line[names.CHECKPOINT_WAIT_SECONDS] for line in read_jsonl(directory.metrics)]
    assert waits[0] < 0.02 < min(waits[1:])
    assert timeless(directory) == timeless(run(config(tmp_path, "whole")).directory)


def test_a_full_disk_ends_the_run_at_the_next_step_s_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from learner.loop import checkpoints

    def full(path: Path, size: int) -> None:
        if path.name == "step_3":
            raise DiskFullError(path, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "require_space", full)
        with pytest.raises(DiskFullError, match=r"cannot write .*step_3"):
            run(config(tmp_path))
    resumed = run(config(tmp_path), resume=True)
    assert timeless(resumed.directory) == timeless(run(config(tmp_path, "whole")).directory)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_rewards_that_take_long(tmp_path: Path, number: signal.Signals):
    """A step of a minute, stopped in its middle: the last finished step is on disk within a second."""

    class Slow(ChainRewards):
        signalled = False

        async def score(self, item: Any) -> Any:
            if started.driver._trainer.state.step == 2:
                if not self.signalled:
                    os.kill(os.getpid(), number)
                self.signalled = True
                await asyncio.sleep(60.0)
            return await super().score(item)

    settings = config(tmp_path, checkpoint={"every_steps": 0, "latest": False})
    started = Run(settings, FakeRollouts(), FakeLearner(), resume=False, rewards=Slow())
    began = time.monotonic()
    with pytest.raises(Interrupted):
        started.go()
    assert time.monotonic() - began < 5.0
    assert started.directory.checkpoint_steps() == [2]
    resumed = run(settings, resume=True)
    assert timeless(resumed.directory) == timeless(run(config(tmp_path, "whole")).directory)


def test_a_signal_cancels_a_rollout_that_hangs(tmp_path: Path):
    rollouts = FakeRollouts(lambda call: os.kill(os.getpid(), signal.SIGINT), hang=True)
    with pytest.raises(Interrupted):
        run(config(tmp_path), rollouts)
    assert rollouts.events == ["start", "cancelled", "close"]


@pytest.mark.parametrize(
    ("rollouts", "learner", "message", "checkpoints"),
    [
        (
            FakeRollouts(after(5, fail(RuntimeError("replica 0 died")))),
            FakeLearner(),
            r"^rollout: step 3: RuntimeError: replica 0 died$",
            [1, 2],
        ),
        (
            FakeRollouts(after(6, fail(RuntimeError("replica 0 died")))),
            FakeLearner(),
            r"^rollout: step 4: RuntimeError",
            [2, 3],
        ),
        (
            FakeRollouts(),
            FakeLearner(after(4, fail(RuntimeError("rank 1 died")))),
            r"^learner: step 4: RuntimeError: rank 1 died$",
            [2, 3],
        ),
    ],
)
def test_a_failure_names_its_part_and_keeps_the_last_finished_step(
    tmp_path: Path, rollouts: FakeRollouts, learner: FakeLearner, message: str, checkpoints: list[int]
):
    with pytest.raises(PartError, match=message):
        run(config(tmp_path), rollouts, learner)
    directory = tmp_path / "runs" / "run"
    found = sorted(int(path.name.removeprefix("step_")) for path in directory.glob("checkpoints/step_*"))
    assert found == checkpoints
    assert rollouts.events[-1] == learner.events[-1] == "close"
    resumed = run(config(tmp_path), resume=True)
    assert timeless(resumed.directory) == timeless(run(config(tmp_path, "whole")).directory)


def test_a_full_disk_during_a_run_keeps_everything_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from learner.run import trajectory_files

    original = trajectory_files.parquet.ParquetWriter

    def writer(path: Path, *arguments: Any, **options: Any) -> Any:
        if "step_4" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trajectory_files.parquet, "ParquetWriter", writer)
        with pytest.raises(PartError, match=r"the disk is full: cannot write .*step_4\.parquet.*--resume"):
            run(config(tmp_path))
    directory = tmp_path / "runs" / "run"
    assert [line["step"] for line in read_jsonl(directory / "metrics.jsonl")] == [1, 2, 3]
    assert not list(directory.rglob("*.partial"))
    resumed = run(config(tmp_path), resume=True)
    assert timeless(resumed.directory) == timeless(run(config(tmp_path, "whole")).directory)


def test_a_token_budget_ends_the_run(tmp_path: Path):
    every_step = [line[names.TOTAL_GENERATED_TOKENS] for line in timeless(run(config(tmp_path)).directory)]
    budget = every_step[2]
    limited = run(config(tmp_path, "limited", token_budget=budget)).directory
    assert [line[names.TOTAL_GENERATED_TOKENS] for line in timeless(limited)] == every_step[:3]


def test_responses_that_do_not_come_are_counted_when_the_deadline_is_over(tmp_path: Path):
    from learner.loop.treatment import training_requests

    settings = config(tmp_path)
    prompts = tokenise(read_rows(settings, "train"), TOKENIZER, settings, "train").prompts
    draw = Ledger(PromptStream(prompts, 0, 2), 2).draw(0)
    requests = [training_requests(settings, draw, share_applies=True)]

    class Slow(FakeRollouts):
        async def generate(self, groups: Any) -> Any:
            async for trajectory in super().generate([groups[0][:1]]):
                yield trajectory
            await asyncio.Event().wait()

    async def generate(rollouts: Rollouts) -> None:
        await generate_groups(rollouts, [draw.prompt], requests, Progress(0.25))

    with pytest.raises(TimeoutError, match=r"3 of 4 responses are missing, and none arrived within 0\.25 s"):
        asyncio.run(generate(Slow()))
    with pytest.raises(RuntimeError, match="4 of 4 responses are missing, 0 were not asked for"):
        asyncio.run(generate(Empty()))


class Empty(FakeRollouts):
    """Answers nothing and ends."""

    async def generate(self, groups: Any) -> Any:
        for nothing in ():
            yield nothing


def test_metrics_that_are_no_numbers_become_null_in_json(tmp_path: Path):
    directory = RunDirectory.create(config(tmp_path))
    record = RunRecord(directory, 1)
    record.add_step({"step": 1, names.KL: float("nan"), names.LOSS: float("inf"), names.REWARD_MEAN: 0.5})
    record.close()
    text = directory.metrics.read_text()
    assert json.loads(text) == {"step": 1, names.KL: None, names.LOSS: None, names.REWARD_MEAN: 0.5}
