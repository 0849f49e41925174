"""Rollback by resubmission: erase a segment by ending its request and submitting the kept tokens again.

Public vLLM API only. The prefix cache keeps the blocks of everything before the segment, so what is computed again is
at most the part of one block. An implementation inside the engine would replace `ResubmitRollback` behind `Rollback`.
"""

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from vllm import RequestOutput
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from common.config.erasure import ErasurePolicy
from common.seeds import attempt_seed
from common.threshold import GroupStatistics, History
from common.trajectory import MEASURED, Attempt, Judgement, Measured, ResponseRequest, Trajectory, VersionSpan
from common.weights import NonFiniteLogits
from rollout_server.engine.errors import GenerationAborted, RecordLost
from rollout_server.engine.listener import Listener, TopLogprobs
from rollout_server.engine.progress import Progress, Sampled, version_spans
from rollout_server.engine.sampling import adjustments, submission_params
from rollout_server.monitor import Field
from rollout_server.monitor.records import JudgementRecord, NonFiniteRecord, Record
from rollout_server.monitor.spec import Submission, policy_json, statistics_kind

RECORD_SECONDS = 60.0
SENTINEL_TOKENS = 1
UNWATCHED_TOKENS = 16
"""Tokens that come at once where a listener wants only judgements: what a judged segment may be late by."""
_MAY_BE_NULL = {name for name, field in Measured.model_fields.items() if field.annotation == (float | None)}


class Rollback(Protocol):
    """Generates a monitored response, erasing what the monitor says."""

    async def generate(
        self, request: ResponseRequest, listener: Listener | None, cache_salt: str | None
    ) -> Trajectory: ...

    def deliver(self, record: Record) -> None:
        """Take a record from the monitor."""
        ...


@dataclass(slots=True)
class _Mailbox:
    """Records of one submission that have arrived and were not taken. `failure`: the one that ended it, if one did."""

    records: deque[JudgementRecord] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False
    failure: NonFiniteRecord | None = None

    async def take(self, uid: int) -> JudgementRecord:
        """The next judgement. Raises `NonFiniteLogits` behind the last one of a submission that ended so."""
        if self.records:
            return self.records.popleft()
        try:
            async with asyncio.timeout(RECORD_SECONDS):
                while not self.records:
                    if self.failure is not None:
                        raise NonFiniteLogits(self.failure.version)
                    if self.closed:
                        raise RecordLost(f"the engine was closed before the record of submission {uid} came")
                    self.arrived.clear()
                    await self.arrived.wait()
        except TimeoutError:
            raise RecordLost(f"no record of submission {uid} within {RECORD_SECONDS:g} s of its end") from None
        return self.records.popleft()


