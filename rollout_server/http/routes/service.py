"""What the routes share: the replicas, the tokenizer, admission, metrics, and how requests become responses."""

import asyncio
import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any

from pydantic import ValidationError

from common.config.erasure import ErasurePolicy
from common.trajectory import NO_EXTRAS, ResponseRequest, SamplingExtras
from rollout_server.engine.detokenize import TextCursor, TextOptions, TokenTexts
from rollout_server.http.openai.choice import Choice, ChoiceOptions
from rollout_server.http.openai.errors import ApiError, bad_request, from_validation
from rollout_server.http.openai.extras import check_extras
from rollout_server.http.openai.schema.erasure import ErasureOptions
from rollout_server.http.openai.segments import JudgedSegment
from rollout_server.http.routes.choices import Generation
from rollout_server.http.server.admission import Admission
from rollout_server.http.server.metrics import ServerMetrics
from rollout_server.http.server.settings import ServerSettings
from rollout_server.http.server.tracing import Tracing
from rollout_server.replicas.member import Member
from rollout_server.replicas.pool import Pool
from rollout_server.replicas.replica import EngineFacts

log = logging.getLogger("e3rl.server")
LAST_WORDS_SECONDS = 3.0
"""What requests that are cancelled have to end in."""
ENGINE_USE = {
    "monitor_slots": "Slots of a replica's segment monitor.",
    "monitor_slots_in_use": "Slots that monitored responses hold.",
    "kv_blocks": "KV blocks of a replica.",
    "kv_blocks_in_use": "KV blocks that requests hold.",
}


def _use(member: Member, name: str) -> float:
    return float(getattr(member.use, name.removeprefix("monitor_")))


class RequestObserver:
    """Counts one request's first token and attempts, and traces them."""

    def __init__(self, metrics: ServerMetrics, started: float, tracing: Tracing | None, span: Any) -> None:
        self._metrics = metrics
        self._started = started
        self._tracing = tracing
        self._span = span
        self.follows = tracing is not None
        self._has_token = False

    def first_token(self) -> None:
        if not self._has_token:
            self._has_token = True
            self._metrics.first_token_seconds.observe(time.perf_counter() - self._started)

    def attempt(self, choice: Choice, segment: JudgedSegment, started: int, ended: int) -> None:
        if segment.erased:
            self._metrics.erasures.inc()
        if self._tracing is not None and self._span is not None:
            self._tracing.attempt(self._span, choice.index, segment, started, ended)

    def restored(self) -> None:
        self._metrics.restorations.inc()


