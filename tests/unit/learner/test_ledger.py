"""The ledger and the buffer: each prompt trained once an epoch, nothing too old, never too much under way."""

import asyncio
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.packed import Group, pack
from common.trajectory import Prompt
from learner.environments.data import PromptStream
from learner.environments.rewards import Tally
from learner.loop.buffer import Buffer, ScoredGroup
from learner.loop.ledger import Draw, Ledger, LedgerState
from tests.trajectories import attempt_of, trajectory


def stream(prompts: int, per_step: int) -> PromptStream:
    return PromptStream([Prompt(id=str(n), text="", token_ids=[1]) for n in range(prompts)], 5, per_step)


def scored(draw: Draw, version: int) -> ScoredGroup:
    response = trajectory([attempt_of([1], segment=0, start=0, version=version)], reward=0.0, prompt_id=draw.prompt.id)
    return ScoredGroup(draw, Group(prompt=draw.prompt, trajectories=[pack(response)]), version, 1, Tally(1))


class Loop(RuleBasedStateMachine):
    """A producer and a trainer that are driven by chance: any order of drawing, finishing, training, dying."""

    STEPS = 12

    def __init__(self) -> None:
        super().__init__()
        self.started = False

    def start(self, state: LedgerState, version: int) -> None:
        """As a process does at its beginning: from a checkpoint, with nothing in flight."""
        self.version = version
        self.ledger = Ledger(stream(self.prompts, self.per_step), self.per_step, state)
        left = (self.STEPS - version) * self.per_step
        self.buffer = Buffer(self.ledger, self.max_staleness, self.per_step, left)
        self.in_flight: list[Draw] = []
        self.in_training: list[ScoredGroup] = []

    @precondition(lambda self: not self.started)
    @rule(prompts=st.integers(3, 9), per_step=st.integers(1, 3), max_staleness=st.integers(0, 3))
    def begin(self, prompts: int, per_step: int, max_staleness: int) -> None:
        self.started = True
        self.prompts, self.per_step, self.max_staleness = prompts, per_step, max_staleness
        self.history: list[tuple[int, LedgerState, int]] = [(0, LedgerState(), 0)]
        self.trained: list[Draw] = []
        self.start(LedgerState(), 0)

    @precondition(lambda self: self.started)
    @rule()
    def draw(self) -> None:
        if self.buffer.has_room(1):
            draw = self.ledger.draw(self.version)
            assert draw.number not in {other.number for other in self.in_flight}
            self.in_flight.append(draw)

    @precondition(lambda self: self.started and self.in_flight)
    @rule(place=st.integers(0, 100), late=st.integers(0, 3))
    def finish(self, place: int, late: int) -> None:
        """In any order; the first token may have been sampled later than the turn was drawn."""
        draw = self.in_flight.pop(place % len(self.in_flight))
        self.buffer.put(scored(draw, min(draw.version + late, self.version)))

    @precondition(lambda self: self.started and not self.in_training)
    @rule()
    def take(self) -> None:
        dropped = self.buffer.drop_stale(self.version)
        assert all(self.version - group.version > self.max_staleness for group in dropped)
        groups = self.buffer.take_now(self.per_step, self.version)
        if groups is None:
            return
        assert len(groups) == self.per_step
        assert all(0 <= self.version - group.version <= self.max_staleness for group in groups)
        assert [group.draw.number for group in groups] == sorted(group.draw.number for group in groups)
        self.in_training = groups

    @precondition(lambda self: self.started and self.in_training)
    @rule()
    def train(self) -> None:
        self.buffer.trained(self.in_training)
        self.trained += [group.draw for group in self.in_training]
        self.in_training = []
        self.version += 1
        state = LedgerState.model_validate_json(self.ledger.state().model_dump_json())
        self.history.append((self.version, state, len(self.trained)))

    @precondition(lambda self: self.started)
    @rule(back=st.integers(0, 2))
    def kill(self, back: int) -> None:
        """And resume, from the newest checkpoint or an earlier one."""
        self.history = self.history[: max(1, len(self.history) - back)]
        version, state, count = self.history[-1]
        self.trained = self.trained[:count]
        self.start(state, version)

    @precondition(lambda self: self.started)
    @invariant()
    def nothing_is_over_its_bound(self) -> None:
        under_way = len(self.in_flight) + len(self.buffer) + len(self.in_training)
        assert under_way == self.ledger.outstanding <= self.buffer.capacity
        assert self.buffer.capacity == (self.max_staleness + 1) * self.per_step
        assert self.ledger.trained == len(self.trained) == self.version * self.per_step

    @precondition(lambda self: self.started)
    @invariant()
    def no_turn_is_trained_twice(self) -> None:
        assert not [key for key, count in Counter(d.number for d in self.trained).items() if count > 1]
        assert not [key for key, count in Counter((d.epoch, d.prompt.id) for d in self.trained).items() if count > 1]

    def teardown(self) -> None:
        """Whatever has happened, the run can be finished, and then each turn was trained once."""
        if not self.started:
            return
        for _ in range(50 * self.STEPS):
            if self.version == self.STEPS:
                break
            while self.buffer.has_room(1):
                self.draw()
            if not self.in_training:
                self.take()
            if self.in_training:
                self.train()
            elif self.in_flight:
                self.finish(0, 0)
        assert self.version == self.STEPS
        assert sorted(draw.number for draw in self.trained) == list(range(self.STEPS * self.per_step))
        assert self.ledger.state().untrained == []
        epochs = self.STEPS * self.per_step // self.prompts
        for epoch in range(epochs):
            assert sorted(int(d.prompt.id) for d in self.trained if d.epoch == epoch) == list(range(self.prompts))


Loop.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLoop = Loop.TestCase


