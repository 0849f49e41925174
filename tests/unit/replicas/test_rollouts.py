"""The pool as the training loop sees it: replicas that die, hang or are stuck cost no response."""

import asyncio
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import metrics as names
from common.config.erasure import ErasurePolicy
from common.config.run import EngineConfig, InFlight
from common.packed import PackedResponse, pack, unpack
from common.trajectory import Attempt, ResponseRequest, Trajectory
from common.weights import DiskUpdate, WeightUpdate
from rollout_server.engine.errors import GenerationAborted
from rollout_server.replicas import pool as pool_module
from rollout_server.replicas.pool import Pool
from rollout_server.replicas.record import Record, Recorder
from rollout_server.replicas.replica import EngineFacts, Priors, ReplicaLost
from rollout_server.replicas.rollouts import FRUITLESS_LOSSES, PoolRollouts, ReplicaError, _cause, shared_out
from rollout_server.replicas.use import EngineUse
from tests.trajectories import attempt_of, trajectory

SEGMENTS = 4
POLICY = ErasurePolicy()
Happens = Callable[["Replica", ResponseRequest, int], None]
"""Called before each segment of a response with its number; may raise."""


class Replica:
    """`places` responses at a time, of `SEGMENTS` segments each; every segment takes `seconds` and is recorded.

    A token says which segment it is of; its version is that of the weights. `stuck_after`: so many responses finish,
    and no more.
    """

    def __init__(self, places: int = 4, seconds: float = 0.0, stuck_after: int | None = None) -> None:
        self._places = asyncio.Semaphore(places)
        self._seconds = seconds
        self.stuck_after = stuck_after
        self.happens: Happens = lambda replica, request, segment: None
        self.alive = False
        self.holds: tuple[int, str] = (0, "start")
        self.starts = 0
        self.start_failures: list[Exception] = []
        self.sync_failures: list[Exception] = []
        self.learnt: Priors = {}
        self.requests: list[ResponseRequest] = []
        self.steps = 0
        self._dead = asyncio.Event()
        self._aborted = asyncio.Event()

    async def start(self) -> EngineFacts:
        self._dead.set()
        self.alive = False
        self.starts += 1
        await asyncio.sleep(0)
        if self.start_failures:
            raise self.start_failures.pop(0)
        self._dead = asyncio.Event()
        if self.starts > 1:
            self.stuck_after = None
        self.alive, self.holds, self.learnt = True, (0, "start"), {}
        return EngineFacts(0, 1024, (), 320, {})

    def die(self) -> None:
        self.alive = False
        self._dead.set()

    async def generate(self, request: ResponseRequest, listener: Any) -> Trajectory:
        raise NotImplementedError

    async def generate_packed(self, request: ResponseRequest, record: Record | None) -> PackedResponse:
        self.requests.append(request)
        if not self.alive:
            raise ReplicaLost("dead")
        dead, aborted = self._dead, self._aborted
        work = asyncio.create_task(self._generate(request, record))
        ends = [asyncio.create_task(dead.wait()), asyncio.create_task(aborted.wait())]
        try:
            await asyncio.wait({work, *ends}, return_when=asyncio.FIRST_COMPLETED)
            if dead.is_set():
                raise ReplicaLost("died")
            if work.done():
                return pack(work.result())
            raise GenerationAborted("aborted")
        finally:
            for task in (work, *ends):
                task.cancel()
            await asyncio.gather(work, *ends, return_exceptions=True)

    async def _generate(self, request: ResponseRequest, record: Record | None) -> Trajectory:
        recorder = Recorder(record.parts.append) if record is not None else None
        attempts: list[Attempt] = list(request.resume_from)
        async with self._places:
            if self.stuck_after == 0:
                await asyncio.Event().wait()
            if self.stuck_after is not None:
                self.stuck_after -= 1
            for segment in range(len(attempts), SEGMENTS):
                self.happens(self, request, segment)
                await asyncio.sleep(self._seconds)
                if not self.alive:
                    raise ReplicaLost("died")
                self.steps += 1
                uncertainty = None if request.policy is None else 0.5
                attempt = attempt_of(
                    [segment], segment=segment, start=segment, version=self.holds[0], uncertainty=uncertainty
                )
                attempts.append(attempt)
                if recorder is not None:
                    recorder.judged(attempt, segment + 1 == SEGMENTS)
        answer = trajectory([], reward=0.0, sample=request.sample)
        return answer.model_copy(update={"group_id": request.group_id, "attempts": attempts})

    async def score(self, *_: Any) -> Any:
        raise NotImplementedError

    async def probe(self) -> EngineUse:
        if not self.alive:
            raise ReplicaLost("dead")
        return EngineUse(steps=self.steps)

    async def sync(self, update: WeightUpdate, deadline_seconds: float, in_flight: InFlight) -> str:
        if not self.alive:
            raise ReplicaLost("dead")
        if self.sync_failures:
            error = self.sync_failures.pop(0)
            if isinstance(error, ReplicaLost):
                self.die()
            raise error
        if in_flight == "abort":
            self._aborted.set()
            self._aborted = asyncio.Event()
        self.holds = (update.version, update.place)
        return update.checksum

    async def priors(self) -> Priors:
        if not self.alive:
            raise ReplicaLost("dead")
        return self.learnt

    async def restore_priors(self, priors: Priors) -> None:
        self.learnt = priors

    async def reset_prefix_cache(self) -> bool:
        return True

    async def pause(self, mode: str) -> None: ...

    async def resume(self) -> None: ...

    async def close(self) -> None:
        self.die()


