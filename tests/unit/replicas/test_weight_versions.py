"""What replicas hold and serve through syncs that fail, replicas that die and restarts that take time: no engine."""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.config.run import InFlight
from common.packed import PackedResponse
from common.trajectory import ResponseRequest, Trajectory
from common.weights import DiskUpdate, WeightUpdate
from rollout_server.replicas import pool as replicas_module
from rollout_server.replicas.errors import VersionNotNewer, WeightsNotLoaded
from rollout_server.replicas.pool import Pool
from rollout_server.replicas.record import Record
from rollout_server.replicas.replica import EngineFacts, ReplicaLost
from rollout_server.replicas.use import EngineUse

FIRST_VERSION = 3
REPLICAS = 3
SYNC_SECONDS = 5.0


class KeptFile:
    """Weights that are nowhere."""

    def __init__(self, path: str) -> None:
        self._path = path

    def path(self) -> str:
        return self._path


class FakeReplica:
    """Holds what it was given last. `starts`, `syncs`: what the next calls do, `ok` if nothing is said.

    While `may_start` is not set, a start takes its time.
    """

    def __init__(self) -> None:
        self.holds: tuple[int, str] | None = None
        self.alive = False
        self.starts: list[str] = []
        self.syncs: list[str] = []
        self.may_start = asyncio.Event()
        self.may_start.set()

    async def start(self) -> EngineFacts:
        self.alive, self.holds = False, None
        await self.may_start.wait()
        if self.starts and self.starts.pop(0) == "fail":
            raise ReplicaLost("did not start")
        self.alive, self.holds = True, (FIRST_VERSION, "first")
        return EngineFacts(FIRST_VERSION, 1024, (), 320, {})

    async def generate(self, request: ResponseRequest, listener: Any) -> Trajectory:
        raise NotImplementedError

    async def generate_packed(self, request: ResponseRequest, record: Record | None) -> PackedResponse:
        raise NotImplementedError

    async def probe(self) -> EngineUse:
        if not self.alive:
            raise ReplicaLost("dead")
        return EngineUse()

    async def sync(self, update: WeightUpdate, deadline_seconds: float, in_flight: InFlight) -> str:
        await asyncio.sleep(0)
        what = self.syncs.pop(0) if self.syncs else "ok"
        if not self.alive or what == "die":
            self.alive, self.holds = False, None
            raise ReplicaLost("died of it")
        if what == "fail":
            self.holds = None
            raise RuntimeError(f"cannot load {update.path}")
        self.holds = (update.version, update.checksum)
        return update.checksum

    async def pause(self, mode: str) -> None:
        return

    async def resume(self) -> None:
        return

    async def close(self) -> None:
        self.alive = False


def update_with(content: str) -> WeightUpdate:
    return DiskUpdate(version=0, path=f"/{content}", checksum=content, bytes=1)


class Loop:
    """A replica set in an event loop of its own; every restart is given one chance without waiting."""

    def __init__(self, count: int = REPLICAS, sync_seconds: float = SYNC_SECONDS) -> None:
        self._loop = asyncio.new_event_loop()
        self.replicas = [FakeReplica() for _ in range(count)]
        self.set = Pool(list(self.replicas), start_seconds=60.0, sync_seconds=sync_seconds, probe_seconds=1.0)
        self.run(self.set.start())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(work)

    async def sync(self, content: str, version: int | None = None) -> WeightUpdate:
        return await self.set.sync(update_with(content), KeptFile(f"/kept/{content}"), version)

    async def die(self, number: int) -> None:
        """The replica dies, and a probe finds it so."""
        self.replicas[number].alive, self.replicas[number].holds = False, None
        await self.set.probe(self.set.members[number])

    def settle(self) -> None:
        """Let restarts that may go on do so."""

        async def turns() -> None:
            for _ in range(40):
                await asyncio.sleep(0)

        self.run(turns())

    def close(self) -> None:
        self.run(self.set.close())
        self.settle()
        self._loop.close()


OUTCOMES = st.lists(st.sampled_from(["ok", "ok", "fail", "die"]), min_size=REPLICAS, max_size=REPLICAS)


