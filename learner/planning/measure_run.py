"""Fixed costs of an engine step and of a micro-batch, measured with the model that is planned for."""

import asyncio
import itertools
import time
from pathlib import Path

import torch

from common.config import RunConfig
from common.interfaces import Rollouts
from common.trajectory import ResponseRequest
from learner.planning.assumptions import Assumptions
from learner.planning.generation import engine_step
from learner.planning.hardware import Hardware
from learner.planning.setup import Setup
from learner.planning.shape import ModelShape
from learner.run.errors import InputError, PartError, part

WARM_TOKENS, TIMED_TOKENS = 8, 72
TOGETHER = 16
ROUNDS = 3
_groups = itertools.count()


def measure_microbatch(config: RunConfig) -> float:
    """Seconds of the smallest micro-batch: what one costs beyond its tokens."""
    from learner.policy.batching import collate
    from learner.policy.model import load_policy, response_logprobs

    torch.set_num_threads(config.learner.threads_per_rank)
    with part("learner"):
        policy = load_policy(config.model)
    policy = policy.to("cuda" if torch.cuda.is_available() else "cpu").train()
    batch = collate([])
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        response_logprobs(policy, batch).sum().backward()
        seconds.append(time.perf_counter() - started)
        policy.zero_grad()
    return min(seconds)


def measure_engine(
    config: RunConfig, shape: ModelShape, hardware: Hardware, log_directory: Path
) -> tuple[float, float]:
    """Seconds of an engine step beyond the model's own work, and what each response adds, from a replica's own steps.

    `hardware` tells what the model's own work is. A plan for more responses than `TOGETHER` extrapolates.
    """
    from learner.run.cluster import ray_cluster
    from learner.run.training_run import load_rollouts

    with ray_cluster(config, log_directory), part("rollout"):
        alone, together = asyncio.run(_steps(load_rollouts(), config, log_directory))
    free = hardware.model_copy(update={"engine_step_seconds": 0.0, "engine_response_seconds": 0.0})
    setup, context = Setup(config, shape, free), 1 + _most_tokens(config) / 2
    spare = [
        max(seconds - engine_step(setup, Assumptions(), count, context).seconds, 0.0)
        for count, seconds in ((1, alone), (TOGETHER, together))
    ]
    each = max(spare[1] - spare[0], 0.0) / (TOGETHER - 1)
    return max(spare[0] - each, 0.0), each


async def _steps(rollouts: Rollouts, config: RunConfig, log_directory: Path) -> tuple[float, float]:
    """Seconds of an engine step with one response, and with `TOGETHER`."""
    few, many = WARM_TOKENS, _most_tokens(config)
    try:
        await rollouts.start(config, log_directory)
        found = []
        for count in (1, TOGETHER):
            await _generate(rollouts, config, count, many)
            short = [await _generate(rollouts, config, count, few) for _ in range(ROUNDS)]
            long = [await _generate(rollouts, config, count, many) for _ in range(ROUNDS)]
            found.append((min(long) - min(short)) / (many - few))
        return found[0], found[1]
    finally:
        await rollouts.close()


def _most_tokens(config: RunConfig) -> int:
    most = min(TIMED_TOKENS, config.rollout.max_response_tokens)
    if most <= WARM_TOKENS:
        raise InputError(
            f"--measure-engine: rollout.max_response_tokens ({config.rollout.max_response_tokens}) is too short to "
            f"time engine steps: more than {WARM_TOKENS} are needed"
        )
    return most


async def _generate(rollouts: Rollouts, config: RunConfig, count: int, tokens: int) -> float:
    """Seconds of `count` responses of `tokens` tokens each, judged and never erased."""
    group = f"measure-{next(_groups)}"
    requests = [
        ResponseRequest(
            prompt_id="measure",
            group_id=group,
            group_size=count,
            sample=sample,
            prompt_token_ids=[1],
            max_tokens=tokens,
            ignore_eos=True,
            policy=config.rollout.erasure.model_copy(update={"max_erasures": 0}),
        )
        for sample in range(count)
    ]
    started = time.perf_counter()
    async with asyncio.timeout(config.rollout.engine.response_seconds):
        await _checked(rollouts, requests, tokens)
    return time.perf_counter() - started


async def _checked(rollouts: Rollouts, requests: list[ResponseRequest], tokens: int) -> None:
    async for response in rollouts.generate([requests]):
        if response.generated_tokens != tokens:
            raise PartError(
                "rollout", f"a response of {tokens} tokens was asked for, one of {response.generated_tokens} came"
            )