@pytest.fixture(autouse=True)
def restarts_without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "RESTART_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr("rollout_server.replicas.record.PART_SECONDS", 0.0)


async def rollouts_of(
    *replicas: Replica, stall: float | None = None, response: float | None = None, restarts: int = 5
) -> PoolRollouts:
    pool = Pool(
        list(replicas),
        start_seconds=5.0,
        sync_seconds=5.0,
        probe_seconds=1.0,
        stall_seconds=stall,
        response_seconds=response,
    )
    pool.max_restarts_in_a_row = restarts
    await pool.start()
    rollouts = PoolRollouts(pool, EngineConfig(replicas=len(replicas)))
    rollouts.watch(0.02)
    return rollouts


def requests(groups: int, size: int, policy: ErasurePolicy | None = POLICY) -> list[list[ResponseRequest]]:
    return [
        [
            ResponseRequest(
                prompt_id="p",
                group_id=str(group),
                group_size=size,
                sample=n,
                prompt_token_ids=[1],
                max_tokens=SEGMENTS,
                policy=policy,
            )
            for n in range(size)
        ]
        for group in range(groups)
    ]


async def answered(rollouts: PoolRollouts, wanted: list[list[ResponseRequest]]) -> list[Trajectory]:
    """All answers, each of them whole, and each once."""
    try:
        async with asyncio.timeout(20.0):
            found = [unpack(answer) async for answer in rollouts.generate(wanted)]
    finally:
        await rollouts.close()
    assert sorted((t.group_id, t.sample) for t in found) == sorted((r.group_id, r.sample) for g in wanted for r in g)
    assert all(answer.token_ids == list(range(SEGMENTS)) for answer in found)
    return found


