"""The pool's watch over its replicas: responses may wait for a place, a stuck replica is noticed."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config.run import EngineConfig
from common.packed import PackedResponse, pack
from common.trajectory import ResponseRequest
from rollout_server.replicas.training_pool import ReplicaError, RolloutPool, _cause, shared_out
from tests.trajectories import trajectory

Duration = Callable[[ResponseRequest], float]


class Replica:
    """Answers as a Ray actor does: `places` responses at a time, each after its own duration; `stuck_after` of them
    nothing comes any more."""

    def __init__(self, places: int, duration: Duration, stuck_after: int | None = None) -> None:
        self._places = asyncio.Semaphore(places)
        self._duration = duration
        self._left = stuck_after
        self.generate = self
        self.waiting = 0

    def options(self, **options: Any) -> "Replica":
        return self

    def remote(self, requests: list[ResponseRequest]) -> AsyncIterator[Awaitable[PackedResponse]]:
        return self._stream(requests)

    async def _stream(self, requests: list[ResponseRequest]) -> AsyncIterator[Awaitable[PackedResponse]]:
        tasks = [asyncio.create_task(self._respond(request)) for request in requests]
        try:
            for finished in asyncio.as_completed(tasks):
                result = await finished

                async def reference(result: PackedResponse = result) -> PackedResponse:
                    return result

                yield reference()
        finally:
            for task in tasks:
                task.cancel()

    async def _respond(self, request: ResponseRequest) -> PackedResponse:
        async with self._places:
            if self._left == 0:
                await asyncio.Event().wait()
            if self._left is not None:
                self._left -= 1
            await asyncio.sleep(self._duration(request))
        answer = trajectory([], reward=0.0, sample=request.sample)
        return pack(answer.model_copy(update={"group_id": request.group_id}))


def pool(replicas: Sequence[Replica], response_seconds: float) -> RolloutPool:
    result = RolloutPool()
    result._engine = EngineConfig(replicas=len(replicas), response_seconds=response_seconds)
    result._replicas = list(replicas)
    result._outstanding = [0] * len(replicas)
    result._progressed = [0.0] * len(replicas)
    return result


def requests(groups: int, size: int) -> list[list[ResponseRequest]]:
    return [
        [
            ResponseRequest(
                prompt_id="p", group_id=str(group), group_size=size, sample=n, prompt_token_ids=[1], max_tokens=1
            )
            for n in range(size)
        ]
        for group in range(groups)
    ]


async def answered(replicas: Sequence[Replica], limit: float, wanted: list[list[ResponseRequest]]) -> set[Any]:
    return {(t.group_id, t.sample) async for t in pool(replicas, limit).generate(wanted)}


def test_thirty_two_responses_four_at_a_time_may_take_longer_than_one_response_may() -> None:
    async def all_of_them() -> None:
        found = await answered([Replica(4, lambda request: 0.05)], 0.15, requests(4, 8))
        assert len(found) == 32

    asyncio.run(all_of_them())


@settings(max_examples=25, deadline=None)
@given(
    groups=st.integers(1, 6),
    size=st.integers(2, 5),
    places=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_no_number_of_waiting_responses_is_an_error(groups: int, size: int, places: list[int], seed: int) -> None:
    wanted = requests(groups, size)

    def duration(request: ResponseRequest) -> float:
        return 0.001 * (hash((seed, request.group_id, request.sample)) % 15)

    async def all_of_them() -> None:
        found = await answered([Replica(count, duration) for count in places], 0.3, wanted)
        assert found == {(r.group_id, r.sample) for group in wanted for r in group}

    asyncio.run(all_of_them())


@pytest.mark.parametrize("finished", [0, 1, 8])
def test_a_replica_that_finishes_nothing_any_more_is_noticed(finished: int) -> None:
    async def watch() -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        with pytest.raises(ReplicaError, match=r"replica 0 finished none of its \d+ responses within 0\.2 s"):
            await answered([Replica(4, lambda request: 0.01, stuck_after=finished)], 0.2, requests(4, 8))
        assert loop.time() - started < 2.0

    asyncio.run(watch())


def test_a_stuck_replica_is_not_hidden_by_one_that_works() -> None:
    async def watch() -> None:
        replicas = [Replica(1, lambda request: 0.1), Replica(1, lambda request: 0.1, stuck_after=0)]
        loop = asyncio.get_running_loop()
        started = loop.time()
        with pytest.raises(ReplicaError, match="replica 1 finished none"):
            await answered(replicas, 0.3, requests(8, 4))
        assert loop.time() - started < 1.0

    asyncio.run(watch())


def test_a_pool_that_was_idle_for_long_starts_its_watch_anew() -> None:
    async def twice() -> None:
        watched = pool([Replica(2, lambda request: 0.01)], 0.1)
        for _ in range(2):
            assert len([t async for t in watched.generate(requests(1, 2))]) == 2
            await asyncio.sleep(0.15)

    asyncio.run(twice())


def test_leaving_early_leaves_no_task_behind() -> None:
    async def leave() -> None:
        stream = pool([Replica(1, lambda request: 0.01)], 1.0).generate(requests(2, 3))
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        await asyncio.sleep(0)
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not [task for task in left if "_generate_group" in str(task) or "_awaited" in str(task)]

    asyncio.run(leave())


@settings(max_examples=100, deadline=None)
@given(before=st.integers(1, 5), now=st.integers(1, 7))
def test_statistics_go_to_any_number_of_replicas_and_no_kind_is_lost(before: int, now: int) -> None:
    state = [{"both": [[n, n]], f"only {n}": [[n, n]]} for n in range(before)]
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
