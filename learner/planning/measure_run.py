"""Fixed costs of an engine step and of a micro-batch, measured with the model that is planned for."""

import asyncio
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

WARM_TOKENS, TIMED_TOKENS = 16, 64
ROUNDS = 5


def measure_microbatch(config: RunConfig) -> float:
    """Seconds of the smallest micro-batch: what one costs beyond its tokens."""
    from learner.policy.batching import collate
    from learner.policy.model import load_policy, response_logprobs

    torch.set_num_threads(config.learner.threads_per_rank)
    policy = load_policy(config.model).to("cuda" if torch.cuda.is_available() else "cpu").train()
    batch = collate([])
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        response_logprobs(policy, batch).sum().backward()
        seconds.append(time.perf_counter() - started)
        policy.zero_grad()
    return min(seconds)


def measure_engine(config: RunConfig, shape: ModelShape, hardware: Hardware, log_directory: Path) -> float:
    """Seconds of an engine step beyond the model's own work, from one response alone in a replica that is started."""
    from learner.run.cluster import ray_cluster
    from learner.run.training_run import load_rollouts

    with ray_cluster(config, log_directory):
        seconds = asyncio.run(_alone(load_rollouts(), config, log_directory))
    context = 1 + WARM_TOKENS + TIMED_TOKENS / 2
    work = engine_step(Setup(config, shape, hardware), Assumptions(), 1, context)
    return max(seconds - (work.seconds - work.overhead), 0.0)


async def _alone(rollouts: Rollouts, config: RunConfig, log_directory: Path) -> float:
    """Seconds of one engine step."""
    try:
        await rollouts.start(config, log_directory)
        taken = [await _generate(rollouts, config, number, WARM_TOKENS) for number in range(ROUNDS)]
        longer = [await _generate(rollouts, config, number, WARM_TOKENS + TIMED_TOKENS) for number in range(ROUNDS)]
        return (min(longer) - min(taken)) / TIMED_TOKENS
    finally:
        await rollouts.close()


async def _generate(rollouts: Rollouts, config: RunConfig, number: int, tokens: int) -> float:
    request = ResponseRequest(
        prompt_id="measure",
        group_id=f"measure-{tokens}-{number}",
        group_size=1,
        sample=0,
        seed=number,
        prompt_token_ids=[1],
        max_tokens=min(tokens, config.rollout.max_response_tokens),
        ignore_eos=True,
        policy=config.rollout.erasure.model_copy(update={"max_erasures": 0}),
    )
    started = time.perf_counter()
    async for _ in rollouts.generate([[request]]):
        pass
    return time.perf_counter() - started