async def test_thirty_two_responses_four_at_a_time_may_take_longer_than_one_response_may() -> None:
    replica = Replica(4, 0.05)
    await answered(await rollouts_of(replica, response=1.0), requests(4, 8))
    assert replica.starts == 1


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 5),
    size=st.integers(1, 4),
    places=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    deaths=st.lists(st.integers(0, 40), max_size=4),
    monitored=st.booleans(),
)
def test_deaths_at_any_moment_cost_no_response_and_no_judged_segment(
    groups: int, size: int, places: list[int], deaths: list[int], monitored: bool
) -> None:
    """`deaths`: after so many segments of all replicas together the one that is about to make the next one dies."""
    made = 0
    left = sorted(deaths)

    def happens(replica: Replica, request: ResponseRequest, segment: int) -> None:
        nonlocal made
        made += 1
        if left and made > left[0]:
            del left[0]
            replica.die()

    async def all_of_them() -> None:
        replicas = [Replica(count) for count in places]
        for replica in replicas:
            replica.happens = happens
        rollouts = await rollouts_of(*replicas)
        await answered(rollouts, requests(groups, size, POLICY if monitored else None))
        died = len(deaths) - len(left)
        counts = rollouts.take_counts()
        assert counts[names.REPLICA_RESTARTS] >= sum(replica.starts - 1 for replica in replicas) - len(places)
        assert (counts[names.RESUBMISSIONS] > 0) == (died > 0)
        assert rollouts.take_counts() == dict.fromkeys(counts, 0)
        if monitored:
            # Of each response under way a death costs at most the segment that it was at.
            assert made <= groups * size * SEGMENTS + died * groups * size
        again = [request for replica in replicas for request in replica.requests if "~" in request.group_id]
        assert all(request.group_size <= size for request in again)

    asyncio.run(all_of_them())


async def test_a_response_goes_on_from_its_last_judged_segment_on_another_replica() -> None:
    first, second = Replica(), Replica()
    first.happens = lambda replica, request, segment: replica.die() if segment == 2 else None
    first.start_failures = []
    (answer,) = await answered(await rollouts_of(first, second), requests(1, 1))
    (again,) = second.requests
    assert [attempt.segment for attempt in again.resume_from] == [0, 1]
    assert again.group_id == "0~1"
    assert answer.group_id == "0"


@pytest.mark.parametrize("finished", [0, 1, 8])
async def test_a_replica_that_makes_no_step_any_more_is_restarted(finished: int) -> None:
    replica = Replica(4, 0.001, stuck_after=finished)
    await answered(await rollouts_of(replica, stall=0.5), requests(4, 8))
    assert replica.starts == 2


async def test_a_replica_that_makes_steps_but_finishes_nothing_is_restarted() -> None:
    replica = Replica(4, 0.001, stuck_after=2)
    rollouts = await rollouts_of(replica, stall=5.0, response=0.5)

    async def steps() -> None:
        while True:
            replica.steps += 1
            await asyncio.sleep(0.01)

    stepping = asyncio.create_task(steps())
    await answered(rollouts, requests(2, 4))
    stepping.cancel()
    assert replica.starts == 2


async def test_a_stuck_replica_is_not_hidden_by_one_that_works() -> None:
    works, stuck = Replica(1, 0.005), Replica(1, 0.005, stuck_after=0)
    await answered(await rollouts_of(works, stuck, stall=0.5), requests(8, 4))
    assert (works.starts, stuck.starts) == (1, 2)


async def test_a_pool_that_was_idle_for_long_starts_its_watch_anew() -> None:
    replica = Replica(2, 0.005)
    rollouts = await rollouts_of(replica, stall=0.5, response=0.5)
    for _ in range(2):
        await asyncio.sleep(0.6)
        assert len([t async for t in rollouts.generate(requests(1, 2))]) == 2
    await rollouts.close()
    assert replica.starts == 1


async def test_leaving_early_leaves_no_task_behind() -> None:
    replica = Replica(1, 0.005)
    rollouts = await rollouts_of(replica)
    stream = rollouts.generate(requests(2, 3))
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    await rollouts.close()
    await asyncio.sleep(0)
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert not [task for task in left if "_group" in str(task) or "_respond" in str(task)]