class ResubmitRollback:
    """Rollback through requests to vLLM.

    `eos_token_ids` end a response; `sentinel_ids` (erase, finish) end requests. `uids`: numbers that no other request
    of the engine gets.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        sentinel_ids: tuple[int, int],
        eos_token_ids: tuple[int, ...],
        name: str,
        uids: Iterator[int],
    ) -> None:
        self._llm = llm
        self._sentinel_ids = sentinel_ids
        self._eos_token_ids = eos_token_ids
        self._name = name
        self._uids = uids
        self._mailboxes: dict[int, _Mailbox] = {}
        self.aborted: list[tuple[int, str]] = []
        self.erasures = 0
        self.lost_steps = 0
        """Engine steps that erasures cost their responses: the forced sentinel's, and those until the next token."""

    def deliver(self, record: Record) -> None:
        mailbox = self._mailboxes.get(record.uid)
        if mailbox is None:
            return
        if isinstance(record, NonFiniteRecord):
            mailbox.failure = record
        else:
            mailbox.records.append(record)
        mailbox.arrived.set()

    def close(self) -> None:
        """No more records come: what waits for one fails."""
        for mailbox in self._mailboxes.values():
            mailbox.closed = True
            mailbox.arrived.set()

    async def generate(self, request: ResponseRequest, listener: Listener | None, cache_salt: str | None) -> Trajectory:
        """Generate one response, beginning again after each erasure, until its last segment is accepted.

        `cache_salt`: shares cached prefixes with those of the same salt only.
        """
        policy = request.policy
        if policy is None:
            raise ValueError("a response without a policy is not monitored and cannot be erased")
        erased_limit = policy.erased_token_limit(request.max_tokens)
        progress = Progress(statistics_kind(request, policy), policy, erased_limit)
        progress.adjustments = adjustments(request, self._eos_token_ids, self._llm.get_tokenizer())
        progress.cache_salt = cache_salt
        progress.resume(request.resume_from)
        progress.finished = progress.is_complete(request, self._eos_token_ids)
        while not progress.finished:
            uid = next(self._uids)
            self._mailboxes[uid] = _Mailbox()
            try:
                await self._submit(uid, request, policy, progress, listener)
            except BaseException:
                self.aborted.append((uid, request.group_id))
                raise
            finally:
                del self._mailboxes[uid]
        stopped = progress.has_stopped(request, self._eos_token_ids)
        return Trajectory(
            prompt_id=request.prompt_id,
            group_id=request.group_id,
            sample=request.sample,
            seed=request.seed or 0,
            prompt_token_ids=request.prompt_token_ids,
            attempts=progress.attempts,
            erasable=request.erasable,
            finish_reason="stop" if stopped else "length",
            policy=policy,
            erased_token_limit=erased_limit,
            reused_prefix_tokens=progress.reused_prefix_tokens,
        )

    async def _submit(
        self,
        uid: int,
        request: ResponseRequest,
        policy: ErasurePolicy,
        progress: Progress,
        listener: Listener | None,
    ) -> None:
        """One vLLM request: takes every segment it brings into `progress`, up to an erasure or the end."""
        sampled = Sampled(start=len(progress.committed))
        taken = len(progress.attempts)
        mailbox = self._mailboxes[uid]
        output: RequestOutput | None = None
        ended: JudgementRecord | None = None
        async for output in self._request(uid, request, policy, progress, listener):
            tokens = [t for t in output.outputs[0].token_ids if t not in self._sentinel_ids]
            if listener is not None and tokens:
                if taken and not sampled.token_ids:
                    listener.resumed(output.num_cached_tokens or 0)
                if listener.wants_tokens:
                    listener.sampled(tokens, top_logprobs(output, len(tokens)))
            sampled.token_ids += tokens
            if listener is not None:
                while mailbox.records and mailbox.records[0].field(Field.END) <= sampled.end:
                    ended = self._take(mailbox.records.popleft(), sampled, request, progress, listener)
        if output is None or output.outputs[0].finish_reason == "abort":
            raise GenerationAborted(f"vLLM aborted a request of prompt {request.prompt_id}, sample {request.sample}")
        while ended is None:
            ended = self._take(await mailbox.take(uid), sampled, request, progress, listener)
        if progress.finished and not ended.final:
            # The monitor took it for an erasure, and its group would wait for what follows.
            await self._llm.collective_rpc("e3rl_release", args=([(uid, request.group_id)], []))
        if taken:
            progress.reused_prefix_tokens += output.num_cached_tokens or 0

    def _request(
        self,
        uid: int,
        request: ResponseRequest,
        policy: ErasurePolicy,
        progress: Progress,
        listener: Listener | None,
    ) -> AsyncIterator[RequestOutput]:
        retried = progress.attempt > 0
        temperature = request.temperature
        if temperature == 0.0 and retried:
            temperature = policy.retry_temperature or 0.0
        submission = Submission(
            uid=uid,
            group=request.group_id,
            group_size=request.group_size,
            policy=policy_json(policy),
            kind=progress.kind,
            erasable=request.erasable,
            position=len(progress.committed),
            segment=progress.segment,
            attempt=progress.attempt,
            erased_tokens=progress.erased_tokens,
            limit=request.max_tokens,
            erased_limit=progress.erased_limit,
            best=progress.best,
            temperature=request.temperature,
            engine_temperature=temperature,
            history=(progress.history.uncertainty, progress.history.mean, progress.history.deviation),
            stop_token_ids=request.stop_ids(self._eos_token_ids),
            watched=listener is not None,
            adjustments=progress.adjustments,
        )
        seed = request.seed
        if seed is not None:
            seed = attempt_seed(seed, progress.segment, progress.attempt)
        wants_tokens = listener is not None and listener.wants_tokens
        params = submission_params(
            request,
            self._sentinel_ids,
            temperature=temperature,
            seed=seed,
            max_tokens=request.max_tokens - len(progress.committed) + SENTINEL_TOKENS,
            wants_tokens=wants_tokens,
            output_kind=RequestOutputKind.FINAL_ONLY if listener is None else RequestOutputKind.DELTA,
            stream_interval=None if listener is None or wants_tokens else UNWATCHED_TOKENS,
            extra_args=submission.extra_args(),
        )
        # In this form vLLM takes token ids as they are; as a prompt they would go through its pool of threads.
        prompt = tokens_input(request.prompt_token_ids + progress.committed, cache_salt=progress.cache_salt)
        return self._llm.generate(prompt, params, f"{self._name}-{uid}", priority=-1 if progress.attempts else 0)

    def _take(
        self,
        record: JudgementRecord,
        sampled: Sampled,
        request: ResponseRequest,
        progress: Progress,
        listener: Listener | None,
    ) -> JudgementRecord | None:
        """Move `progress` on by one judged segment of what was `sampled`; the record, if it ends the submission."""
        first, end = int(record.field(Field.START)), int(record.field(Field.END))
        token_ids = sampled.token_ids[first - sampled.start : end - sampled.start]
        if len(token_ids) != end - first:
            raise RecordLost(f"a judgement of tokens {first} to {end}, but only {sampled.end} were sampled")
        attempt = _attempt(record, token_ids, version_spans(record.versions, first, end))
        kept = progress.add(attempt)
        progress.finished = record.final or (kept is not None and progress.is_complete(request, self._eos_token_ids))
        if progress.erased_at is not None:
            self.erasures += 1
            self.lost_steps += record.opened - progress.erased_at
            progress.erased_at = None
        if record.erased:
            progress.erased_at = record.step
        if listener is not None:
            if kept is None or kept.attempt == attempt.attempt:
                listener.judged(kept or attempt, progress.finished)
            else:
                listener.restored(attempt, kept, progress.finished)
        return record if record.erased or record.final else None


