"""The choices of one request: started on replicas, followed to their end, cancelled together."""

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable

from common.slices import Slices, begun, ended
from common.trajectory import ResponseRequest, Trajectory
from common.weights import NonFiniteLogits
from rollout_server.http.openai.choice import Choice, Chunk
from rollout_server.http.openai.errors import unavailable
from rollout_server.replicas.member import Member
from rollout_server.replicas.pool import Pool
from rollout_server.replicas.replica import ReplicaLost
from rollout_server.replicas.resubmission import on_replicas, requests_again

log = logging.getLogger("e3rl.generation")
RESUBMISSIONS = 3
SCORES_AT_ONCE = 1000
MakeChoice = Callable[[int, ResponseRequest, Callable[[Choice], None] | None], Choice]


class Generation:
    """Generates groups of responses; each group stays on one replica.

    If a replica dies, what its groups lack is generated on another, at most `RESUBMISSIONS` times a group: monitored
    responses go on from their last judged segment, plain ones begin anew. If part of a plain one may have been shown
    to the client, the request fails with 503. `generated` is called once all responses are complete.
    """

    def __init__(
        self,
        replicas: Pool,
        make_choice: MakeChoice,
        generated: Callable[[], None],
        streams: bool,
    ) -> None:
        self._replicas = replicas
        self._make_choice = make_choice
        self._generated = generated
        self._streams = streams
        self._fresh: dict[int, Choice] = {}
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._shown = False
        self.resubmissions = 0
        self.groups: list[list[Choice]] = []

    async def take(self, groups: list[list[ResponseRequest]]) -> None:
        """What is to be generated. Once, and first."""
        slices = Slices()
        indices = itertools.count()
        changed = self._changed if self._streams else None
        for requests in groups:
            group: list[Choice] = []
            for request in requests:
                group.append(self._make_choice(next(indices), request, changed))
                await slices.turn()
            self.groups.append(group)

    async def forget(self) -> None:
        """Give up what was generated; freeing all of it at once would hold the event loop."""
        slices = Slices()
        self._fresh.clear()
        for group in self.groups:
            while group:
                scores = group.pop().prompt_logprobs
                while scores:
                    del scores[-SCORES_AT_ONCE:]
                    await slices.turn()
                await slices.turn()

    @property
    def choices(self) -> list[Choice]:
        return [choice for group in self.groups for choice in group]

    async def finish(self) -> None:
        """Generate to the end.

        Raises:
            Exception: the first failure; the other responses are cancelled.
        """
        try:
            await self._start()
            await _all(self._tasks)
            self._generated()
        finally:
            await ended(self._tasks)

    async def chunks(self) -> AsyncGenerator[list[tuple[Choice, Chunk]], None]:
        """What is new, as it comes: consecutive chunks of a choice that came at once are one."""
        everything = asyncio.create_task(self._everything())
        everything.add_done_callback(self._ended)
        try:
            while self._fresh or not everything.done():
                await self._wake.wait()
                self._wake.clear()
                fresh, self._fresh = self._fresh, {}
                self._shown = self._shown or any(choice.chunks for choice in fresh.values())
                batch = []
                slices = Slices()
                for choice in fresh.values():
                    batch += [(choice, chunk) for chunk in _joined(choice)]
                    await slices.turn()
                if batch:
                    yield batch
            await everything
        finally:
            everything.cancel()
            await asyncio.gather(everything, return_exceptions=True)
            await ended(self._tasks)

    def _changed(self, choice: Choice) -> None:
        self._fresh[choice.index] = choice
        self._wake.set()

    def _ended(self, everything: "asyncio.Future[None]") -> None:
        self._wake.set()
        if not everything.cancelled() and everything.exception() is None:
            self._generated()

    async def _everything(self) -> None:
        await self._start()
        await _all(self._tasks)

    async def _start(self) -> None:
        await begun(((self._group, number) for number in range(len(self.groups))), self._tasks)

    async def _group(self, number: int) -> None:
        """Generate one group, what is left of it on another replica if its own dies."""
        group = self.groups[number]

        def left() -> list[Choice]:
            return [choice for choice in group if choice.finish_reason is None]

        async def generate(member: Member, losses: int) -> None:
            await self._generate(left(), losses, member)

        def lost(error: ReplicaLost, losses: int) -> None:
            if losses >= RESUBMISSIONS:
                raise unavailable("the replica that generated this response died") from error
            self.resubmissions += 1
            self._rewind(group)

        await on_replicas(self._replicas, lambda: len(left()), generate, lost, waits=False)

    async def _generate(self, choices: list[Choice], losses: int, member: Member) -> None:
        """Generate what is left of a group on `member`."""
        requests = [choice.request for choice in choices]
        if losses:
            requests = requests_again([(c.request, c.attempts.copy(), c.is_complete) for c in choices], losses)
        await _score_prompt(choices, member)
        if choices[0].options.only_prompt:
            return
        tasks: list[asyncio.Task[None]] = []
        try:
            pairs = zip(choices, requests, strict=True)
            await begun(((self._respond, choice, request, member) for choice, request in pairs), tasks)
            await _all(tasks)
        finally:
            await ended(tasks)

    def _rewind(self, group: list[Choice]) -> None:
        """Take the unfinished choices of a group back to where they can be resumed."""
        for place, choice in enumerate(group):
            if choice.finish_reason is not None:
                continue
            if choice.request.policy is not None:
                choice.rewind()
            elif self._shown:
                raise unavailable("the replica that generated this response died")
            else:
                self._fresh.pop(choice.index, None)
                changed = self._changed if self._streams else None
                group[place] = self._make_choice(choice.index, choice.request, changed)

    async def _respond(self, choice: Choice, request: ResponseRequest, member: Member) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("responses are generated in tasks of their own")
        listens = request.policy is not None or choice.wants_tokens
        choice.stop = lambda: _cancel(task)
        trajectory: Trajectory | None = None
        try:
            trajectory = await member.replica.generate(request, choice if listens else None)
        except asyncio.CancelledError:
            if not choice.has_stopped():
                raise
            task.uncancel()
        except NonFiniteLogits as error:
            member.non_finite_version = error.version
            raise
        except ReplicaLost:
            if not choice.has_stopped():
                raise
        if trajectory is not None and not listens:
            choice.take(trajectory)
        choice.finish(trajectory, member.version)


