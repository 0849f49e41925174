"""The public listener: completions, chat completions, rollouts, models, readiness, metrics."""

import time
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response

from common.config.erasure import ErasurePolicy
from common.slices import Slices
from common.trajectory import ResponseRequest, Trajectory
from rollout_server.engine.detokenize import TextOptions, TokenNumbers
from rollout_server.http.openai.choice import ChoiceOptions
from rollout_server.http.openai.encoders import NDJSON, SSE, AnswerForm, ChatEncoder, CompletionEncoder, RolloutEncoder
from rollout_server.http.openai.errors import bad_request
from rollout_server.http.openai.extras import check_scores
from rollout_server.http.openai.openapi import errors, streamed, takes
from rollout_server.http.openai.prompts import Truncation, aside, chat_prompt, check_token_ids, completion_prompts
from rollout_server.http.openai.schema.base import MAX_SEED
from rollout_server.http.openai.schema.chat import ChatChunk, ChatCompletion
from rollout_server.http.openai.schema.chat_request import ChatRequest
from rollout_server.http.openai.schema.completion import (
    DEFAULT_MAX_TOKENS,
    Completion,
    CompletionChunk,
    CompletionRequest,
)
from rollout_server.http.openai.schema.rollouts import RolloutRequest
from rollout_server.http.openai.schema.sampling import SamplingRequest
from rollout_server.http.openai.schema.text import DetokenizeRequest, TokenizeRequest
from rollout_server.http.routes.answer import GenerationAnswer
from rollout_server.http.routes.base_app import base_app
from rollout_server.http.routes.body import read_body
from rollout_server.http.routes.service import RequestObserver, Service
from rollout_server.http.routes.service_routes import add_service_routes
from rollout_server.http.server.middleware import REQUEST_ID, SPAN, STARTED, USER, header

DESCRIPTION = "Erasable generation, compatible with OpenAI's API. What is ours is in the object `erasure`."
GENERATION_ERRORS = (400, 404, 429, 503, 504)