def test_turns_follow_each_other_through_the_epochs_and_each_has_seeds_and_a_group_of_its_own():
    ledger = Ledger(stream(5, 3), 3)
    draws = [ledger.draw(0) for _ in range(30)]
    assert [d.number for d in draws] == list(range(30))
    assert [d.epoch for d in draws] == [number // 5 for number in range(30)]
    assert [d.step for d in draws] == [number // 3 + 1 for number in range(30)]
    assert len({d.group_id for d in draws}) == len({d.seed_place for d in draws}) == 30
    # Within a step of one epoch the prompt alone tells turns apart.
    assert draws[0].seed_place == (1, draws[0].prompt.id)
    assert draws[5].seed_place == (2, draws[5].prompt.id, 1)


def test_a_turn_that_was_dropped_comes_next_with_the_same_seeds_in_another_group():
    ledger = Ledger(stream(6, 1), 1)
    buffer = Buffer(ledger, 1, 1, 6)
    first, second = ledger.draw(0), ledger.draw(0)
    buffer.put(scored(first, 0))
    assert [group.draw for group in buffer.drop_stale(2)] == [first]
    again = ledger.draw(2)
    assert (again.number, again.seed_place, again.drops) == (first.number, first.seed_place, 1)
    assert again.group_id not in (first.group_id, second.group_id)


def test_the_second_time_training_waits_for_what_would_be_too_old_again():
    ledger = Ledger(stream(6, 1), 1)
    buffer = Buffer(ledger, 1, 1, 6)
    buffer.put(scored(ledger.draw(0), 0))
    buffer.drop_stale(2)
    slow, quick = ledger.draw(2), ledger.draw(2)
    buffer.put(scored(quick, 2))
    taken = buffer.take_now(1, 2)
    assert taken is not None
    assert [group.draw for group in taken] == [quick]
    buffer.trained(taken)
    # At the next step it is one version old, at the one after too old.
    other = ledger.draw(3)
    buffer.put(scored(other, 3))
    assert buffer.take_now(1, 3) is None
    buffer.put(scored(slow, 2))
    taken = buffer.take_now(1, 3)
    assert taken is not None
    assert [group.draw for group in taken] == [slow]


def test_what_was_under_way_is_drawn_first_after_a_resume():
    ledger = Ledger(stream(6, 2), 2)
    buffer = Buffer(ledger, 1, 2, 12)
    draws = [ledger.draw(0) for _ in range(4)]
    for draw in (draws[1], draws[3]):
        buffer.put(scored(draw, 0))
    taken = buffer.take_now(2, 0)
    assert taken is not None
    buffer.trained(taken)
    resumed = Ledger(stream(6, 2), 2, ledger.state())
    assert resumed.trained == 2
    assert [resumed.draw(1).number for _ in range(3)] == [0, 2, 4]


def test_the_ledger_of_other_prompts_begins_anew():
    ledger = Ledger(stream(6, 2), 2)
    ledger.draw(0)
    assert Ledger(stream(7, 2), 2, ledger.state()).draw(0).number == 0


def test_a_call_out_of_turn_is_an_error():
    ledger = Ledger(stream(6, 2), 2)
    draw = ledger.draw(0)
    with pytest.raises(RuntimeError, match="turn 0 should be scored, and is in flight"):
        ledger.drop(draw.number)
    with pytest.raises(RuntimeError, match="turn 4 should be in flight, and is not under way"):
        ledger.score(4)


def test_more_than_the_capacity_is_an_error():
    ledger = Ledger(stream(6, 1), 1)
    buffer = Buffer(ledger, 0, 1, 6)
    draws = [ledger.draw(0) for _ in range(2)]
    with pytest.raises(RuntimeError, match="2 groups are under way, more than 1"):
        buffer.put(scored(draws[0], 0))


def test_taking_waits_for_groups_and_drawing_for_room():
    async def run() -> list[str]:
        ledger = Ledger(stream(6, 2), 2)
        buffer = Buffer(ledger, 0, 2, 12)
        events = []

        async def trainer() -> None:
            taken = await buffer.take(2, 0)
            events.append(f"taken {[group.draw.number for group in taken.groups]}")
            buffer.trained(taken.groups)

        training = asyncio.create_task(trainer())
        draws = [ledger.draw(0) for _ in range(2)]
        waiting = asyncio.create_task(buffer.room(2))
        for draw in reversed(draws):
            await asyncio.sleep(0)
            assert not training.done()
            assert not waiting.done()
            events.append(f"put {draw.number}")
            buffer.put(scored(draw, 0))
        await training
        await waiting
        return events

    assert asyncio.run(run()) == ["put 1", "put 0", "taken [0, 1]"]


def test_a_failure_reaches_who_waits_and_who_comes_later():
    async def run() -> None:
        buffer = Buffer(Ledger(stream(6, 2), 2), 0, 2, 12)
        taking = asyncio.create_task(buffer.take(2, 0))
        await asyncio.sleep(0)
        buffer.fail(ValueError("no more"))
        buffer.fail(KeyError("a consequence"))
        for taken in (taking, buffer.take(2, 0)):
            with pytest.raises(ValueError, match="no more"):
                await taken

    asyncio.run(run())


def test_a_closed_buffer_has_no_room():
    buffer = Buffer(Ledger(stream(6, 2), 2), 1, 2, 12)
    assert buffer.has_room(4)
    assert not buffer.has_room(5)
    buffer.close()
    assert not buffer.has_room(1)
    buffer.open()
    assert buffer.has_room(4)


def test_no_turn_is_begun_that_would_not_be_trained():
    buffer = Buffer(Ledger(stream(6, 2), 2), 3, 2, 3)
    assert buffer.has_room(3)
    assert not buffer.has_room(4)
