"""Seconds of generation: engine steps, each bound by the memory's bandwidth or by operations."""

from dataclasses import dataclass

from common.config.run import SENTINEL_STEPS
from learner.planning.assumptions import Assumptions
from learner.planning.memory import BYTES, ReplicaMemory
from learner.planning.setup import Setup
from learner.planning.work import Work, attention_operations


@dataclass(frozen=True, slots=True)
class EngineStep:
    """Seconds of one engine step in which every response under way gets a token."""

    bandwidth: float
    operations: float
    links: float
    overhead: float

    @property
    def seconds(self) -> float:
        """Reading and computing overlap; the rest does not."""
        return max(self.bandwidth, self.operations) + self.links + self.overhead


@dataclass(frozen=True, slots=True)
class Generation:
    """Of a step, on the busiest replica. `limited_by`: what keeps more responses from being under way at a time.

    `tail`: of a synchronous loop, from when the mean response ends to when the longest does. `with_more_memory`: what
    `decode` would be if the KV cache held all that `max_concurrent_responses` allows.
    """

    concurrency: int
    limited_by: str
    engine_step: EngineStep
    decode: float
    prefill: float
    after_sync: float
    tail: float
    with_more_memory: float

    @property
    def seconds(self) -> float:
        return self.decode + self.prefill + self.after_sync + self.tail


def engine_step(setup: Setup, assumptions: Assumptions, responses: float, context: float) -> EngineStep:
    """With `responses` under way, each of which attends to `context` tokens."""
    shape, hardware, parallel = setup.shape, setup.hardware, setup.tensor_parallel
    size = BYTES[setup.config.model.dtype]
    weights = shape.multiplied * size / parallel
    cache = responses * context * shape.kv_bytes_per_token(size) / min(parallel, shape.kv_heads)
    bandwidth = hardware.memory_gb_per_second * 1e9 * assumptions.decode_bandwidth_share * setup.replica_share
    operations = responses * (2.0 * shape.multiplied + attention_operations(shape, context)) / parallel
    links = 0.0
    if parallel > 1:
        # An all-reduce after attention and one after the MLP.
        sent = 2.0 * (parallel - 1) / parallel * responses * shape.hidden * size
        rate = hardware.nvlink_gb_per_second * 1e9 * assumptions.collective_share
        links = 2 * shape.layers * (sent / rate + assumptions.collective_latency_seconds)
    return EngineStep(
        bandwidth=(weights + cache) / bandwidth,
        operations=operations / _operations_per_second(setup, assumptions),
        links=links,
        overhead=hardware.engine_step_seconds + responses * hardware.engine_response_seconds,
    )


def _operations_per_second(setup: Setup, assumptions: Assumptions) -> float:
    peak = setup.hardware.tflops(setup.config.model.dtype) * 1e12
    return peak * assumptions.decode_flops_share * setup.replica_share


def generation(setup: Setup, assumptions: Assumptions, work: Work, memory: ReplicaMemory) -> Generation:
    """Responses of a full length take the places of those that end. The busiest replica of a synchronous loop counts.

    An asynchronous loop has the groups of `max_staleness + 1` steps to work on.
    """
    rollout, engine = setup.config.rollout, setup.config.rollout.engine
    if setup.is_synchronous:
        responses = float(-(-rollout.groups_per_step // setup.replicas) * rollout.responses_per_group)
        at_once = responses
    else:
        responses = work.responses / setup.replicas
        at_once = responses * (setup.max_staleness + 1)
    held = memory.holds(work.prompt_tokens + work.response_tokens + SENTINEL_STEPS)
    limits = {
        "the responses of a step": max(int(at_once), 1),
        "max_concurrent_responses": engine.max_concurrent_responses,
        "KV memory": held,
    }
    limited_by = min(limits, key=lambda name: limits[name])
    concurrency = max(limits[limited_by], 1)
    context = work.prompt_tokens + work.response_tokens / 2

    def decode(at_a_time: int) -> float:
        each = engine_step(setup, assumptions, at_a_time, context).seconds
        return work.engine_steps * each * responses / at_a_time

    others = min(limits["the responses of a step"], limits["max_concurrent_responses"])
    alone = engine_step(setup, assumptions, 1, context).seconds
    tail = max(rollout.max_response_tokens - work.response_tokens, 0.0) * alone if setup.is_synchronous else 0.0
    return Generation(
        concurrency=concurrency,
        limited_by=limited_by,
        engine_step=engine_step(setup, assumptions, concurrency, context),
        decode=decode(concurrency),
        prefill=_prefill(setup, assumptions, work),
        after_sync=_after_sync(setup, assumptions, work, concurrency),
        tail=tail,
        with_more_memory=decode(max(others, concurrency)),
    )


def _prefill(setup: Setup, assumptions: Assumptions, work: Work) -> float:
    """A group's prompt is computed once; an erasure computes up to a block again, half of one on average."""
    rollout = setup.config.rollout
    prompts = _prompt_operations(setup, work.prompt_tokens) * rollout.groups_per_step
    again = _prompt_operations(setup, rollout.engine.block_size / 2) * work.erasures
    return (prompts + again) / setup.replicas / setup.tensor_parallel / _operations_per_second(setup, assumptions)


def _after_sync(setup: Setup, assumptions: Assumptions, work: Work, concurrency: int) -> float:
    """What an asynchronous loop's sync costs the responses under way, which are half done on average."""
    context = work.prompt_tokens + work.response_tokens / 2
    if setup.is_synchronous or setup.in_flight == "keep":
        return 0.0
    if setup.in_flight == "wait":
        # None begins until the last has ended: half of the places are empty in that time.
        half = engine_step(setup, assumptions, max(concurrency / 2, 1.0), context)
        return work.engine_steps / 2 * half.seconds
    if setup.in_flight == "abort":
        again = engine_step(setup, assumptions, concurrency, context)
        return work.engine_steps / 2 * again.seconds
    each = _prompt_operations(setup, context)
    return concurrency * each / setup.tensor_parallel / _operations_per_second(setup, assumptions)


def _prompt_operations(setup: Setup, tokens: float) -> float:
    shape = setup.shape
    return tokens * (2.0 * (shape.multiplied - shape.head_parameters) + attention_operations(shape, tokens / 2))
