"""Tokens and seconds of a step, against torch's own count of operations, arithmetic by hand, and each other."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3Config

from common.config import RunConfig, load_config
from common.config.run import ModelConfig
from learner.planning.assumptions import Assumptions
from learner.planning.capacity import Plan, make_plan
from learner.planning.generation import engine_step
from learner.planning.hardware import PRESETS
from learner.planning.setup import Setup
from learner.planning.shape import ModelShape, read_shape, shape_of
from learner.planning.work import attention_operations, microbatches, step_work, training_operations
from learner.policy.batching import MicroBatch, plan_microbatches
from learner.policy.model import response_logprobs
from learner.run.errors import InputError
from tests.configs import run_config

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "deploy" / "configs"
H100 = PRESETS["h100"]


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return read_shape(ModelConfig(path="nowhere", max_length=16), CONFIGS / "qwen3_8b.json")


@lru_cache
def eight_billion(*changes: str) -> RunConfig:
    return load_config(CONFIGS / "qwen3_8b_deepmath.yaml", changes)


def plan(shape: ModelShape, config: RunConfig | None = None, hardware: Any = H100, **setup: Any) -> Plan:
    assumptions = setup.pop("assumptions", Assumptions())
    return make_plan(Setup(config or eight_billion(), shape, hardware, **setup), assumptions)


def test_without_assumptions_a_step_is_as_large_as_the_limits_allow():
    config = run_config(rollout={"erasure": {"segmentation": {"mode": "fixed", "length": 16}}})
    # Two groups of four, of which two are erasable; a fifth of what these generate is erased.
    work = step_work(config, Assumptions(padding_share=0.0))
    assert work.erased_tokens == pytest.approx(4 * 80 / 4)
    assert work.generated_tokens == pytest.approx(8 * 80 + 80)
    assert work.erasures == pytest.approx(80 / 16)
    assert work.engine_steps == pytest.approx((8 * 80 + 80) / 8 + 1 + 2 * 5 / 8)
    assert work.trained_tokens == 8 * 160
    assert work.predicted_tokens == 8 * 80


def test_erased_tokens_stay_within_the_regeneration_budget():
    budget = {"segmentation": {"mode": "fixed", "length": 16}, "regeneration_budget": 0.1}
    work = step_work(run_config(rollout={"erasure": budget}), Assumptions(erased_share=0.9))
    assert work.erased_tokens == 4 * 8
    none = step_work(run_config(preset="grpo"), Assumptions(erased_share=0.9))
    assert none.erased_tokens == none.erasures == 0.0


def test_erased_attempts_that_count_are_sequences_of_their_own():
    erasure = {"segmentation": {"mode": "fixed", "length": 16}}
    config = run_config(rollout={"erasure": erasure}, learner={"advantage": {"erased_weight": 0.5}})
    work = step_work(config, Assumptions(padding_share=0.0))
    assert work.sequences == pytest.approx(8 + 5)
    assert work.trained_tokens == pytest.approx(8 * 160 + 5 * (80 + 40) + 80)


@pytest.mark.parametrize(
    ("learner", "other_forwards"),
    [
        ({}, 0),
        ({"gradient_checkpointing": True}, 0),
        ({"objective": {"kind": "clipped", "kl_coefficient": 0.1}}, 1),
        ({"old_logprobs": "recomputed"}, 1),
    ],
)
def test_operations_are_those_that_torch_counts(learner: dict[str, Any], other_forwards: int):
    small = Qwen3Config(
        hidden_size=256,
        intermediate_size=768,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_hidden_layers=3,
        vocab_size=2048,
    )
    policy: Any = AutoModelForCausalLM.from_config(small, dtype=torch.float32).train()
    if "gradient_checkpointing" in learner:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # 8 sequences of 16 prompt tokens and 16 predicted ones.
    tokens, ones = torch.zeros((8, 32), dtype=torch.int64), torch.ones((8, 16))
    batch = MicroBatch(tokens, 15, tokens[:, 16:], ones.bool(), ones, ones, ones)
    with FlopCounterMode(display=False) as counter:
        response_logprobs(policy, batch).sum().backward()
        with torch.no_grad():
            for _ in range(other_forwards):
                response_logprobs(policy, batch)
    config = run_config(
        rollout={"max_prompt_tokens": 16, "max_response_tokens": 16, "group_share": {"mode": "fixed", "share": 0.0}},
        learner=learner,
    )
    work = step_work(config, Assumptions(padding_share=0.0))
    planned = training_operations(config, shape_of(small, "made here"), work)
    assert counter.get_total_flops() == pytest.approx(planned, rel=0.03)


@pytest.mark.parametrize(("tokens", "ranks"), [(160, 1), (500, 1), (700, 2), (4000, 4)])
def test_micro_batches_are_those_that_batching_makes(tokens: int, ranks: int):
    config = run_config(learner={"ranks": ranks, "tokens_per_microbatch": tokens, "minibatches_per_step": 1})
    planned = plan_microbatches([160] * config.responses_per_step, ranks, tokens)
    assert microbatches(config, step_work(config, Assumptions())) == len(planned[0])


def test_an_engine_step_reads_all_weights_and_the_cache_of_every_response(shape: ModelShape):
    assumptions = Assumptions(decode_bandwidth_share=1.0, decode_flops_share=1.0)
    step = engine_step(Setup(eight_billion(), shape, H100), assumptions, 32, 5000.0)
    # Two bytes of each weight but the input embedding's, 147,456 of each cached token, at 3.35 TB/s.
    weights = 2 * (8_190_735_360 - 151_936 * 4096)
    assert step.bandwidth == pytest.approx((weights + 32 * 5000 * 147_456) / 3.35e12)
    attention = 4 * 36 * 32 * 128 * 5000
    assert step.operations == pytest.approx(32 * (weights + attention) / 989e12)
    assert step.links == 0.0


def test_a_step_s_fixed_cost_and_each_response_s_are_added(shape: ModelShape):
    costs = {"engine_step_seconds": 0.003, "engine_response_seconds": 0.0002}
    setup = Setup(eight_billion(), shape, H100.model_copy(update=costs))
    step = engine_step(setup, Assumptions(), 32, 5000.0)
    assert step.overhead == pytest.approx(0.003 + 32 * 0.0002)
    assert step.seconds == pytest.approx(max(step.bandwidth, step.operations) + step.overhead)


def test_two_gpus_halve_what_each_reads_and_add_two_all_reduces_a_layer(shape: ModelShape):
    assumptions = Assumptions(collective_share=1.0, collective_latency_seconds=0.0)
    one, two = (
        engine_step(Setup(eight_billion(), shape, H100, tensor_parallel=n), assumptions, 32, 5000.0) for n in (1, 2)
    )
    assert two.bandwidth == pytest.approx(one.bandwidth / 2)
    assert two.operations == pytest.approx(one.operations / 2)
    # Each of two GPUs sends half of its part and gets half, twice.
    assert two.links == pytest.approx(2 * 36 * 32 * 4096 * 2 / 450e9)


def test_more_gpus_than_heads_of_keys_and_values_share_them(shape: ModelShape):
    many = H100.model_copy(update={"gpus_per_node": 16})
    eight, sixteen = (plan(shape, hardware=many, tensor_parallel=n) for n in (8, 16))
    # Eight heads: a GPU's share of a token does not fall any more, only the weights' does.
    gained = sixteen.replica.cache - eight.replica.cache
    assert 0 < gained < sixteen.replica.cache
    assert sixteen.replica.tokens * 147_456 / 8 <= sixteen.replica.cache


def test_a_synchronous_step_is_the_sum_of_its_phases_and_an_asynchronous_one_the_longest_side(shape: ModelShape):
    # Whole groups go to replicas, so that these divide evenly.
    config = eight_billion("rollout.engine.max_concurrent_responses=16")
    together, apart = (
        plan(shape, config, max_staleness=n, in_flight="keep", assumptions=Assumptions(sync_pause_share=0.0))
        for n in (0, 1)
    )
    parts = [together.generation, together.training, together.sync]
    assert together.step_seconds == pytest.approx(sum(part.seconds for part in parts) + together.driver)
    sides = [
        apart.generation.seconds,
        apart.training.seconds + apart.sync.seconds + apart.checkpoint_due,
        apart.driver,
    ]
    assert apart.step_seconds == pytest.approx(max(sides))
    assert apart.generation.seconds == pytest.approx(together.generation.seconds)


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"assumptions": Assumptions(driver_seconds_per_million_tokens=1e6)}, "driver"),
        ({"assumptions": Assumptions(train_flops_share=0.001)}, "learner: operations"),
        ({"hardware": H100.model_copy(update={"disk_write_gb_per_second": 0.001}), "transport": "disk"}, "checkpoint"),
        ({"hardware": H100.model_copy(update={"load_gb_per_second": 0.001})}, "weight sync"),
        ({"hardware": H100.model_copy(update={"gpu_memory_gib": 30.0})}, "replicas: KV memory"),
        ({"hardware": H100.model_copy(update={"memory_gb_per_second": 1.0, "gpu_memory_gib": 900.0})},
         "replicas: memory bandwidth"),
        ({"assumptions": Assumptions(reward_seconds=1e5)}, "rewards"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("max_staleness", [0, 2])
def test_what_is_made_scarce_saturates_first(shape: ModelShape, changes: Any, first: str, max_staleness: int):
    assert plan(shape, max_staleness=max_staleness, **changes).first == first


FIGURES = [name for name in type(H100).model_fields if name.endswith("per_second")]


@settings(deadline=None, max_examples=60)
@given(
    figure=st.sampled_from(FIGURES),
    factor=st.floats(1.0, 100.0),
    max_staleness=st.integers(0, 3),
    transport=st.sampled_from(["host", "disk", "gloo", "nccl", "ipc"]),
    parallel=st.sampled_from([1, 2, 8]),
    stage=st.integers(1, 3),
    checkpoints=st.booleans(),
)
def test_faster_hardware_never_makes_a_step_longer_and_no_resource_is_busy_for_longer_than_it(
    figure: str, factor: float, max_staleness: int, transport: Any, parallel: int, stage: int, checkpoints: bool
):
    shape = ModelShape(10**9, 9 * 10**8, 16, 2048, 8192, 50_000, 32, 8, 64)
    config = eight_billion(f"learner.zero_stage={stage}", f"checkpoint.latest={str(checkpoints).lower()}")
    faster = H100.model_copy(update={figure: getattr(H100, figure) * factor})
    setup = {"max_staleness": max_staleness, "transport": transport, "tensor_parallel": parallel}
    slow, fast = (plan(shape, config, hardware, **setup) for hardware in (H100, faster))
    assert fast.step_seconds <= slow.step_seconds * (1 + 1e-9)
    for found in (slow, fast):
        assert max(found.busy.values()) <= found.step_seconds * (1 + 1e-9)
        assert found.first.startswith("replicas") or found.first in found.busy


@settings(deadline=None, max_examples=60)
@given(memory=st.floats(20.0, 200.0), more=st.floats(0.0, 200.0), max_staleness=st.integers(0, 2))
def test_more_memory_never_lowers_concurrency_or_speed(memory: float, more: float, max_staleness: int):
    shape = ModelShape(10**9, 9 * 10**8, 16, 2048, 8192, 50_000, 32, 8, 64)
    small, large = (
        plan(
            shape,
            hardware=H100.model_copy(update={"gpu_memory_gib": size}),
            max_staleness=max_staleness,
            # Recomputing after a sync grows with what is under way.
            in_flight="keep",
        )
        for size in (memory, memory + more)
    )
    assert small.generation.concurrency <= large.generation.concurrency
    assert large.generation.seconds <= small.generation.seconds * (1 + 1e-9)
    assert len(large.problems) <= len(small.problems)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_more_replicas_and_ranks_shorten_their_phases(shape: ModelShape, count: int):
    few = plan(shape, eight_billion(f"rollout.engine.replicas={count}", f"learner.ranks={count}"), transport="nccl")
    many = plan(
        shape, eight_billion(f"rollout.engine.replicas={2 * count}", f"learner.ranks={2 * count}"), transport="nccl"
    )
    assert many.generation.seconds < few.generation.seconds
    assert many.training.operations == pytest.approx(few.training.operations / 2)
    assert many.learner.total < few.learner.total
    assert many.replica == few.replica


def test_a_sync_costs_what_becomes_of_the_responses_under_way(shape: ModelShape):
    found = {
        in_flight: plan(shape, max_staleness=1, in_flight=in_flight).generation
        for in_flight in ("keep", "recompute", "wait", "abort")
    }
    assert found["keep"].after_sync == 0.0
    # Half of a response is made again, by all that are under way.
    step, work = found["abort"].engine_step.seconds, step_work(eight_billion(), Assumptions())
    assert found["abort"].after_sync == pytest.approx(work.engine_steps / 2 * step)
    assert 0.0 < found["recompute"].after_sync < found["wait"].after_sync < found["abort"].after_sync
    assert plan(shape, in_flight="abort").generation.after_sync == 0.0


def test_each_transport_takes_as_long_as_its_narrowest_link(shape: ModelShape):
    assumptions = Assumptions(copy_share=1.0, gloo_share=1.0, collective_share=1.0, sync_latency_seconds=0.0)
    config = eight_billion("rollout.engine.replicas=8", "learner.ranks=8")
    found = {
        transport: plan(shape, config, transport=transport, assumptions=assumptions).sync
        for transport in ("host", "disk", "gloo", "nccl", "ipc")
    }
    size = 2 * 8_190_735_360
    gathered = size * 7 / 8 / 450e9
    assert all(sync.bytes == size and sync.gather == pytest.approx(gathered) for sync in found.values())
    assert found["host"].seconds == pytest.approx(gathered + size / 10e9 + size / 5e9)
    # Written once, read by one node, then loaded.
    assert found["disk"].seconds == pytest.approx(gathered + size / 5e9 + size / 10e9 + size / 5e9)
    # Sixteen GPUs are two nodes; received while it is loaded, which takes longer.
    assert found["gloo"].seconds == pytest.approx(gathered + size / 5e9)
    assert found["nccl"].seconds == pytest.approx(gathered + size / 50e9)
    assert found["ipc"].seconds == pytest.approx(gathered + size / 3350e9)


def test_what_can_not_be_is_refused_with_the_arithmetic(shape: ModelShape):
    with pytest.raises(InputError, match=r"3 does not divide the model's 32 attention heads \(32 / 3"):
        plan(shape, tensor_parallel=3)
    with pytest.raises(InputError, match=r"replica of 16 GPUs does not fit into a node of 8 \(16 > gpus_per_node\)"):
        plan(shape, tensor_parallel=16)
    with pytest.raises(InputError, match="nccl needs GPUs, cpu has none"):
        plan(shape, hardware=H100.model_copy(update={"name": "cpu", "device": "cpu"}), transport="nccl")


def test_what_does_not_fit_is_told_with_the_arithmetic(shape: ModelShape):
    assert plan(shape).problems == []
    (text,) = plan(shape, eight_billion("rollout.engine.replicas=64", "learner.ranks=64")).problems
    assert "128 GPUs = 64 replica(s) x 1 + 64 rank(s) take 16 of 8: use nccl, gloo or disk" in text
    (text,) = plan(shape, eight_billion("learner.ranks=1", "learner.zero_stage=2")).problems
    assert text.startswith("a learner's GPU is too small: ")
    small = plan(shape, hardware=H100.model_copy(update={"gpu_memory_gib": 16.0}))
    held, weights, learner = small.problems
    assert "not one response of full length: 9,217 tokens" in held
    assert "weights + 2.60 GiB workspace > 14 GiB = gpu_memory_utilization 0.9 x 16 GiB" in weights
    assert "a learner's GPU is too small" in learner
    host = H100.model_copy(update={"host_memory_gib": 10.0})
    (text,) = plan(shape, hardware=host, offload="optimizer").problems
    assert "what is offloaded" in text


def test_attention_grows_with_the_context(shape: ModelShape):
    assert attention_operations(shape, 2000.0) == 2 * attention_operations(shape, 1000.0)