async def test_only_when_no_replica_can_be_brought_back_does_generate_raise() -> None:
    dead, other = Replica(seconds=0.01), Replica(seconds=0.01)
    rollouts = await rollouts_of(dead, other, restarts=2)
    dead.start_failures = [RuntimeError("no such device")] * 2
    dead.happens = lambda replica, request, segment: replica.die()
    assert len([t async for t in rollouts.generate(requests(4, 2))]) == 8
    other.start_failures = [RuntimeError("no such device either")] * 2
    other.happens = dead.happens
    with pytest.raises(ReplicaError, match=r"replica 0 died .*no such device; replica 1 died .*no such device either"):
        await answered(rollouts, requests(2, 2))


async def test_a_group_that_kills_every_replica_ends_the_run_and_is_named() -> None:
    replica = Replica()
    replica.happens = lambda replica, request, segment: replica.die() if request.group_id[0] == "1" else None
    rollouts = await rollouts_of(replica)
    with pytest.raises(ReplicaError, match=f"group 1 lost its replica {FRUITLESS_LOSSES} times in a row"):
        await answered(rollouts, requests(2, 1))


def update(version: int) -> WeightUpdate:
    return DiskUpdate(version=version, path=f"/nowhere/{version}", checksum=f"c{version}", bytes=1)


async def test_a_replica_that_comes_back_gets_the_newest_weights_before_it_works() -> None:
    replica = Replica(seconds=0.001)
    rollouts = await rollouts_of(replica)
    await rollouts.sync(update(3), 5.0)
    deaths = [1]

    def happens(replica: Replica, request: ResponseRequest, segment: int) -> None:
        if deaths and segment == 2:
            deaths.clear()
            replica.die()

    replica.happens = happens
    answers = await answered(rollouts, requests(2, 2))
    assert {version for answer in answers for version in answer.token_versions} == {3}


@pytest.mark.parametrize("error", [ReplicaLost("killed"), RuntimeError("a checksum that is wrong")])
async def test_a_partial_sync_is_none_and_the_replica_comes_back_with_the_newest(error: Exception) -> None:
    good, bad = Replica(), Replica()
    rollouts = await rollouts_of(good, bad)
    bad.sync_failures = [error]
    report = await rollouts.sync(update(5), 5.0)
    assert [sync.replica for sync in report.replicas] == [0]
    while bad.holds[0] != 5 or not bad.alive:
        await asyncio.sleep(0.01)
    await answered(rollouts, requests(2, 2))
    assert (good.holds[0], bad.holds[0]) == (5, 5)


async def test_the_only_replica_dies_in_a_sync_and_takes_the_weights_when_it_is_back() -> None:
    replica = Replica()
    rollouts = await rollouts_of(replica)
    replica.sync_failures = [ReplicaLost("killed")]
    report = await rollouts.sync(update(5), 5.0)
    assert [(sync.replica, sync.version) for sync in report.replicas] == [(0, 5)]
    # A version may fall: a learner that was rebuilt from a checkpoint publishes that one's again.
    await rollouts.sync(update(4), 5.0)
    await answered(rollouts, requests(1, 1))
    assert replica.holds[0] == 4


async def test_weights_that_no_replica_can_load_are_an_error_at_once() -> None:
    replicas = [Replica(), Replica()]
    rollouts = await rollouts_of(*replicas)
    for replica in replicas:
        replica.sync_failures = [RuntimeError("cannot read /nowhere/5")]
    with pytest.raises(ReplicaError, match="replica 0: RuntimeError: cannot read the file; replica 1"):
        await rollouts.sync(update(5), 60.0)
    await rollouts.close()


async def test_responses_that_a_sync_aborts_are_made_again_from_their_beginning() -> None:
    replica = Replica(seconds=0.02)
    rollouts = await rollouts_of(replica)
    rollouts._in_flight = "abort"

    async def sync_half_way() -> None:
        while replica.steps < 6:
            await asyncio.sleep(0.005)
        await rollouts.sync(update(1), 5.0)

    syncing = asyncio.create_task(sync_half_way())
    answers = await answered(rollouts, requests(2, 2))
    await syncing
    assert {version for answer in answers for version in answer.token_versions} == {1}
    assert replica.starts == 1


