"""Places are never lost and handed out in fair order, whatever comes together with what."""

import asyncio
import json
import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_server.http.openai.errors import ApiError
from rollout_server.http.server.admission import Admission
from tests.stub_replica import ERASING, StubReplica, StubServer, saying, until

CAPACITY = 4
ASK = st.tuples(st.just("ask"), st.integers(0, 2), st.integers(1, CAPACITY + 2))
OTHER = st.tuples(st.sampled_from(["cancel", "release"]), st.integers(0, 50), st.just(0))
TURN = st.tuples(st.just("turn"), st.integers(1, 3), st.just(0))


@dataclass(eq=False)
class Asked:
    """A request: its task ends with the number of places that it was given. `first_at`: see `Clients`."""

    client: int
    weight: int
    task: "asyncio.Task[int]"
    is_released: bool = False
    first_at: int | None = None

    @property
    def held(self) -> int:
        """Places of a request that was told so and has not given them back."""
        has = self.task.done() and not self.task.cancelled() and self.task.exception() is None
        return self.task.result() if has and not self.is_released else 0


class Clients:
    """Carries out generated actions. `order`: requests as they were admitted; `first_at`: how many had been when the
    request became the first of its client's that wait."""

    def __init__(self, max_waiting: int = 1000) -> None:
        self.admission = Admission(CAPACITY, max_waiting)
        self.asked: list[Asked] = []
        self.order: list[Asked] = []

    def act(self, action: str, number: int, weight: int) -> None:
        """One action; nothing else runs meanwhile."""
        if action == "ask":
            task = asyncio.get_running_loop().create_task(self.admission.acquire(str(number), weight))
            asked = Asked(number, weight, task)
            task.add_done_callback(lambda task: self._ended(asked))
            self.asked.append(asked)
        elif self.asked and action == "cancel":
            self.asked[number % len(self.asked)].task.cancel()
        elif action == "release" and (holding := [asked for asked in self.asked if asked.held]):
            self.release(holding[number % len(holding)])

    def release(self, asked: Asked) -> None:
        held = asked.held
        asked.is_released = True
        self.admission.release(held)

    def _ended(self, asked: Asked) -> None:
        if asked.held:
            self.order.append(asked)

    def waiting(self, client: int) -> list[Asked]:
        return [asked for asked in self.asked if asked.client == client and not asked.task.done()]

    async def settle(self) -> None:
        for _ in range(6):
            await asyncio.sleep(0)

    async def drain(self) -> None:
        """Give everything back until nobody waits."""
        for _ in range(len(self.asked) + 1):
            for asked in self.asked:
                if asked.held:
                    self.release(asked)
            await self.settle()


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(ASK, ASK, OTHER, OTHER, TURN), max_size=40), st.integers(0, 3))
def test_whatever_comes_together_with_what_no_place_is_lost(actions: list[Any], max_waiting: int) -> None:
    async def run() -> None:
        clients = Clients(max_waiting if max_waiting < 3 else 1000)
        admission = clients.admission
        for action, number, weight in actions:
            if action == "turn":
                for _ in range(number):
                    await asyncio.sleep(0)
            else:
                clients.act(action, number, weight)
            held = sum(asked.held for asked in clients.asked)
            assert held <= admission.busy <= CAPACITY
        await clients.settle()
        assert admission.busy == sum(asked.held for asked in clients.asked)
        assert admission.waiting == sum(not asked.task.done() for asked in clients.asked)
        await clients.drain()
        for asked in clients.asked:
            error = None if asked.task.cancelled() else asked.task.exception()
            assert error is None or (isinstance(error, ApiError) and error.status == 429 and max_waiting < 3)
        assert (admission.busy, admission.waiting) == (0, 0)
        async with asyncio.timeout(1.0):
            assert await admission.acquire("another", CAPACITY) == CAPACITY

    asyncio.run(run())


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(ASK, ASK, OTHER), max_size=40))
def test_nobody_is_overtaken_twice_by_the_same_client_and_no_place_is_idle_for_one_that_fits(
    actions: list[Any],
) -> None:
    async def run() -> None:
        clients = Clients()
        for action in [*actions, *[("release", 0, 0)] * len(actions)]:
            clients.act(*action)
            await clients.settle()
            firsts = [waiting[0] for client in range(3) if (waiting := clients.waiting(client))]
            for first in firsts:
                first.first_at = len(clients.order) if first.first_at is None else first.first_at
            free = CAPACITY - clients.admission.busy
            assert not firsts or any(min(first.weight, CAPACITY) > free for first in firsts)
        assert not any(clients.waiting(client) for client in range(3))
        for place, asked in enumerate(clients.order):
            if asked.first_at is not None:
                before = [other.client for other in clients.order[asked.first_at : place]]
                assert len(before) == len(set(before))
        for client in range(3):
            admitted = [asked for asked in clients.order if asked.client == client]
            assert admitted == [asked for asked in clients.asked if asked in set(admitted)]

    asyncio.run(run())


