"""A replica without a model: it says what it is told to, so that the HTTP layer can be tested by itself."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import torch

from common.config.run import InFlight
from common.packed import PackedResponse
from common.trajectory import Attempt, ResponseRequest, Trajectory, Verdict
from common.weights import NonFiniteLogits, WeightUpdate
from rollout_server.http.routes.admin import WeightLoader, admin_app
from rollout_server.http.routes.public import public_app
from rollout_server.http.routes.service import Service
from rollout_server.http.server.settings import ServerSettings
from rollout_server.http.server.tracing import Tracing
from rollout_server.replicas.pool import Pool
from rollout_server.replicas.record import Record
from rollout_server.replicas.replica import EngineFacts, Priors, ReplicaLost
from rollout_server.replicas.use import EngineUse
from tests.http_server import events
from tests.models import byte_tokenizer
from tests.trajectories import attempt_of

EOS = 256
ERASING: list[tuple[Verdict, str]] = [
    ("accepted", "Ünd "),
    ("erased", "€wro"),
    ("erased", "ng😀"),
    ("accepted", "right"),
    ("accepted", "."),
]
"""A script in which the second segment is erased twice; characters of one to four bytes."""
EXHAUSTED: list[tuple[str, str]] = [
    ("erased", "Ünd "),
    ("gives way to 0", "€wro"),
    ("accepted", "ri"),
    ("erased", "ng😀"),
    ("erased", "ght€"),
    ("gives way to 1", "x"),
    ("accepted", "."),
    ("erased", "!"),
    ("gives way to 0", "?!"),
]
"""A script in which erasures are spent three times, at the end too, and an earlier attempt is kept."""
Script = Callable[[ResponseRequest], Sequence[tuple[str, str]]]
"""What a response is: attempts in order, each `("erased" | "accepted" | "gives way to NUMBER", text)`."""


UNCERTAINTY = 1.5
"""U of every segment."""


class StubReplica:
    """Implements `Replica`. `script` makes the attempts of a monitored response, and the text of a plain one.

    A response waits for `gate`, if there is one, before attempt number `said_before_gate` of its script. `failures`
    are raised, one a call, before anything is said, and `pause_failures` by `pause`. It dies after what `dies_after`
    says, one a call: the number of tokens and judgements that come first. `breaks_after`: so many attempts come before
    logits of version 3 that are not finite, in every call.
    """

    def __init__(self, script: Script, gate: asyncio.Event | None = None, said_before_gate: int = 0) -> None:
        self.script = script
        self.gate = gate
        self.said_before_gate = said_before_gate
        self.ends = True
        """Whether a response ends with the end-of-sequence token, unless that is ignored."""
        self.failures: list[Exception] = []
        self.pause_failures: list[Exception] = []
        self.dies_after: list[int] = []
        self.breaks_after: int | None = None
        self.requests: list[ResponseRequest] = []
        self.under_way = 0
        self.calls: list[str] = []
        self.tokenizer = byte_tokenizer(1024)
        self.checksum: str | None = None
        self.use = EngineUse()

    async def start(self) -> EngineFacts:
        self.calls.append("start")
        return EngineFacts(0, 1024, (EOS,), 320, {}, sentinel_ids=(318, 319))

    async def generate(self, request: ResponseRequest, listener: Any) -> Trajectory:
        self.requests.append(request)
        self.under_way += 1
        try:
            if self.failures:
                raise self.failures.pop(0)
            return await self._say(request, listener)
        finally:
            self.under_way -= 1

    async def generate_packed(self, request: ResponseRequest, record: Record | None) -> PackedResponse:
        raise NotImplementedError

    async def _say(self, request: ResponseRequest, listener: Any) -> Trajectory:
        attempts: list[Attempt] = []
        position = segment = number = reused = 0
        script = self.script(request)
        left = self.dies_after.pop(0) if self.dies_after else None

        async def happens(what: Callable[..., None], *arguments: Any) -> None:
            nonlocal left
            if left is not None:
                left -= 1
                if left < 0:
                    raise ReplicaLost("killed")
            if listener is not None:
                what(*arguments)
                await asyncio.sleep(0)

        for place, (told, text) in enumerate(script):
            if place == self.breaks_after:
                raise NonFiniteLogits(3)
            if self.gate is not None and place >= self.said_before_gate:
                await self.gate.wait()
            await asyncio.sleep(0)
            token_ids = self.tokenizer(text)["input_ids"] if text else []
            verdict, gives_way_to = _verdict(told)
            if place == _last_kept(script) and self.ends and not request.ignore_eos:
                token_ids.append(EOS)
            attempt = attempt_of(
                token_ids,
                segment=segment,
                number=number,
                start=position,
                verdict=verdict,
                logprobs=[-1.0] * len(token_ids),
                temperature=request.temperature,
                version=7,
                uncertainty=None if request.policy is None else UNCERTAINTY,
            )
            attempts.append(attempt)
            kept = None
            if gives_way_to is not None:
                kept = attempts[place - number + gives_way_to].model_copy(update={"verdict": "accepted"})
                attempts[place - number + gives_way_to] = kept
            if place < len(request.resume_from):
                if verdict == "accepted" or kept is not None:
                    assert attempts == request.resume_from[: place + 1]
            else:
                if listener is not None and place and (number or place == len(request.resume_from)):
                    listener.resumed(position)
                    reused += position
                wants_tokens = listener is not None and listener.wants_tokens
                for token_id in token_ids:
                    top = None if request.top_logprobs is None else [{token_id: -1.0, 65: -0.5}]
                    await happens(listener.sampled if wants_tokens else _ignored, [token_id], top)
                final = place == len(script) - 1
                if kept is not None:
                    await happens(listener.restored if listener is not None else _ignored, attempt, kept, final)
                elif request.policy is not None:
                    await happens(listener.judged if listener is not None else _ignored, attempt, final)
            stays = kept or attempt
            if stays.verdict == "erased":
                number += 1
            else:
                position, segment, number = stays.end, segment + 1, 0
        if left == 0:
            raise ReplicaLost("killed")
        return Trajectory(
            prompt_id=request.prompt_id,
            group_id=request.group_id,
            sample=request.sample,
            seed=request.seed or 0,
            prompt_token_ids=request.prompt_token_ids,
            attempts=attempts,
            erasable=request.policy is not None,
            finish_reason="length" if request.ignore_eos else "stop",
            policy=request.policy,
            reused_prefix_tokens=reused,
        )

    async def score(self, prompt_token_ids: list[int], top: int, cache_salt: str | None) -> list[Any]:
        """Each token has the log-prob of its place, and rank 1 or, if others are asked for too, one after them."""
        self.calls.append(f"score {len(prompt_token_ids)}")
        scores: list[Any] = [None]
        for place, token in enumerate(prompt_token_ids[1:], 1):
            scores.append({token: (-float(place), top + 1), **{other: (-0.5, other + 1) for other in range(top)}})
        return scores

    async def probe(self) -> EngineUse:
        self.calls.append("probe")
        return self.use

    async def sync(self, update: WeightUpdate, deadline_seconds: float, in_flight: InFlight) -> str:
        self.calls.append(f"sync {update.version}")
        self.checksum = update.checksum
        return update.checksum

    async def priors(self) -> Priors:
        return {}

    async def restore_priors(self, priors: Priors) -> None:
        self.calls.append("restore_priors")

    async def reset_prefix_cache(self) -> bool:
        self.calls.append("reset_prefix_cache")
        return self.under_way == 0

    async def pause(self, mode: str) -> None:
        self.calls.append(f"pause {mode}")
        if self.pause_failures:
            raise self.pause_failures.pop(0)

    async def resume(self) -> None:
        self.calls.append("resume")

    async def close(self) -> None:
        self.calls.append("close")


def _verdict(told: str) -> tuple[Verdict, int | None]:
    """The verdict over an attempt, and which one is kept in its place."""
    if told.startswith("gives way to "):
        return "erased", int(told.removeprefix("gives way to "))
    return ("erased" if told == "erased" else "accepted"), None


def _last_kept(script: Sequence[tuple[str, str]]) -> int:
    """Place in the script of the attempt that ends the response."""
    kept = _verdict(script[-1][0])[1]
    if kept is None:
        return len(script) - 1
    first = max((n + 1 for n, (told, _) in enumerate(script[:-1]) if told != "erased"), default=0)
    return first + kept


def _ignored(*_: Any) -> None:
    return


class StubServer:
    """The apps of both listeners over stub replicas, and clients that need no socket."""

    def __init__(self, *replicas: StubReplica, tracing: Tracing | None = None, **settings: Any) -> None:
        self.replicas = Pool(list(replicas), start_seconds=5.0, sync_seconds=5.0, probe_seconds=1.0)
        self.settings = ServerSettings(**{"model": "stub", "replicas": len(replicas), **settings})
        self.service = Service(self.settings, self.replicas, replicas[0].tokenizer, tracing)
        self.app = public_app(self.service)
        self.admin_app = admin_app(self.service, WeightLoader(self.service, {}, "a name on the hub", torch.float32))

    async def __aenter__(self) -> "StubServer":
        await self.replicas.start()
        self.client = httpx.AsyncClient(transport=_transport(self.app), base_url="http://localhost")
        self.admin = httpx.AsyncClient(transport=_transport(self.admin_app), base_url="http://localhost")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()
        await self.admin.aclose()
        await self.replicas.close()

    async def post(self, route: str = "/v1/completions", **body: Any) -> httpx.Response:
        return await self.client.post(route, json={"model": "stub", **body})

    async def stream(self, route: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
        """The chunks of a stream, which must begin and end as one."""
        answer = await self.post(route, stream=True, **body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "text/event-stream"
        return list(events(iter(answer.text.split("\n"))))


def _transport(app: Any) -> httpx.ASGITransport:
    return httpx.ASGITransport(app=app, raise_app_exceptions=False)


def saying(*texts: str) -> Script:
    """Accepted segments with these texts."""
    return lambda request: [("accepted", text) for text in texts]


def erasing_server(**settings: Any) -> StubServer:
    """A server whose replica answers everything with `ERASING`."""
    return StubServer(StubReplica(lambda request: list(ERASING)), **settings)


async def until(condition: Callable[[], bool]) -> None:
    """Let the other tasks run until the condition holds; TimeoutError after 10 s."""
    async with asyncio.timeout(10.0):
        while not condition():
            await asyncio.sleep(0)