async def _score_prompt(choices: list[Choice], member: Member) -> None:
    """Score the prompt of a group's choices, if that is wanted and not yet done."""
    options, request = choices[0].options, choices[0].request
    if options.prompt_logprobs is None or all(choice.prompt_logprobs is not None for choice in choices):
        return
    salt = request.extras.cache_salt
    scores = await member.replica.score(request.prompt_token_ids, options.prompt_logprobs, salt)
    for choice in choices:
        choice.prompt_logprobs = scores
        if options.only_prompt:
            choice.finish_scored(member.version)


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()


async def _all(tasks: list[asyncio.Task[None]]) -> None:
    """Wait for all; the first failure raises. One that cancelled itself at a stop string is no failure."""
    await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in tasks:
        if task.done() and not task.cancelled():
            task.result()


def _joined(choice: Choice) -> list[Chunk]:
    """The choice's new chunks, with texts joined up to an erasure."""
    chunks, choice.chunks = choice.chunks, []
    joined: list[Chunk] = []
    texts: list[list[str]] = []
    for chunk in chunks:
        last = joined[-1] if joined else None
        if last is None or last.erased is not None or chunk.erased is not None:
            joined.append(chunk)
            texts.append([chunk.text])
        else:
            texts[-1].append(chunk.text)
            last.token_ids += chunk.token_ids
            last.entries.extend(chunk.entries)
            last.final = last.final or chunk.final
    for chunk, parts in zip(joined, texts, strict=True):
        chunk.text = "".join(parts)
    return joined
