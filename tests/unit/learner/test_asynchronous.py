"""Generation beside training: what is trained is what the ledger says, never too old, whatever dies in between."""

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common import metrics as names
from common.config import RunConfig
from common.packed import Group, PackedResponse, unpack
from common.trajectory import ResponseRequest
from learner.environments.data import PromptStream, read_rows, tokenise
from learner.environments.rewards import ChainRewards, RewardItem
from learner.evaluation.evaluate import MODES, evaluation_requests
from learner.loop.driver_state import RunRecord, newest_state
from learner.loop.ledger import Draw
from learner.loop.rollout import Progress, generate_groups
from learner.loop.treatment import TreatedShare, first_treated_sample, plain_outcome, training_requests
from learner.run.errors import Interrupted, PartError
from learner.run.run_directory import RunDirectory, read_jsonl
from learner.run.trajectory_files import read_trajectories
from tests.fake_parts import TOKENIZER, FakeLearner, FakeRollouts
from tests.unit.learner.test_driver import Killed, after, config, fail, run, timeless

STEPS, GROUPS = 6, 2


class SlowRollouts(FakeRollouts):
    """Takes `seconds(request)` for each response, and keeps an account of what is under way."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.random = random.Random(1)
        self.under_way = 0
        self.groups_finished = 0
        self.most_under_way = 0
        self.seconds = lambda request: self.random.uniform(0.0, 0.01)
        self.is_held = lambda request: False

    async def generate(self, groups: Sequence[Sequence[ResponseRequest]]) -> AsyncIterator[PackedResponse]:
        is_training = not groups[0][0].group_id.startswith("evaluation")
        self.under_way += is_training * len(groups)
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            async for response in super().generate(groups):
                await asyncio.sleep(self.seconds(groups[0][0]))
                while self.is_held(groups[0][0]):
                    await asyncio.sleep(0.005)
                yield response
            self.groups_finished += is_training * len(groups)
        finally:
            self.under_way -= is_training * len(groups)


class SlowLearner(FakeLearner):
    """Takes a while for a step."""

    async def train_step(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        metrics = await super().train_step(groups, step)
        await asyncio.sleep(0.02)
        return metrics


def trained(directory: RunDirectory) -> list[dict[str, Any]]:
    """Every turn that was trained, in the order of training."""
    return [turn for line in read_jsonl(directory.ledger) for turn in line["trained"]]


def check_ledger(directory: RunDirectory, settings: RunConfig) -> None:
    """Each prompt was trained exactly once an epoch, the one of the last epoch at most once; nothing was too old."""
    turns, prompts = trained(directory), settings.data.train_problems
    total = settings.steps * settings.rollout.groups_per_step
    assert sorted(turn["turn"] for turn in turns) == list(range(total))
    times = Counter((turn["epoch"], turn["prompt"]) for turn in turns)
    assert set(times.values()) == {1}
    for epoch in range(total // prompts):
        assert sum(key[0] == epoch for key in times) == prompts
    assert all(0 <= turn["staleness"] <= settings.max_staleness for turn in turns)
    lines = read_jsonl(directory.metrics)
    assert [line["step"] for line in lines] == list(range(1, settings.steps + 1))
    for line, account in zip(lines, read_jsonl(directory.ledger), strict=True):
        staleness = [turn["staleness"] for turn in account["trained"]]
        assert line[names.STALENESS_MAX] == max(staleness)
        assert line[names.STALENESS_MEAN] == pytest.approx(sum(staleness) / len(staleness))
        assert line[names.DROPPED_GROUPS] == len(account["dropped"])
        responses = read_trajectories(directory.trajectories / f"step_{line['step']}.parquet")
        assert len({(t.group_id, t.sample) for t in responses}) == settings.responses_per_step
        oldest = [min(t.token_versions) for t in responses]
        assert line["step"] - 1 - min(oldest) == max(staleness)
    state = newest_state(directory)
    assert (state.ledger.drawn, state.ledger.untrained, state.ledger.dropped) == (total, [], [])


class Lockstep:
    """One thing after another, in as few lines as it takes: what `max_staleness: 0` must equal."""

    async def run(self, settings: RunConfig) -> list[dict[str, Any]]:
        rollouts, learner, rewards = FakeRollouts(), FakeLearner(), ChainRewards()
        prompts = {s: tokenise(read_rows(settings, s), TOKENIZER, settings, s).prompts for s in ("train", "test")}
        share = TreatedShare(settings.rollout.group_share)
        stream, size = PromptStream(prompts["train"], settings.seed, GROUPS), settings.evaluation.problems
        for mode in MODES:
            await self.generate(rollouts, evaluation_requests(settings, prompts["test"][:size], mode))
        steps = []
        for step in range(1, settings.steps + 1):
            turns = range((step - 1) * GROUPS, step * GROUPS)
            epochs = [turn // len(stream) for turn in turns]
            twice = [() if epoch == epochs[0] else (epoch,) for epoch in epochs]
            draws = [
                Draw(turn, epoch, stream.at(turn), step, name, step - 1, 0)
                for turn, epoch, name in zip(turns, epochs, twice, strict=True)
            ]
            requests = [training_requests(settings, draw, share.applies) for draw in draws]
            first_treated = [first_treated_sample(settings, share.applies)] * GROUPS
            found = await self.generate(rollouts, requests)
            groups = []
            for draw, asked in zip(draws, requests, strict=True):
                members = [await self.reward(rewards, draw, found[r.group_id, r.sample]) for r in asked]
                groups.append(Group(prompt=draw.prompt, trajectories=members))
            metrics = await learner.train_step(groups, step)
            async with learner.publishing(step) as update:
                await rollouts.sync(update, 1.0)
            share.update(*plain_outcome(groups, first_treated, settings.evaluation.success_threshold))
            tokens = sum(t.generated_tokens for group in groups for t in group.trajectories)
            rate = share.success_rate
            steps.append({**metrics, names.GENERATED_TOKENS: tokens, names.PLAIN_SUCCESS_RATE: rate, "groups": groups})
        return steps

    async def generate(
        self, rollouts: FakeRollouts, requests: list[list[ResponseRequest]]
    ) -> dict[tuple[str, int], PackedResponse]:
        return {(t.group_id, t.sample): t async for t in rollouts.generate(requests)}

    async def reward(self, rewards: ChainRewards, draw: Draw, response: PackedResponse) -> PackedResponse:
        text = response.text
        item = RewardItem(
            prompt_id=draw.prompt.id,
            prompt=draw.prompt.text,
            response=text,
            answer=draw.prompt.answer,
            sample=response.sample,
            finish_reason=response.finish_reason,
            token_ids=response.token_ids,
            row={},
        )
        return replace(response, reward=(await rewards.score(item)).value)


def test_without_staleness_the_loop_equals_one_that_does_one_thing_after_another(tmp_path: Path):
    # 12 turns of 9 prompts: an epoch ends in the middle of a step.
    settings = config(tmp_path, checkpoint={"every_steps": 0})
    expected = asyncio.run(Lockstep().run(settings))
    directory = run(settings).directory
    for line, step in zip(read_jsonl(directory.metrics), expected, strict=True):
        for name in (names.LOSS, names.GENERATED_TOKENS, names.PLAIN_SUCCESS_RATE):
            assert line[name] == step[name], (line["step"], name)
        found = read_trajectories(directory.trajectories / f"step_{line['step']}.parquet")
        assert found == [unpack(t) for group in step["groups"] for t in group.trajectories]
    check_ledger(directory, settings)
    for line in read_jsonl(directory.metrics):
        assert line[names.STALENESS_MAX] == line[names.DROPPED_GROUPS] == line[names.BUFFER_DEPTH] == 0
        assert line[names.OVERLAP_SECONDS] == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("max_staleness", [1, 2, 5])
def test_every_prompt_is_trained_once_an_epoch_and_none_is_too_old(tmp_path: Path, max_staleness: int):
    settings = config(tmp_path, steps=14, max_staleness=max_staleness)
    rollouts = SlowRollouts()
    directory = run(settings, rollouts, SlowLearner()).directory
    check_ledger(directory, settings)
    assert 1 < rollouts.most_under_way <= (max_staleness + 1) * GROUPS
    lines = read_jsonl(directory.metrics)
    assert max(line[names.STALENESS_MAX] for line in lines) >= 1
    for line in lines:
        assert names.ALL - line.keys() == {name for name in names.ALL - line.keys() if name.startswith("learner/")}
        parts = (names.ROLLOUT_SECONDS, names.TRAIN_SECONDS, names.SYNC_SECONDS, names.OTHER_SECONDS)
        assert sum(line[part] for part in parts) == pytest.approx(line[names.STEP_SECONDS])
        generating = line[names.ROLLOUT_SECONDS] + line[names.OVERLAP_SECONDS]
        assert line[names.BLOCKED_SECONDS] + generating == pytest.approx(line[names.STEP_SECONDS])
        assert line[names.WAIT_SECONDS] - line[names.ROLLOUT_SECONDS] > -1e-9 <= line[names.ROLLOUT_SECONDS]
    assert sum(line[names.OVERLAP_SECONDS] for line in lines) > 0.0


def test_responses_are_generated_while_the_learner_trains(tmp_path: Path):
    """A step of this learner ends only when the groups of the next one have arrived."""

    class Waiting(FakeLearner):
        async def train_step(self, groups: Sequence[Group], step: int) -> dict[str, float]:
            async with asyncio.timeout(10.0):
                while rollouts.groups_finished < min(step + 1, STEPS) * GROUPS:
                    await asyncio.sleep(0.001)
            return await super().train_step(groups, step)

    settings = config(tmp_path, max_staleness=1)
    rollouts = SlowRollouts()
    check_ledger(run(settings, rollouts, Waiting()).directory, settings)


def test_a_response_that_takes_long_holds_no_step_up_and_is_trained_all_the_same(tmp_path: Path):
    """Its group is dropped once, counted, and generated again with the same seeds; the second time it is waited for."""
    settings = config(tmp_path, steps=12, max_staleness=1)
    rollouts = SlowRollouts()

    def seconds(request: ResponseRequest) -> float:
        if request.prompt_id != first[0]:
            return 0.0
        return 0.04 if request.group_id.endswith("again1") else 0.0

    def is_held(request: ResponseRequest) -> bool:
        """The first time it takes until the policy is too far on, however busy the machine is."""
        return (
            request.prompt_id == first[0]
            and request.group_id.startswith("1-")
            and rollouts.version < 3
            and (not request.group_id.endswith("again1"))
        )

    first = [draw_prompts(settings)[1]]
    rollouts.seconds, rollouts.is_held = seconds, is_held
    directory = run(settings, rollouts, SlowLearner()).directory
    check_ledger(directory, settings)
    lines, account = read_jsonl(directory.metrics), read_jsonl(directory.ledger)
    dropped = [(line["step"], turn) for line in account for turn in line["dropped"]]
    assert [turn for _, turn in dropped].count(1) == 1
    trained_at = {turn["turn"]: line["step"] for line in account for turn in line["trained"]}
    # Steps went on without it.
    assert trained_at[1] > dropped[0][0] > 2
    asked = [r for group in rollouts.requests for r in group if r.group_id.startswith(f"1-{first[0]}")]
    once, again = ([r for r in asked if r.group_id.endswith("again1") is so] for so in (False, True))
    assert [r.seed for r in once] == [r.seed for r in again] != []
    line = lines[dropped[0][0] - 1]
    assert line[names.DROPPED_GROUPS] == 1
    assert line[names.DROPPED_PLAIN] + line[names.DROPPED_TREATED] == settings.rollout.responses_per_group
    assert line[names.DROPPED_PLAIN_TOKENS] > 0
    # What was dropped was generated, and counts for the token budget.
    generated = sum(line[names.GENERATED_TOKENS] for line in lines)
    lost = sum(line[names.DROPPED_PLAIN_TOKENS] + line[names.DROPPED_TREATED_TOKENS] for line in lines)
    assert lines[-1][names.TOTAL_GENERATED_TOKENS] == generated + lost


def draw_prompts(settings: RunConfig) -> list[str]:
    """The ids of the first epoch's prompts in the order of their turns."""
    prompts = tokenise(read_rows(settings, "train"), TOKENIZER, settings, "train").prompts
    stream = PromptStream(prompts, settings.seed, GROUPS)
    return [stream.at(number).id for number in range(len(stream))]


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_a_driver_that_is_killed_ten_times_trains_what_one_would_that_is_not(tmp_path: Path, max_staleness: int):
    chance = random.Random(max_staleness)
    settings = config(tmp_path, "killed", steps=20, max_staleness=max_staleness)
    for kill in range(10):
        moment = chance.randint(1, 12)
        at_generate, at_train = chance.choice([(moment, 0), (0, moment)])
        rollouts = SlowRollouts(on_generate=after(at_generate, fail(Killed())))
        trains = iter(range(1, 100))

        def train(step: int, moment: int = at_train, trains: Any = trains) -> None:
            if next(trains) == moment:
                raise Killed

        with suppress(Killed):
            run(settings, rollouts, SlowLearner(train), resume=kill > 0)
    resumed = run(settings, SlowRollouts(), SlowLearner(), resume=True)
    check_ledger(resumed.directory, settings)
    if max_staleness == 0:
        whole = run(config(tmp_path, "whole", steps=20)).directory
        assert timeless(resumed.directory) == timeless(whole)
        assert read_jsonl(resumed.directory.ledger) == read_jsonl(whole.ledger)


