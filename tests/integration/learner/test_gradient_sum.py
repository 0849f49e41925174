"""What two DeepSpeed ranks sum and hold: gradients against their sum in float64, memory against the plan's."""

import math
import multiprocessing
import socket
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config.run import RunConfig
from learner.objectives import ObjectiveInputs, compute_objective
from learner.planning.memory import BUCKET_ELEMENTS, learner_memory
from learner.planning.shape import read_shape
from learner.policy.batching import collate, rank_batches, split_minibatches
from learner.policy.model import load_policy, response_logprobs
from tests.configs import run_config
from tests.deepspeed_ranks import Minibatch, train_minibatches
from tests.models import tiny_llama
from tests.trajectories import random_groups, recorded_near

RANKS = 2
CASES = [(1, "float32"), (2, "float32"), (3, "float32"), (2, "bfloat16")]
STATES = [("float32", stage, "float32") for stage in (0, 1, 2, 3)] + [("bfloat16", *case) for case in CASES]


def config(model: Path, stage: int, accumulated: str, dtype: str = "bfloat16") -> RunConfig:
    learner: dict[str, Any] = {
        "ranks": RANKS,
        "zero_stage": stage,
        "grad_accum_dtype": accumulated,
        "tokens_per_microbatch": 40,
        "minibatches_per_step": 1,
        "advantage": {"credit": {"kind": "uniform"}},
        "step_seconds": 120.0,
    }
    model_settings = {"path": str(model), "max_length": 256, "dtype": dtype}
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


@dataclass(frozen=True)
class Trained:
    """What rank 0 told of each configuration, and what to compare the norms with."""

    minibatches: dict[Any, Minibatch]
    configs: dict[Any, RunConfig]
    expected_norm: float
    microbatches: int


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    directory = tmp_path_factory.mktemp("ranks")
    small = tiny_llama(directory / "small", hidden_size=32)
    # So large that its state outweighs all else that a rank holds.
    large = tiny_llama(directory / "large", hidden_size=256, layers=4)
    configs = {case: config(small, *case) for case in CASES}
    configs |= {(dtype, *case): config(large, *case, dtype) for dtype, *case in STATES}
    groups = recorded_near(load_policy(configs[CASES[0]].model), random_groups(3, 24, 4))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    given = list(configs.values())
    with ProcessPoolExecutor(RANKS, multiprocessing.get_context("spawn")) as pool:
        ranks = [
            pool.submit(train_minibatches, rank, RANKS, port, given, groups, str(directory / "log"))
            for rank in range(RANKS)
        ]
        found, other = (rank.result(timeout=300) for rank in ranks)
    assert [m.gradient_norm for m in found] == pytest.approx([m.gradient_norm for m in other])
    return Trained(dict(zip(configs, found, strict=True)), configs, *float64_norm(configs[CASES[0]], groups))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_many_micro_batches_are_summed_in_float32(trained: Trained, stage: int) -> None:
    assert trained.microbatches >= 32
    norm = trained.minibatches[stage, "float32"].gradient_norm
    assert norm == pytest.approx(trained.expected_norm, rel=1e-6)


def test_a_sum_in_bfloat16_would_show(trained: Trained) -> None:
    norm = trained.minibatches[2, "bfloat16"].gradient_norm
    assert abs(norm / trained.expected_norm - 1.0) > 1e-5


@pytest.mark.parametrize("case", STATES)
def test_a_rank_holds_what_is_planned(trained: Trained, case: tuple[str, int, str]) -> None:
    dtype, stage, _ = case
    settings, found = trained.configs[case], trained.minibatches[case]
    shape = read_shape(settings.model)
    planned = learner_memory(settings, shape)
    assert found.moments == pytest.approx(planned.moments, rel=0.01)
    # Before the first step there are no moments yet. Stages 1 and 2 hold the sum of a rank's own part alone by then.
    gradients = planned.gradients
    if stage == 1 and (dtype == "float32" or settings.learner.grad_accum_dtype == "bfloat16"):
        gradients /= RANKS
    assert found.before_step == pytest.approx(planned.weights + planned.master_weights + gradients, rel=0.05)
    assert found.after_step >= planned.weights + planned.master_weights + planned.moments
    assert found.after_step <= planned.state
    if stage == 3:
        assert found.buckets == [4 * BUCKET_ELEMENTS]
