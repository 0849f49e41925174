"""The public listener: completions, chat completions, rollouts, models, readiness, metrics."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from common.config.erasure import ErasurePolicy
from common.trajectory import ResponseRequest, Trajectory
from rollout_server.http.answer import GenerationAnswer
from rollout_server.http.base_app import base_app
from rollout_server.http.choice import ChoiceOptions
from rollout_server.http.encoders import NDJSON, SSE, ChatEncoder, CompletionEncoder, RolloutEncoder
from rollout_server.http.errors import bad_request, unavailable
from rollout_server.http.middleware import REQUEST_ID, SPAN, STARTED, USER, header
from rollout_server.http.openapi import errors, read_body, streamed, takes
from rollout_server.http.prompts import chat_prompt, check_token_ids, completion_prompts
from rollout_server.http.schema.base import MAX_SEED
from rollout_server.http.schema.chat import ChatChunk, ChatCompletion, ChatRequest
from rollout_server.http.schema.completion import (
    DEFAULT_MAX_TOKENS,
    Completion,
    CompletionChunk,
    CompletionRequest,
)
from rollout_server.http.schema.rollouts import RolloutRequest
from rollout_server.http.schema.sampling import SamplingRequest
from rollout_server.http.schema.service import Model, Models, NotReady, Ready, ReplicaProbe
from rollout_server.http.service import RequestObserver, Service

DESCRIPTION = "Erasable generation, compatible with OpenAI's API. What is ours is in the object `erasure`."
GENERATION_ERRORS = (400, 404, 429, 503, 504)


def public_app(service: Service) -> FastAPI:
    """The app of the public listener."""
    app = base_app(
        service,
        "E3RL",
        DESCRIPTION,
        bodies=[CompletionRequest, ChatRequest, RolloutRequest],
        streams=[CompletionChunk, ChatChunk, Trajectory],
    )
    stream_text = "With `stream`: chunks as server-sent events, then `data: [DONE]`."

    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses={**errors(*GENERATION_ERRORS), 200: streamed(SSE, CompletionChunk, stream_text)},
        openapi_extra=takes(CompletionRequest),
        summary="Continue texts",
    )
    async def completions(request: Request) -> Response:
        return await _complete(service, request, await read_body(request, CompletionRequest))

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={**errors(*GENERATION_ERRORS), 200: streamed(SSE, ChatChunk, stream_text)},
        openapi_extra=takes(ChatRequest),
        summary="Answer in a conversation",
    )
    async def chat_completions(request: Request) -> Response:
        return await _chat(service, request, await read_body(request, ChatRequest))

    @app.post(
        "/v1/rollouts",
        response_class=Response,
        responses={
            **errors(*GENERATION_ERRORS),
            200: streamed(NDJSON, Trajectory, "A trajectory a line, as each finishes; an error is the last line."),
        },
        openapi_extra=takes(RolloutRequest),
        summary="Generate groups for a trainer",
    )
    async def rollouts(request: Request) -> Response:
        return await _rollouts(service, request, await read_body(request, RolloutRequest))

    _service_routes(app, service)
    return app


def _service_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", responses=errors(503), summary="Served models")
    async def models() -> Models:
        version = service.replicas.version
        model = Model(
            id=service.settings.name,
            object="model",
            created=service.created,
            owned_by="e3rl",
            max_model_len=service.facts.max_length,
            policy_version=version,
        )
        return Models(object="list", data=[model])

    @app.get(
        "/ready",
        response_model=Ready,
        responses={**errors(), 503: {"model": NotReady, "description": "No replica answers: which and why."}},
        summary="Whether at least one replica answers",
    )
    async def ready() -> Response:
        members = service.replicas.members
        reasons = await asyncio.gather(*(service.replicas.probe(member) for member in members))
        probes = [
            ReplicaProbe(replica=member.number, ready=reason is None, error=reason)
            for member, reason in zip(members, reasons, strict=True)
        ]
        if any(probe.ready for probe in probes) and not service.draining:
            return JSONResponse(Ready(status="ready", replicas=probes).model_dump())
        text = "; ".join(f"replica {probe.replica} {probe.error}" for probe in probes if not probe.ready)
        error = unavailable(f"no replica is ready: {text or 'the server is shutting down'}")
        body = error.body() | {"replicas": [probe.model_dump() for probe in probes]}
        return JSONResponse(body, 503, headers=error.headers)

    @app.get(
        "/metrics",
        response_class=Response,
        responses={**errors(), 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        summary="Prometheus metrics",
    )
    async def metrics(request: Request) -> Response:
        with_engine = service.settings.engine_metrics
        text, content_type = service.metrics.render(header(request.scope, b"accept"), with_engine)
        return Response(text, headers={"content-type": content_type})


async def _complete(service: Service, request: Request, body: CompletionRequest) -> Response:
    service.check_model(body.model)
    facts = service.facts
    prompts = await completion_prompts(service.tokenizer, body.prompt, facts.vocabulary)
    lengths = _Lengths(body.max_tokens, DEFAULT_MAX_TOKENS, "prompt", "max_tokens")
    return _answer(service, request, body, prompts, lengths, body.logprobs)


async def _chat(service: Service, request: Request, body: ChatRequest) -> Response:
    service.check_model(body.model)
    prompt = await chat_prompt(service.tokenizer, body.messages)
    check_token_ids(prompt, service.facts.vocabulary, "messages")
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    name = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
    lengths = _Lengths(body.max_completion_tokens or body.max_tokens, None, "messages", name)
    return _answer(service, request, body, [prompt], lengths, top_logprobs)


@dataclass(frozen=True, slots=True)
class _Lengths:
    """What a request says of its response's length, and the names of its parameters in errors."""

    max_tokens: int | None
    default: int | None
    prompt_name: str
    max_tokens_name: str


