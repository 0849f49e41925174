"""Gradients of many micro-batches in bfloat16, on two DeepSpeed ranks, against their sum in float64."""

import math
import multiprocessing
import socket
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config.run import RunConfig
from learner.objectives import ObjectiveInputs, compute_objective
from learner.policy.batching import collate, rank_batches, split_minibatches
from learner.policy.model import load_policy, response_logprobs
from tests.configs import run_config
from tests.deepspeed_ranks import gradient_norms
from tests.models import tiny_llama
from tests.trajectories import random_groups, recorded_near

RANKS = 2
CASES = [(1, "float32"), (2, "float32"), (3, "float32"), (2, "bfloat16")]


def config(model: Path, stage: int, accumulated: str) -> RunConfig:
    learner: dict[str, Any] = {
        "ranks": RANKS,
        "zero_stage": stage,
        "grad_accum_dtype": accumulated,
        "tokens_per_microbatch": 40,
        "minibatches_per_step": 1,
        "advantage": {"credit": {"kind": "uniform"}},
        "step_seconds": 120.0,
    }
    model_settings = {"path": str(model), "max_length": 256, "dtype": "bfloat16"}
    rollout = {"max_prompt_tokens": 8, "max_response_tokens": 32}
    return run_config(model=model_settings, learner=learner, rollout=rollout)


def float64_norm(settings: RunConfig, groups: Any) -> tuple[float, int]:
    """Every micro-batch's own gradient in bfloat16, as the ranks get it, summed in float64; and how many there are."""
    policy: Any = load_policy(settings.model)
    (samples,) = split_minibatches(groups, settings.learner.advantage, 1, settings.seed, 0)
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in policy.named_parameters()}
    count = 0
    for batch in rank_batches(samples, RANKS, settings.learner.tokens_per_microbatch):
        for microbatch in batch.microbatches:
            tensors = collate(microbatch)
            logprobs = response_logprobs(policy, tensors)
            inputs = ObjectiveInputs(logprobs, tensors.behaviour_logprobs, tensors.advantages, tensors.mask)
            loss, _ = compute_objective(settings.learner.objective, inputs, batch.totals)
            policy.zero_grad()
            (loss * RANKS).backward()
            for name, parameter in policy.named_parameters():
                sums[name] += parameter.grad.double() / RANKS
            count += 1
    return math.sqrt(sum(float((total**2).sum()) for total in sums.values())), count


@pytest.fixture(scope="module")
def norms(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[tuple[int, str], float], float, int]:
    directory = tmp_path_factory.mktemp("gradients")
    model = tiny_llama(directory / "model", hidden_size=32)
    configs = [config(model, *case) for case in CASES]
    groups = recorded_near(load_policy(configs[0].model), random_groups(3, 24, 4))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ProcessPoolExecutor(RANKS, multiprocessing.get_context("spawn")) as pool:
        ranks = [
            pool.submit(gradient_norms, rank, RANKS, port, configs, groups, str(directory / "log"))
            for rank in range(RANKS)
        ]
        found, other = (rank.result(timeout=300) for rank in ranks)
    assert found == pytest.approx(other)
    return dict(zip(CASES, found, strict=True)), *float64_norm(configs[0], groups)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_many_micro_batches_are_summed_in_float32(norms: Any, stage: int) -> None:
    found, expected, count = norms
    assert count >= 32
    assert found[stage, "float32"] == pytest.approx(expected, rel=1e-6)


def test_a_sum_in_bfloat16_would_show(norms: Any) -> None:
    found, expected, _ = norms
    assert abs(found[2, "bfloat16"] / expected - 1.0) > 1e-5