def top_logprobs(output: RequestOutput, tokens: int) -> TopLogprobs | None:
    """Log-probs of the first `tokens` tokens of `output`: a sentinel, if there is one, is its last."""
    entries = output.outputs[0].logprobs
    if entries is None:
        return None
    return [{token: entry.logprob for token, entry in entries[place].items()} for place in range(tokens)]


def _known(name: str, value: float) -> float | None:
    return None if name in _MAY_BE_NULL and not math.isfinite(value) else value


def _attempt(record: JudgementRecord, token_ids: list[int], versions: list[VersionSpan]) -> Attempt:
    per_token: Any = record.per_token
    if not np.isfinite(per_token).all() or not math.isfinite(record.field(Field.UNCERTAINTY)):
        # The logits were finite, but so far apart that their difference is not.
        raise NonFiniteLogits(versions[-1].version)
    logprobs, behaviour_logprobs, signal = per_token.T.tolist()
    get = record.field
    measured: dict[str, Any] = {name: _known(name, get(Field[name.upper()])) for name in MEASURED}
    return Attempt(
        segment=int(get(Field.SEGMENT)),
        attempt=int(get(Field.ATTEMPT)),
        start=int(get(Field.START)),
        end=int(get(Field.END)),
        token_ids=token_ids,
        logprobs=logprobs,
        behaviour_logprobs=behaviour_logprobs,
        signal=signal,
        temperature=get(Field.TEMPERATURE),
        versions=versions,
        verdict="erased" if record.erased else "accepted",
        judgement=Judgement(
            **measured,
            statistics=GroupStatistics(*record.fields[Field.COUNT : Field.PRIOR_VARIANCE + 1]),
            history=History(*record.fields[Field.HISTORY_UNCERTAINTY : Field.HISTORY_DEVIATION + 1]),
            erased_tokens_before=int(get(Field.ERASED_BEFORE)),
        ),
    )