def _answer(
    service: Service,
    request: Request,
    body: SamplingRequest,
    prompts: list[list[int]],
    lengths: _Lengths,
    top_logprobs: int | None,
) -> GenerationAnswer:
    """The answer to a completion or chat completion."""
    policy = service.policy(body.erasure)
    defaults = service.facts.defaults if service.settings.generation_config == "auto" else {}
    sampling = {
        name: value if value is not None else defaults.get(name)
        for name, value in (("temperature", body.temperature), ("top_p", body.top_p), ("min_p", body.min_p))
    }
    top_k = body.top_k if body.top_k is not None else int(defaults.get("top_k", 0))
    known: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
    _check_choices(service, len(prompts) * body.choices)
    is_chat = isinstance(body, ChatRequest)
    identity = ("chatcmpl-" if is_chat else "cmpl-") + request.scope[REQUEST_ID]
    sentinels = 0 if policy is None else 1
    groups = []
    for number, prompt in enumerate(prompts):
        where = lengths.prompt_name if len(prompts) == 1 else f"{lengths.prompt_name}[{number}]"
        names = where, lengths.max_tokens_name
        length = service.response_length(len(prompt), lengths.max_tokens, lengths.default, sentinels, names)
        service.check_temperature(policy, known.get("temperature", 1.0), length)
        template = ResponseRequest(
            prompt_id=f"{identity}-{number}",
            group_id=_group_id(number),
            group_size=body.choices,
            sample=0,
            seed=body.seed,
            prompt_token_ids=prompt,
            max_tokens=length,
            top_k=max(top_k, 0),
            top_logprobs=_engine_logprobs(policy, top_logprobs, body.is_live),
            ignore_eos=body.ignore_eos,
            policy=policy,
            **known,
        )
        groups.append(_members(template, body.choices))
    service.admit_delimiter(policy)
    request.scope[USER] = body.user
    segments = body.erasure is None or body.erasure.return_segments
    options = ChoiceOptions(live=body.is_live, segments=segments, top_logprobs=top_logprobs)
    encoder = (ChatEncoder if is_chat else CompletionEncoder)(
        identity,
        int(time.time()),
        service.settings.name,
        sum(map(len, prompts)),
        service.texts,
        logprobs=top_logprobs is not None,
        token_ids=body.return_token_ids,
        segments=segments,
        usage=body.includes_usage,
    )
    maker = service.choice_maker(_observer(service, request), options, body.stop_strings)
    return GenerationAnswer(service, _client(request), groups, maker, encoder, streams=bool(body.stream))