def test_what_was_in_flight_at_a_kill_is_generated_again_with_the_same_seeds(tmp_path: Path):
    settings = config(tmp_path, max_staleness=2)
    killed = SlowRollouts()
    with pytest.raises(Killed):
        run(settings, killed, SlowLearner(after(4, fail(Killed()))))
    resumed = SlowRollouts()
    directory = run(settings, resumed, SlowLearner(), resume=True).directory
    check_ledger(directory, settings)

    def seeds(rollouts: FakeRollouts) -> dict[tuple[str, int], int | None]:
        return {(r.group_id, r.sample): r.seed for group in rollouts.requests for r in group}

    again = seeds(killed).keys() & seeds(resumed).keys()
    assert again
    assert all(seeds(killed)[key] == seeds(resumed)[key] for key in again)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_gives_up_what_is_generated_and_keeps_the_last_finished_step(tmp_path: Path, number: signal.Signals):
    settings = config(tmp_path, max_staleness=1, checkpoint={"every_steps": 0, "latest": False})
    rollouts = SlowRollouts(on_generate=after(11, lambda: os.kill(os.getpid(), number)))
    with pytest.raises(Interrupted):
        run(settings, rollouts, SlowLearner())
    assert rollouts.under_way == 0
    directory = tmp_path / "runs" / "run"
    done = len(read_jsonl(directory / "metrics.jsonl"))
    assert [path.name for path in (directory / "checkpoints").iterdir()] == [f"step_{done}"]
    check_ledger(run(settings, SlowRollouts(), SlowLearner(), resume=True).directory, settings)