class Service:
    """One server. `under_way`: tasks of requests that generate.

    `draining`: no new ones are taken; `stopping`: those under way are being cancelled.
    """

    def __init__(
        self, settings: ServerSettings, replicas: Pool, tokenizer: Any, tracing: Tracing | None = None
    ) -> None:
        self.settings = settings
        self.replicas = replicas
        self.tokenizer = tokenizer
        self.texts = TokenTexts(tokenizer.backend_tokenizer)
        self.tracing = tracing
        self.metrics = ServerMetrics()
        capacity = len(replicas.members) * settings.max_concurrent_responses
        self.admission = Admission(capacity, settings.max_waiting_requests)
        self.under_way: set[asyncio.Task[None]] = set()
        self.draining = False
        self.stopping = False
        self.created = int(time.time())
        self._watch()

    def _watch(self) -> None:
        watch, members = self.metrics.watch, self.replicas.members
        watch("e3rl_requests_active", "Requests that wait or generate.", lambda: len(self.under_way))
        watch("e3rl_requests_waiting", "Requests that wait for a place.", lambda: self.admission.waiting)
        watch("e3rl_responses_active", "Places that generating requests hold.", lambda: self.admission.busy)
        watch("e3rl_places", "Places that there are, one a response.", lambda: self.admission.capacity)
        watch("e3rl_places_in_use", "Places that are taken.", lambda: self.admission.busy)
        watch("e3rl_stalled_seconds", "How long nothing has got on though it should.", lambda: self.stalled_seconds)
        watch("e3rl_replicas_ready", "Replicas that generate.", lambda: len(self.replicas.ready))
        watch("e3rl_replica_restarts", "Restarts of replicas.", lambda: sum(m.restarts for m in members))
        watch("e3rl_policy_version", "Oldest version that a replica holds.", lambda: self.replicas.version)

        for name, text in ENGINE_USE.items():
            self.metrics.watch_each(f"e3rl_{name}", text, [partial(_use, member, name) for member in members])

    @property
    def stalled_seconds(self) -> float:
        """How long no place was taken or given back and no engine made a step; 0 where nothing has to.

        Places that nobody gives back count as work too: a server that has lost them gets on no more.
        """
        if not (self.admission.busy or self.admission.waiting) or self.replicas.is_held:
            return 0.0
        return time.monotonic() - max(self.admission.moved, self.replicas.moved)

    @property
    def facts(self) -> EngineFacts:
        """What the engine says of itself; 503 before it has started."""
        if self.replicas.facts is None:
            raise ApiError(503, "the replicas are starting", code="no_replica", headers={"Retry-After": "5"})
        return self.replicas.facts

    def check_model(self, model: str | None) -> None:
        """404 unless `model` is served here."""
        if model is not None and model != self.settings.name:
            raise ApiError(404, "there is no model with this name here", param="model", code="model_not_found")

    def policy(self, options: ErasureOptions | None) -> ErasurePolicy | None:
        """The policy of a request; None: without erasure. 400 if its values are impossible together."""
        if options is None:
            return self.settings.erasure if self.settings.erasure_enabled else None
        if not options.enabled:
            return None
        try:
            return options.policy(self.settings.erasure)
        except ValidationError as error:
            raise from_validation(error, ("erasure",)) from None

    def check_extras(self, extras: SamplingExtras, policy: ErasurePolicy | None) -> None:
        """400 for sampling parameters that this model cannot have."""
        if extras != NO_EXTRAS:
            check_extras(extras, policy, self.facts, self.tokenizer)

    def check_temperature(self, policy: ErasurePolicy | None, temperature: float, max_tokens: int) -> None:
        """400 if erasure would bring back what it erased, in a response of at most `max_tokens`."""
        if policy is None or not policy.can_erase(max_tokens):
            return
        if temperature == 0.0 and policy.retry_temperature is None:
            raise bad_request(
                "temperature 0 would bring an erased segment back unchanged: give erasure.retry_temperature, "
                "or set erasure.enabled to false",
                "erasure.retry_temperature",
            )

    def response_length(
        self,
        prompt: int,
        max_tokens: int | None,
        default: int | None,
        sentinels: int,
        names: tuple[str, str],
    ) -> int:
        """Tokens that a response may have; 400 with all lengths if prompt and response do not fit the model.

        `names`: the request's parameters that hold the prompt and `max_tokens`.
        """
        limit = self.facts.max_length
        room = limit - prompt - sentinels
        one = " with 1 sentinel" if sentinels else ""
        if room < 1 or (max_tokens is not None and max_tokens > room):
            wanted = max_tokens or 1
            raise bad_request(
                f"the prompt has {prompt} tokens and the response at most {wanted}{one}, together "
                f"{prompt + wanted + sentinels}: more than the model's length of {limit} tokens",
                names[0] if room < 1 else names[1],
                "context_length_exceeded",
            )
        return max_tokens or min(room, default or room)

    def choice_maker(self, observer: RequestObserver, options: ChoiceOptions, text: TextOptions) -> Any:
        """Makes the choices of a request; which tokens are silent is each response's own."""
        backend = self.tokenizer.backend_tokenizer
        ends = self.facts.eos_token_ids
        options = replace(options, end_token_id=self.tokenizer.eos_token_id)

        def make(index: int, request: ResponseRequest, changed: Any) -> Choice:
            silent = () if text.include_stop_str_in_output else request.stop_ids(ends)
            cursor = TextCursor(backend, request.prompt_token_ids, replace(text, silent=frozenset(silent)))
            return Choice(index, request, cursor, options, observer, changed)

        return make

    def count(self, generation: Generation) -> None:
        """Add a request's tokens to the metrics."""
        metrics = self.metrics
        metrics.resubmissions.inc(generation.resubmissions)
        for group in generation.groups:
            metrics.prompt_tokens.inc(len(group[0].request.prompt_token_ids))
            for choice in group:
                metrics.committed_tokens.inc(len(choice.token_ids))
                metrics.erased_tokens.inc(choice.erased_tokens)
                metrics.reused_prefix_tokens.inc(choice.reused_prefix_tokens)

    async def stop(self, seconds: float) -> None:
        """Refuse new requests, let those under way finish, and cancel those that have not within `seconds`.

        After that they have `LAST_WORDS_SECONDS` to say so.
        """
        self.draining = True
        if self.under_way:
            await asyncio.wait(set(self.under_way), timeout=seconds)
        self.stopping = True
        for task in set(self.under_way):
            task.cancel()
        if self.under_way:
            _, left = await asyncio.wait(set(self.under_way), timeout=LAST_WORDS_SECONDS)
            if left:
                log.error("%d requests did not end %g s after they were cancelled", len(left), LAST_WORDS_SECONDS)