async def test_a_replica_that_comes_back_knows_what_it_or_another_had_learnt() -> None:
    first, second = Replica(), Replica()
    rollouts = await rollouts_of(first, second)
    first.learnt, second.learnt = {"kind": [[1.0, 2.0]]}, {"other": [[3.0, 4.0]]}
    assert await rollouts.state() == [first.learnt, second.learnt]
    first.die()
    assert await rollouts.state() == [{"kind": [[1.0, 2.0]]}, second.learnt]
    while first.learnt != {"kind": [[1.0, 2.0]]}:
        await asyncio.sleep(0.01)
    await rollouts.restore([{"kind": [[5.0, 6.0]]}])
    assert first.learnt == second.learnt == {"kind": [[5.0, 6.0]]}
    await rollouts.close()


async def test_those_that_wait_for_a_replica_get_it_in_the_order_in_which_they_came() -> None:
    replica = Replica(1, 0.001)
    rollouts = await rollouts_of(replica)
    replica.die()
    replica.requests.clear()
    streams = [asyncio.create_task(_first(rollouts, [group])) for group in requests(6, 1)]
    await asyncio.gather(*streams)
    await rollouts.close()
    groups = [request.group_id[0] for request in replica.requests]
    assert groups[-6:] == ["0", "1", "2", "3", "4", "5"]


async def _first(rollouts: PoolRollouts, groups: Sequence[Sequence[ResponseRequest]]) -> PackedResponse:
    (answer,) = [answer async for answer in rollouts.generate(groups)]
    return answer


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=12))
def test_a_record_replays_what_was_judged(segments: list[tuple[int, bool]]) -> None:
    """`segments`: erased attempts at each one, and whether the first of them is kept in the end."""
    parts: list[bytes] = []
    recorder = Recorder(parts.append)
    expected: list[Attempt] = []
    for number, (erased, best) in enumerate(segments):
        final = number + 1 == len(segments)
        for attempt in range(erased):
            one = attempt_of([1], segment=number, number=attempt, start=number, verdict="erased", uncertainty=1.0)
            recorder.judged(one, False)
            expected.append(one)
        last = attempt_of([2], segment=number, number=erased, start=number, uncertainty=0.5)
        if best and erased:
            last = last.model_copy(update={"verdict": "erased"})
            kept = expected[len(expected) - erased].model_copy(update={"verdict": "accepted"})
            recorder.restored(last, kept, final)
            expected[len(expected) - erased] = kept
        else:
            recorder.judged(last, final)
        expected.append(last)
    record = Record()
    record.parts = parts
    assert record.attempts() == (expected, bool(segments))
    assert all(pickle.loads(part) for part in parts)


@settings(max_examples=100, deadline=None)
@given(before=st.integers(1, 5), now=st.integers(1, 7))
def test_statistics_go_to_any_number_of_replicas_and_no_kind_is_lost(before: int, now: int) -> None:
    state: list[Priors] = [{"both": [[n, n]], f"only {n}": [[n, n]]} for n in range(before)]
    given_out = shared_out(state, now)
    assert len(given_out) == now
    for number, one in enumerate(given_out):
        assert one["both"] == [[number % before] * 2]
        assert one.keys() == {"both", *(f"only {n}" for n in range(before))}
    if now == before:
        assert all(one | state[n] == one for n, one in enumerate(given_out))


def test_a_replica_that_ran_out_of_memory_says_what_to_lower() -> None:
    engine = EngineConfig(enforce_eager=False)
    text = _cause(ValueError("No available memory for the cache blocks."), engine)
    assert "memory ran out: lower rollout.engine.max_concurrent_responses (64)" in text
    assert "enforce_eager: true" in text
    assert "lower" not in _cause(ValueError("no such file"), engine)


def test_the_driver_that_uses_the_pool_loads_neither_vllm_nor_transformers() -> None:
    code = "import sys, rollout_server.replicas.rollouts; print({'vllm', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