async def _rollouts(service: Service, request: Request, body: RolloutRequest) -> Response:
    service.check_model(body.model)
    policy = service.policy(body.erasure)
    plain = policy is None
    _check_choices(service, sum(group.n for group in body.groups))
    groups: list[list[ResponseRequest]] = []
    for number, group in enumerate(body.groups):
        where = f"groups[{number}].prompt_token_ids"
        check_token_ids(group.prompt_token_ids, service.facts.vocabulary, where)
        length = service.response_length(len(group.prompt_token_ids), body.max_tokens, None, 1, (where, "max_tokens"))
        erasable = 0 if plain else group.n if group.erasable is None else group.erasable
        if erasable:
            service.check_temperature(policy, body.temperature, length)
        seed = group.seed
        if seed is None and body.seed is not None:
            # Groups may have the same prompt.
            seed = (body.seed + sum(map(len, groups))) % MAX_SEED
        template = ResponseRequest(
            prompt_id=group.prompt_id,
            group_id=_group_id(number),
            group_size=group.n,
            sample=0,
            seed=seed,
            prompt_token_ids=group.prompt_token_ids,
            max_tokens=length,
            temperature=body.temperature,
            ignore_eos=body.ignore_eos,
            # Trainers need log-probs, so a plain response is monitored too; that changes no token.
            policy=policy or _monitor_only(service.settings.erasure),
            erasable=False,
        )
        groups.append(_members(template, group.n, erasable))
    service.admit_delimiter(policy)
    options = ChoiceOptions(segments=False)
    maker = service.choice_maker(_observer(service, request), options, ())
    return GenerationAnswer(service, _client(request), groups, maker, RolloutEncoder(), streams=True)


def _monitor_only(policy: ErasurePolicy) -> ErasurePolicy:
    return policy.model_copy(update={"max_erasures": 0})


def _members(template: ResponseRequest, n: int, erasable: int | None = None) -> list[ResponseRequest]:
    """The responses of a group. Seeds count up from the request's, as vLLM's do for the choices of a request."""
    members = []
    for sample in range(n):
        seed = None if template.seed is None else template.seed + sample
        changes: dict[str, Any] = {"sample": sample, "seed": seed}
        if erasable is not None:
            changes["erasable"] = sample < erasable
        members.append(template.model_copy(update=changes))
    return members


_groups_made = 0


def _group_id(number: int) -> str:
    """Unique in this process, whatever request ids clients choose."""
    global _groups_made
    _groups_made += 1
    return f"http-{_groups_made}-{number}"


def _engine_logprobs(policy: ErasurePolicy | None, top_logprobs: int | None, is_live: bool) -> int | None:
    """What vLLM itself must report: the monitor knows sampled tokens' log-probs, but only once they are judged."""
    if top_logprobs is None or (top_logprobs == 0 and policy is not None and not is_live):
        return None
    return top_logprobs


def _check_choices(service: Service, choices: int) -> None:
    limit = service.settings.max_choices
    if choices > limit:
        raise bad_request(f"the request asks for {choices} responses in all; at most {limit} are allowed", "n")


def _observer(service: Service, request: Request) -> RequestObserver:
    scope = request.scope
    return RequestObserver(service.metrics, scope[STARTED], service.tracing, scope.get(SPAN))


def _client(request: Request) -> str:
    """Who takes turns with others: the holder of a key, else an address."""
    key = header(request.scope, b"authorization")
    return key or (request.client.host if request.client else "")
