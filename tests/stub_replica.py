"""A replica without a model: it says what it is told to, so that the HTTP layer can be tested by itself."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import torch

from common.threshold import GroupStatistics, History
from common.trajectory import Attempt, Judgement, ResponseRequest, Trajectory, VersionSpan
from common.weights import WeightUpdate
from rollout_server.http.admin import WeightLoader, admin_app
from rollout_server.http.app import public_app
from rollout_server.http.replicas import EngineFacts, ReplicaLost, ReplicaSet
from rollout_server.http.service import Service
from rollout_server.http.settings import ServerSettings
from rollout_server.http.tracing import Tracing
from tests.models import byte_tokenizer

EOS = 256
Script = Callable[[ResponseRequest], list[tuple[str, str]]]
"""What a response is: attempts in order, each `("erased" | "accepted", text)`."""


JUDGEMENT = Judgement(
    uncertainty=1.5,
    base=1.5,
    extreme=0.0,
    gradient=0.0,
    baseline=None,
    penalty=1.0,
    modulation=1.0,
    threshold=None,
    statistics=GroupStatistics(0, 0, 0, 0, 0, 0),
    history=History(),
    erased_tokens_before=0,
)


class StubReplica:
    """Implements `Replica`. `script` makes the attempts of a monitored response, and the text of a plain one.

    `delay` (seconds) comes before each attempt; `failures` are raised, one a call, before anything is said. It dies
    after what `dies_after` says, one a call: the number of tokens and judgements that come first.
    """

    def __init__(self, script: Script, delay: float = 0.0) -> None:
        self.script = script
        self.delay = delay
        self.failures: list[Exception] = []
        self.dies_after: list[int] = []
        self.requests: list[ResponseRequest] = []
        self.under_way = 0
        self.calls: list[str] = []
        self.tokenizer = byte_tokenizer(1024)
        self.checksum: str | None = None

    async def start(self) -> EngineFacts:
        self.calls.append("start")
        return EngineFacts(0, 1024, (EOS,), 320, {})

    async def generate(self, request: ResponseRequest, listener: Any) -> Trajectory:
        self.requests.append(request)
        self.under_way += 1
        try:
            if self.failures:
                raise self.failures.pop(0)
            return await self._say(request, listener)
        finally:
            self.under_way -= 1

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

        for place, (verdict, text) in enumerate(script):
            await asyncio.sleep(self.delay)
            token_ids = self.tokenizer(text)["input_ids"] if text else []
            if place == len(script) - 1 and not request.ignore_eos:
                token_ids.append(EOS)
            attempt = Attempt(
                segment=segment,
                attempt=number,
                start=position,
                end=position + len(token_ids),
                token_ids=token_ids,
                logprobs=[-1.0] * len(token_ids),
                behaviour_logprobs=[-1.0] * len(token_ids),
                signal=[1.0] * len(token_ids),
                temperature=request.temperature,
                versions=[VersionSpan(start=0, end=len(token_ids), version=7)],
                verdict=verdict,
                judgement=None if request.policy is None else JUDGEMENT,
            )
            attempts.append(attempt)
            if place < len(request.resume_from):
                assert attempt == request.resume_from[place]
            else:
                if listener is not None and place and (number or place == len(request.resume_from)):
                    listener.resumed(position)
                    reused += position
                wants_tokens = listener is not None and listener.wants_tokens
                for token_id in token_ids:
                    top = None if request.top_logprobs is None else [{token_id: -1.0, 65: -0.5}]
                    await happens(listener.sampled if wants_tokens else _ignored, [token_id], top)
                if request.policy is not None:
                    await happens(
                        listener.judged if listener is not None else _ignored, attempt, place == len(script) - 1
                    )
            if verdict == "erased":
                number += 1
            else:
                position, segment, number = attempt.end, segment + 1, 0
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

    async def probe(self) -> None:
        self.calls.append("probe")

    async def sync(self, update: WeightUpdate, deadline_seconds: float) -> str:
        self.calls.append(f"sync {update.version}")
        self.checksum = update.checksum
        return update.checksum

    async def pause(self, mode: str) -> None:
        self.calls.append(f"pause {mode}")

    async def resume(self) -> None:
        self.calls.append("resume")

    async def close(self) -> None:
        self.calls.append("close")


def _ignored(*_: Any) -> None:
    return


class StubServer:
    """The apps of both listeners over stub replicas, and clients that need no socket."""

    def __init__(self, *replicas: StubReplica, tracing: Tracing | None = None, **settings: Any) -> None:
        self.replicas = ReplicaSet(list(replicas), start_seconds=5.0, sync_seconds=5.0, probe_seconds=1.0)
        self.settings = ServerSettings(**{"model": "stub", "replicas": len(replicas), **settings})
        self.service = Service(self.settings, self.replicas, replicas[0].tokenizer, tracing)
        self.app = public_app(self.service)
        self.admin_app = admin_app(self.service, WeightLoader(self.service, {}, torch.float32))

    async def __aenter__(self) -> "StubServer":
        await self.replicas.start()
        self.client = httpx.AsyncClient(transport=_transport(self.app), base_url="http://public")
        self.admin = httpx.AsyncClient(transport=_transport(self.admin_app), base_url="http://admin")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()
        await self.admin.aclose()
        await self.replicas.close()

    async def post(self, route: str = "/v1/completions", **body: Any) -> httpx.Response:
        return await self.client.post(route, json={"model": "stub", **body})


def _transport(app: Any) -> httpx.ASGITransport:
    return httpx.ASGITransport(app=app, raise_app_exceptions=False)


def saying(*texts: str) -> Script:
    """Accepted segments with these texts."""
    return lambda request: [("accepted", text) for text in texts]
