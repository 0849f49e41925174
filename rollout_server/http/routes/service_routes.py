"""Routes of the public listener that do not generate: models, readiness, metrics, texts and tokens."""

import asyncio
from contextlib import suppress

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from common.slices import joined
from rollout_server.http.openai.documentation import add_documentation
from rollout_server.http.openai.errors import ApiError, unavailable
from rollout_server.http.openai.json_pieces import object_pieces
from rollout_server.http.openai.openapi import errors, takes
from rollout_server.http.openai.prompts import aside, chat_prompt, check_in_vocabulary, tokenized
from rollout_server.http.openai.schema.service import (
    IsPaused,
    Load,
    Model,
    Models,
    NotReady,
    Ready,
    ReplicaProbe,
    Version,
)
from rollout_server.http.openai.schema.text import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from rollout_server.http.routes.base_app import VERSION
from rollout_server.http.routes.body import read_body
from rollout_server.http.routes.service import Service
from rollout_server.http.server.middleware import header

FRESH_SECONDS = 1.0
"""How long metrics wait for what engines say of themselves before they tell what was said before."""


def add_service_routes(app: FastAPI, service: Service) -> None:
    """Add the routes of the public listener that do not generate."""
    _add_models(app, service)
    _add_state(app, service)
    _add_texts(app, service)
    add_documentation(app)


def _add_models(app: FastAPI, service: Service) -> None:
    def served() -> Model:
        return Model(
            id=service.settings.name,
            object="model",
            created=service.created,
            owned_by="e3rl",
            max_model_len=service.facts.max_length,
            policy_version=service.replicas.version,
        )

    @app.get("/v1/models", responses=errors(503), summary="Served models")
    async def models() -> Models:
        return Models(object="list", data=[served()])

    @app.get("/v1/models/{model:path}", responses=errors(404, 503), summary="A served model")
    async def model(model: str) -> Model:
        service.check_model(model)
        return served()


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get(
        "/ready",
        response_model=Ready,
        responses={
            **errors(),
            503: {"model": NotReady, "description": "Which replicas do not answer and why, or that nothing gets on."},
        },
        summary="Whether at least one replica answers, and work gets on",
    )
    async def ready() -> Response:
        members = service.replicas.members
        reasons = await service.replicas.probe_all()
        probes = [
            ReplicaProbe(replica=member.number, ready=reason is None, error=reason)
            for member, reason in zip(members, reasons, strict=True)
        ]
        error = _not_ready(service, probes)
        if error is None:
            return JSONResponse(Ready(status="ready", replicas=probes).model_dump())
        body = error.body() | {"replicas": [probe.model_dump() for probe in probes]}
        return JSONResponse(body, 503, headers=error.headers)

    @app.get(
        "/metrics",
        response_class=Response,
        responses={**errors(), 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        summary="Prometheus metrics",
    )
    async def metrics(request: Request) -> Response:
        with suppress(TimeoutError):
            async with asyncio.timeout(FRESH_SECONDS):
                await service.replicas.probe_all()
        with_engine = service.settings.engine_metrics
        text, content_type = service.metrics.render(header(request.scope, b"accept"), with_engine)
        return Response(text, headers={"content-type": content_type})

    @app.get("/version", responses=errors(), summary="The server's version")
    async def version() -> Version:
        return Version(version=VERSION)

    @app.get("/ping", responses=errors(), response_class=Response, summary="As /health")
    @app.post("/ping", responses=errors(), response_class=Response, operation_id="ping_post", summary="As /health")
    async def ping() -> Response:
        return Response()

    @app.get("/load", responses=errors(), summary="Requests that wait or generate")
    async def load() -> Load:
        return Load(server_load=len(service.under_way))

    @app.get("/is_paused", responses=errors(), summary="Whether the replicas are paused")
    async def is_paused() -> IsPaused:
        return IsPaused(is_paused=service.replicas.paused is not None)


def _not_ready(service: Service, probes: list[ReplicaProbe]) -> ApiError | None:
    if service.draining:
        return unavailable("no replica is ready: the server is shutting down")
    if not any(probe.ready for probe in probes):
        reasons = "; ".join(f"replica {probe.replica} {probe.error}" for probe in probes)
        return unavailable(f"no replica is ready: {reasons}")
    if service.stalled_seconds > service.settings.stall_seconds:
        admission = service.admission
        return unavailable(
            f"nothing has got on for {service.stalled_seconds:.0f} s, though {admission.busy} of {admission.capacity} "
            f"places are taken and {admission.waiting} requests wait"
        )
    return None


def _add_texts(app: FastAPI, service: Service) -> None:
    @app.post(
        "/tokenize",
        response_model=Tokenized,
        responses=errors(400, 404, 503),
        openapi_extra=takes(TokenizeRequest),
        summary="Token ids of a text or a conversation",
    )
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, TokenizeRequest)
        service.check_model(body.model)
        tokenizer, special = service.tokenizer, body.add_special_tokens
        if body.messages is not None:
            tokens = await chat_prompt(tokenizer, body.messages, body, special=special is True)
        else:
            tokens = await tokenized(tokenizer, body.prompt or "", special=special is not False)

        answer = Tokenized(count=len(tokens), max_model_len=service.facts.max_length, tokens=[], token_strs=None)
        names = map(tokenizer.convert_ids_to_tokens, tokens) if body.return_token_strs else None
        lists = {"tokens": tokens, "token_strs": names}
        pieces = object_pieces(answer.model_dump(exclude=set(lists)), lists)
        return Response(await joined(pieces), media_type="application/json")

    @app.post(
        "/detokenize",
        response_model=Detokenized,
        responses=errors(400, 404, 503),
        openapi_extra=takes(DetokenizeRequest),
        summary="The text of token ids",
    )
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, DetokenizeRequest)
        service.check_model(body.model)
        check_in_vocabulary(body.tokens, service.facts.vocabulary, "tokens")

        def encode() -> bytes:
            text = service.tokenizer.decode(body.tokens, skip_special_tokens=False)
            return Detokenized(prompt=text).model_dump_json().encode()

        return Response(await aside(encode, len(body.tokens)), media_type="application/json")