class WeightVersions(RuleBasedStateMachine):
    """Syncs, deaths and restarts in any order. `newest`: the newest version that was ever served."""

    def __init__(self) -> None:
        super().__init__()
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(replicas_module, "RESTART_PAUSE_SECONDS", 0.0)
        # Where the loop has nothing to do but wait, a sync's deadline is at once.
        self.loop = Loop(sync_seconds=0.02)
        self.newest = FIRST_VERSION
        self.content = {FIRST_VERSION: "first"}
        self.count = 0

    @rule(outcomes=OUTCOMES, step=st.integers(-2, 3) | st.none(), again=st.booleans())
    def sync(self, outcomes: list[str], step: int | None, again: bool) -> None:
        for replica, outcome in zip(self.loop.replicas, outcomes, strict=True):
            replica.syncs = [outcome]
        self.count += 1
        version = None if step is None else max(self.newest + step, 0)
        content = self.content[self.newest] if again else f"weights {self.count}"
        before = self.newest
        refused = version is not None and (version < before or (version == before and not again))
        update, status = self._try(content, version)
        if update is None:
            # What a replica was started with has no checksum to compare with.
            assert status == 409 if refused else status == 503 or version == before == FIRST_VERSION
        else:
            assert not refused
            serving = [member for member in self.loop.set.members if member.error is None]
            assert len(serving) == sum(not member.gave_up for member in self.loop.set.members) > 0
            for member in serving:
                assert self.loop.replicas[member.number].holds == (update.version, content)
        for replica in self.loop.replicas:
            replica.syncs = []
        self._look()

    def _try(self, content: str, version: int | None) -> tuple[WeightUpdate | None, int]:
        try:
            return self.loop.run(self.loop.sync(content, version)), 200
        except VersionNotNewer:
            return None, 409
        except WeightsNotLoaded:
            return None, 503

    @rule(number=st.integers(0, REPLICAS - 1))
    def die(self, number: int) -> None:
        if self.loop.set.members[number].gave_up:
            return
        self.loop.run(self.loop.die(number))

    @rule(number=st.integers(0, REPLICAS - 1))
    def starts_are_slow(self, number: int) -> None:
        self.loop.replicas[number].may_start.clear()

    @rule(number=st.integers(0, REPLICAS - 1), failures=st.integers(0, 2))
    def starts_go_on(self, number: int, failures: int) -> None:
        self.loop.replicas[number].starts = ["fail"] * failures
        self.loop.replicas[number].may_start.set()
        self.loop.settle()

    @precondition(lambda self: all(r.may_start.is_set() for r in self.loop.replicas))
    @rule()
    def in_the_end_all_that_serve_hold_the_newest(self) -> None:
        self.loop.settle()
        for replica, member in zip(self.loop.replicas, self.loop.set.members, strict=True):
            if member.error is None and replica.alive:
                assert replica.holds == (self.newest, self.content[self.newest])

    @invariant()
    def what_serves_is_what_is_said(self) -> None:
        self._look()
        for replica, member in zip(self.loop.replicas, self.loop.set.members, strict=True):
            if member.error is not None or not replica.alive:
                continue
            assert replica.holds is not None
            assert member.version == replica.holds[0]
            assert member.checksum == replica.holds[1] or (member.checksum is None and replica.holds[1] == "first")

    def _look(self) -> None:
        """What is served now is the newest that ever was, each version with one content."""
        for replica, member in zip(self.loop.replicas, self.loop.set.members, strict=True):
            if member.error is None and replica.holds is not None:
                version, content = replica.holds
                assert version >= self.newest, "a served version fell"
                assert self.content.setdefault(version, content) == content, "two weights with one version"
                self.newest = version

    def teardown(self) -> None:
        for replica in self.loop.replicas:
            replica.may_start.set()
        self.loop.close()
        self._patch.undo()


TestWeightVersions = WeightVersions.TestCase
TestWeightVersions.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@contextlib.contextmanager
def looped(count: int, sync_seconds: float = SYNC_SECONDS) -> Any:
    loop = Loop(count, sync_seconds)
    try:
        yield loop
    finally:
        loop.close()


def test_a_sync_waits_for_the_only_replica_to_come_back() -> None:
    with looped(1) as loop:
        replica = loop.replicas[0]
        replica.may_start.clear()
        loop.run(loop.die(0))

        async def sync_while_it_restarts() -> WeightUpdate:
            syncing = asyncio.create_task(loop.sync("new"))
            await asyncio.sleep(0.05)
            assert not syncing.done()
            replica.may_start.set()
            return await syncing

        assert loop.run(sync_while_it_restarts()).version == FIRST_VERSION + 1
        assert replica.holds == (FIRST_VERSION + 1, "new")


@pytest.mark.parametrize("count", [1, 2])
def test_a_sync_is_no_success_while_a_replica_lacks_the_weights(count: int) -> None:
    with looped(count, sync_seconds=0.05) as loop:
        replica = loop.replicas[-1]
        replica.may_start.clear()
        loop.run(loop.die(count - 1))
        with pytest.raises(WeightsNotLoaded, match=f"replica {count - 1} died and is being restarted") as error:
            loop.run(loop.sync("new"))
        assert error.value.may_come
        replica.may_start.set()
        loop.settle()
        # Nobody held them if there is only one; else the one that comes back must not fall behind the other.
        expected = (FIRST_VERSION, "first") if count == 1 else (FIRST_VERSION + 1, "new")
        assert [r.holds for r in loop.replicas] == [expected] * count


def test_a_replica_that_did_not_load_is_restarted_with_what_the_others_serve() -> None:
    with looped(2) as loop:
        loop.replicas[1].syncs = ["fail"]
        with pytest.raises(WeightsNotLoaded, match="replica 1: RuntimeError: cannot load the file"):
            loop.run(loop.sync("new", 9))
        assert [m.error is None for m in loop.set.members] == [True, False]
        assert loop.set.version == 9
        loop.settle()
        assert [r.holds for r in loop.replicas] == [(9, "new")] * 2
        # The same weights once more are the retry of a sync that was incomplete; others need a version of their own.
        assert loop.run(loop.sync("new", 9)).version == 9
        with pytest.raises(VersionNotNewer, match="version 9 has been served with other weights"):
            loop.run(loop.sync("other", 9))


def test_a_version_that_nobody_served_may_be_tried_again_and_is_not_given_to_others() -> None:
    with looped(1) as loop:
        loop.replicas[0].syncs = ["fail"]
        with pytest.raises(WeightsNotLoaded, match="were not loaded"):
            loop.run(loop.sync("new", 9))
        assert loop.run(loop.sync("other")).version == 10
        with pytest.raises(VersionNotNewer, match="version 10 has been served"):
            loop.run(loop.sync("new", 9))


def test_versions_do_not_fall_behind_the_largest_that_a_request_may_name() -> None:
    with looped(1) as loop:
        assert loop.run(loop.sync("a", 2**62)).version == 2**62
        assert loop.run(loop.sync("b")).version == 2**62 + 1
        loop.run(loop.die(0))
        loop.settle()
        assert loop.run(loop.sync("c")).version == 2**62 + 2