def public_app(service: Service) -> FastAPI:
    """The app of the public listener."""
    app = base_app(
        service,
        "E3RL",
        DESCRIPTION,
        bodies=[CompletionRequest, ChatRequest, RolloutRequest, TokenizeRequest, DetokenizeRequest],
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

    add_service_routes(app, service)
    return app


async def _complete(service: Service, request: Request, body: CompletionRequest) -> Response:
    service.check_model(body.model)
    facts = service.facts
    truncation = Truncation.of(body, facts.max_length, body.max_tokens or 1)
    special = body.add_special_tokens is not False
    prompts = await completion_prompts(service.tokenizer, body.prompt, facts.vocabulary, truncation, special)
    lengths = _Lengths(body.max_tokens, DEFAULT_MAX_TOKENS, "prompt", "max_tokens")
    echoes = await _echoes(service, body, prompts) if body.echo else ()
    return await _answer(service, request, body, prompts, lengths, body.logprobs, body.scores, echoes)


async def _echoes(service: Service, body: CompletionRequest, prompts: list[list[int]]) -> tuple[str, ...]:
    """The texts of the prompts: as they were given, unless they were given as token ids or cut."""
    given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if isinstance(given[0], str) and body.truncate_prompt_tokens is None:
        return tuple(str(text) for text in given)

    def decode() -> tuple[str, ...]:
        return tuple(service.tokenizer.decode(ids, skip_special_tokens=body.skip_special_tokens) for ids in prompts)

    return await aside(decode, sum(map(len, prompts)))


async def _chat(service: Service, request: Request, body: ChatRequest) -> Response:
    service.check_model(body.model)
    facts = service.facts
    prompt = await chat_prompt(service.tokenizer, body.messages, body, special=body.add_special_tokens is True)
    truncation = Truncation.of(body, facts.max_length, body.length or 1)
    prompt = prompt if truncation is None else truncation.apply(prompt)
    check_token_ids(prompt, facts.vocabulary, "messages")
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    lengths = _Lengths(body.length, None, "messages", body.length_name)
    return await _answer(service, request, body, [prompt], lengths, top_logprobs, body.prompt_logprobs)


@dataclass(frozen=True, slots=True)
class _Lengths:
    """What a request says of its response's length, and the names of its parameters in errors."""

    max_tokens: int | None
    default: int | None
    prompt_name: str
    max_tokens_name: str


async def _answer(
    service: Service,
    request: Request,
    body: SamplingRequest,
    prompts: list[list[int]],
    lengths: _Lengths,
    top_logprobs: int | None,
    scores: int | None,
    echoes: tuple[str, ...] = (),
) -> GenerationAnswer:
    """The answer to a completion or chat completion. `scores`: as `ChoiceOptions.prompt_logprobs`."""
    only_prompt = lengths.max_tokens == 0
    policy = None if only_prompt else service.policy(body.erasure)
    _check_choices(service, len(prompts) * body.choices)
    if body.request_id is not None and not header(request.scope, b"x-request-id"):
        request.scope[REQUEST_ID] = body.request_id
    identity = ("chatcmpl-" if isinstance(body, ChatRequest) else "cmpl-") + request.scope[REQUEST_ID]
    if scores is not None:
        check_scores(prompts, body.choices, scores)
    groups = await _groups(service, body, prompts, lengths, policy, identity, top_logprobs)
    request.scope[USER] = body.user
    segments = body.erasure is None or body.erasure.return_segments
    options = ChoiceOptions(
        live=body.is_live,
        segments=segments,
        top_logprobs=top_logprobs,
        prompt_logprobs=scores,
        only_prompt=only_prompt,
    )
    text = TextOptions(
        stops=body.stop_strings,
        include_stop_str_in_output=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        spaces_between_special_tokens=body.spaces_between_special_tokens,
        min_tokens=body.min_tokens or 0,
    )
    form = AnswerForm(
        identity,
        int(time.time()),
        service.settings.name,
        sum(map(len, prompts)),
        per_prompt=body.choices,
        logprobs=top_logprobs,
        token_ids=bool(body.return_token_ids),
        segments=segments,
        usage=body.includes_usage,
        continuous_usage=body.usage_is_continuous,
        prompt_logprobs=body.prompt_logprobs is not None,
        echoes=echoes,
    )
    texts = TokenNumbers() if body.return_tokens_as_token_ids else service.texts
    encoder = (ChatEncoder if isinstance(body, ChatRequest) else CompletionEncoder)(form, texts)
    maker = service.choice_maker(_observer(service, request), options, text)
    return GenerationAnswer(service, _client(request), groups, maker, encoder, streams=bool(body.stream))


async def _groups(
    service: Service,
    body: SamplingRequest,
    prompts: list[list[int]],
    lengths: _Lengths,
    policy: ErasurePolicy | None,
    identity: str,
    top_logprobs: int | None,
) -> list[list[ResponseRequest]]:
    """A group of responses to each prompt."""
    defaults = service.facts.defaults if service.settings.generation_config == "auto" else {}
    sampling = {
        name: value if value is not None else defaults.get(name)
        for name, value in (("temperature", body.temperature), ("top_p", body.top_p), ("min_p", body.min_p))
    }
    known: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
    top_k = body.top_k if body.top_k is not None else int(defaults.get("top_k", 0))
    extras = body.extras(defaults)
    service.check_extras(extras, policy)
    sentinels = 0 if policy is None else 1
    groups = []
    slices = Slices()
    for number, prompt in enumerate(prompts):
        where = lengths.prompt_name if len(prompts) == 1 else f"{lengths.prompt_name}[{number}]"
        names = where, lengths.max_tokens_name
        length = service.response_length(len(prompt), lengths.max_tokens, lengths.default, sentinels, names)
        if extras.min_tokens > length:
            text = f"min_tokens ({extras.min_tokens}) exceeds the {length} tokens that the response may have"
            raise bad_request(text, "min_tokens")
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
            extras=extras,
            policy=policy,
            **known,
        )
        groups.append(_members(template, body.choices))
        await slices.turn()
    return groups


async def _rollouts(service: Service, request: Request, body: RolloutRequest) -> Response:
    service.check_model(body.model)
    policy = service.policy(body.erasure)
    plain = policy is None
    _check_choices(service, sum(group.n for group in body.groups))
    groups: list[list[ResponseRequest]] = []
    slices = Slices()
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
        await slices.turn()
    options = ChoiceOptions(segments=False)
    maker = service.choice_maker(_observer(service, request), options, TextOptions())
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