def test_a_failure_while_the_learner_trains_ends_the_run_after_that_step(tmp_path: Path):
    settings = config(tmp_path, max_staleness=1)
    rollouts = SlowRollouts(on_generate=after(9, fail(RuntimeError("replica 0 died"))))
    with pytest.raises(PartError, match=r"^rollout: step \d: RuntimeError: replica 0 died$"):
        run(settings, rollouts, SlowLearner())
    assert rollouts.under_way == 0
    assert rollouts.events[-1] == "close"
    directory = tmp_path / "runs" / "run"
    done = len(read_jsonl(directory / "metrics.jsonl"))
    assert (directory / "checkpoints" / f"step_{done}").is_dir()
    check_ledger(run(settings, SlowRollouts(), SlowLearner(), resume=True).directory, settings)


def test_an_evaluation_waits_for_what_is_under_way_and_teaches_the_thresholds_nothing(tmp_path: Path):
    evaluated = {"problems": 3, "responses_per_problem": 2, "every_steps": 2}
    settings = config(tmp_path, max_staleness=2, evaluation=evaluated)

    class Watching(SlowRollouts):
        learnt_before: float | None = None

        async def generate(self, groups: Sequence[Sequence[ResponseRequest]]) -> AsyncIterator[PackedResponse]:
            evaluating = groups[0][0].group_id.startswith("evaluation")
            if evaluating:
                assert self.under_way == 0
            async for response in super().generate(groups):
                assert not (evaluating and self.under_way)
                yield response

        async def state(self) -> list[Any]:
            self.learnt_before = self.learnt
            return await super().state()

        async def restore(self, state: list[Any]) -> None:
            if state:
                assert state == [{"learnt": self.learnt_before}]
            await super().restore(state)

    directory = run(settings, Watching(), SlowLearner()).directory
    check_ledger(directory, settings)
    assert [e.step for e in RunRecord(directory, 7).evaluations] == [0, 0, 2, 2, 4, 4, 6, 6]