async def test_places_that_come_free_as_a_waiting_request_is_cancelled_are_not_its_own() -> None:
    admission = Admission(4, 10)
    held = await admission.acquire("x", 4)
    waiting = asyncio.create_task(admission.acquire("y", 3))
    await asyncio.sleep(0)
    waiting.cancel()
    admission.release(held)
    await asyncio.gather(waiting, return_exceptions=True)
    assert (admission.busy, admission.waiting) == (0, 0)


def test_places_that_nobody_holds_cannot_be_given_back() -> None:
    with pytest.raises(ValueError, match="2 places cannot be given back: 0 are taken"):
        Admission(4, 10).release(2)


def is_idle(server: StubServer, replica: StubReplica) -> bool:
    """Whether nothing of any request is left."""
    service = server.service
    return (
        not service.under_way
        and (service.admission.busy, service.admission.waiting, replica.under_way) == (0, 0, 0)
        and all(member.responses == 0 for member in server.replicas.members)
    )


class Caller:
    """One request over ASGI itself, whose client can leave and may not read."""

    def __init__(self, server: StubServer, body: dict[str, Any], *, reads: bool = True) -> None:
        self._message: Any = {"type": "http.request", "body": json.dumps({"model": "stub", **body}).encode()}
        self.gone = asyncio.Event()
        self.reading = asyncio.Event()
        if reads:
            self.reading.set()
        self.status = 0
        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
            "query_string": b"", "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
            "client": ("127.0.0.1", 1), "http_version": "1.1", "scheme": "http",
        }  # fmt: skip
        self.task = asyncio.create_task(server.app(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        if self._message is not None:
            message, self._message = self._message, None
            return message
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self.reading.wait()


@pytest.mark.parametrize("seed", range(8))
async def test_after_a_storm_of_clients_that_leave_at_every_stage_all_places_are_free(seed: int) -> None:
    """Some leave, some calls are cancelled, some both, as Ray Serve does; some do not read and then leave."""
    draw = random.Random(seed)

    def script(request: Any) -> Any:
        if draw.random() < 0.05:
            raise RuntimeError("the engine has a fault")
        return list(ERASING) * draw.randint(1, 3)

    replica = StubReplica(script)
    async with (
        asyncio.timeout(60.0),
        StubServer(replica, max_concurrent_responses=8, max_waiting_requests=20) as server,
    ):
        callers: list[Caller] = []
        for _ in range(150):
            erasure = draw.choice([{"enabled": False}, {"stream": "commit"}, {"stream": "live"}, {}])
            body = {
                "prompt": "a", "n": draw.choice([1, 1, 4, 16]), "stream": draw.random() < 0.5, "erasure": erasure
            }  # fmt: skip
            callers.append(Caller(server, body, reads=draw.random() < 0.8))
            for _ in range(draw.randint(0, 6)):
                await asyncio.sleep(0)
            for caller in draw.sample(callers, min(len(callers), draw.randint(0, 3))):
                if draw.random() < 0.7:
                    caller.gone.set()
                if draw.random() < 0.3:
                    caller.task.cancel()
        for caller in callers:
            caller.gone.set()
            caller.reading.set()
        await asyncio.gather(*(caller.task for caller in callers), return_exceptions=True)
        await until(lambda: is_idle(server, replica))
        replica.script = saying("a")
        assert (await server.post(prompt="a", n=8)).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_does_not_read_its_answer_holds_no_place(stream: bool) -> None:
    replica = StubReplica(saying("a", "b"))
    async with asyncio.timeout(10.0), StubServer(replica, max_concurrent_responses=1) as server:
        slow = Caller(server, {"prompt": "a", "stream": stream}, reads=False)
        await until(lambda: slow.status == 200)
        assert (await server.post(prompt="b")).status_code == 200
        slow.gone.set()
        await slow.task
        await until(lambda: is_idle(server, replica))


@pytest.mark.parametrize("n", [1, 3])
async def test_a_stream_ends_though_its_client_began_to_read_when_all_was_generated(n: int) -> None:
    replica = StubReplica(saying("a", "b", "c"))
    async with asyncio.timeout(10.0), StubServer(replica) as server:
        slow = Caller(server, {"prompt": "a", "stream": True, "n": n}, reads=False)
        await until(lambda: slow.status == 200 and replica.under_way == server.service.admission.busy == 0)
        slow.reading.set()
        await slow.task
        await until(lambda: is_idle(server, replica))


async def test_a_request_that_fails_as_it_is_prepared_holds_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no choice can be made")

    replica = StubReplica(saying("a"))
    async with StubServer(replica, max_concurrent_responses=1) as server:
        monkeypatch.setattr(server.service, "choice_maker", lambda *_: fail)
        assert (await server.post(prompt="a")).status_code == 500
        monkeypatch.undo()
        assert (await server.post(prompt="a")).status_code == 200
        assert is_idle(server, replica)