def test_a_checkpoint_is_written_while_responses_are_generated(tmp_path: Path):
    class SlowToSave(SlowLearner):
        async def save_checkpoint(self, directory: Path) -> None:
            before = rollouts.calls
            await asyncio.sleep(0.05)
            await super().save_checkpoint(directory)
            during.append(rollouts.calls - before)

    during: list[int] = []
    rollouts = SlowRollouts()
    settings = config(tmp_path, max_staleness=3, steps=8, checkpoint={"every_steps": 2})
    check_ledger(run(settings, rollouts, SlowToSave()).directory, settings)
    assert sum(during) > 0


def test_a_token_budget_ends_the_run_with_what_is_under_way_untrained_and_more_steps_train_it(tmp_path: Path):
    settings = config(tmp_path, steps=12, max_staleness=2, token_budget=900)
    directory = run(settings, SlowRollouts(), SlowLearner()).directory
    state = newest_state(directory)
    assert state.generated_tokens >= 900
    assert state.step < 12
    assert state.ledger.untrained
    unlimited = config(tmp_path, steps=12, max_staleness=2)
    check_ledger(run(unlimited, SlowRollouts(), SlowLearner(), resume=True).directory, unlimited)


def test_a_group_waits_for_a_place_as_long_as_others_finish(tmp_path: Path):
    """Its own responses take longer than the limit; the limit is for the time in which nobody's arrives."""

    class Queueing(FakeRollouts):
        async def generate(self, groups: Sequence[Sequence[ResponseRequest]]) -> AsyncIterator[PackedResponse]:
            first = groups[0][0]
            for number in range(8 if first.group_id == "busy" else 1):
                await asyncio.sleep(0.15 if first.group_id == "busy" else 1.1)
                answer = self._respond(first.model_copy(update={"sample": number}))
                yield answer

    settings = config(tmp_path)
    prompt = tokenise(read_rows(settings, "train"), TOKENIZER, settings, "train").prompts[0]
    draw = Draw(0, 0, prompt, 1, (), 0, 0)
    (request, *_) = training_requests(settings, draw, share_applies=False)

    def group(name: str, size: int) -> list[list[ResponseRequest]]:
        return [[request.model_copy(update={"group_id": name, "sample": sample}) for sample in range(size)]]

    async def both(progress: Progress) -> None:
        rollouts = Queueing()
        await asyncio.gather(
            generate_groups(rollouts, [prompt], group("busy", 8), progress),
            generate_groups(rollouts, [prompt], group("queued", 1), progress),
        )

    async def alone(progress: Progress) -> None:
        await generate_groups(Queueing(), [prompt], group("queued", 1), progress)

    async def held(progress: Progress) -> None:
        with progress.held():
            await alone(progress)

    asyncio.run(both(Progress(1.0)))
    with pytest.raises(TimeoutError, match=r"1 of 1 responses are missing, and none arrived within 1 s"):
        asyncio.run(alone(Progress(1.0)))
    asyncio.run(held(Progress(1.0)))
