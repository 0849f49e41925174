"""Memory by part, each against something that does not know the formula: transformers, autograd, arithmetic by hand."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from common.config.run import ModelConfig
from learner.planning.memory import (
    BYTES,
    GIB,
    activation_bytes,
    engine_workspace,
    layer_activation_bytes,
    learner_memory,
    replica_memory,
)
from learner.planning.shape import ModelShape, read_shape, shape_of
from learner.run.errors import InputError
from tests.configs import run_config
from tests.models import tiny_llama, tiny_qwen3

ROOT = Path(__file__).resolve().parents[3]
QWEN3_8B = ROOT / "deploy" / "configs" / "qwen3_8b.json"


def model(path: str = "nowhere") -> ModelConfig:
    return ModelConfig(path=path, max_length=256)


@pytest.fixture(scope="module")
def eight_billion() -> ModelShape:
    return read_shape(model(), QWEN3_8B)


def test_the_8b_model_has_the_parameters_that_its_configuration_gives(eight_billion: ModelShape):
    c = json.loads(QWEN3_8B.read_text())
    h, d = c["hidden_size"], c["head_dim"]
    queries, keys = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    layer = h * queries + 2 * h * keys + queries * h + 3 * h * c["intermediate_size"] + 2 * h + 2 * d
    embedding = c["vocab_size"] * h
    assert eight_billion.parameters == c["num_hidden_layers"] * layer + 2 * embedding + h
    assert eight_billion.multiplied == eight_billion.parameters - embedding
    # Two bytes for keys and values of 8 heads of 128 in 36 layers.
    assert eight_billion.kv_bytes_per_token(2) == 147_456
    assert eight_billion.norms_heads


@pytest.mark.parametrize(("make", "tied"), [(tiny_qwen3, True), (tiny_llama, False)])
def test_a_shape_is_what_transformers_loads(make: Any, tied: bool, tmp_path: Path):
    path = make(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    shape = read_shape(model(str(path)))
    assert shape.parameters == sum(p.numel() for p in loaded.parameters())
    assert shape.parameters - shape.multiplied == (0 if tied else loaded.get_input_embeddings().weight.numel())
    assert shape == read_shape(model(), path) == read_shape(model(), path / "config.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no file"),
        ("[]", "holds no model's configuration"),
        ("{", "can't be read"),
        ('{"model_type": "no_such_model"}', "can't be read"),
        ('{"model_type": "qwen3", "hidden_size": "wide"}', "qwen3"),
    ],
)
def test_a_model_s_configuration_that_can_not_be_used_is_told(content: str | None, words: str, tmp_path: Path):
    file = tmp_path / "qwen3.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=words):
        read_shape(model(), file)
    with pytest.raises(InputError, match="--model-config FILE takes"):
        read_shape(model(str(tmp_path / "no_such_model")))


def saved_bytes(settings: Any, dtype: torch.dtype, checkpointing: bool = False) -> float:
    """What autograd keeps of a token in the layers of a real model, weights left out."""
    policy: Any = AutoModelForCausalLM.from_config(settings, dtype=dtype).train()
    if checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.zeros((2, 64), dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy.model(input_ids=tokens, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / tokens.numel()


@pytest.mark.parametrize("family", [Qwen3Config, LlamaConfig])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(256, 768, 4, 2, 64), (128, 512, 8, 8, 32)])
def test_activations_are_what_autograd_keeps(family: Any, dtype: str, sizes: tuple[int, ...]):
    hidden, intermediate, heads, kv_heads, head_dim = sizes
    found = {}
    for layers, checkpointing in itertools.product((1, 3), (False, True)):
        sizes_of = family(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            num_hidden_layers=layers,
            vocab_size=320,
        )
        found[layers, checkpointing] = saved_bytes(sizes_of, getattr(torch, dtype), checkpointing)
    shape, size = shape_of(sizes_of, "made here"), BYTES[dtype]
    layer = layer_activation_bytes(shape, size)
    # The difference leaves out what does not grow with the layers, such as the last norm.
    assert found[3, False] - found[1, False] == pytest.approx(2 * layer, rel=0.03)
    assert found[3, True] - found[1, True] == pytest.approx(2 * hidden * size, rel=0.03)
    assert activation_bytes(shape, size, checkpointing=False) == 4 * layer
    assert activation_bytes(shape, size, checkpointing=True) == 3 * hidden * size + layer


STATE = [
    # Weights, master weights, gradients, AdamW's moments; in bytes a parameter.
    ("float32", 0, "float32", 4, (4, 0, 4, 8)),
    ("float32", 1, "float32", 2, (4, 2, 4, 4)),
    ("float32", 2, "float32", 4, (4, 1, 1, 2)),
    ("float32", 3, "float32", 4, (1, 1, 1, 2)),
    ("bfloat16", 1, "float32", 2, (2, 2, 6, 4)),
    ("bfloat16", 1, "bfloat16", 2, (2, 2, 2, 4)),
    ("bfloat16", 2, "float32", 4, (2, 1, 1, 2)),
    ("bfloat16", 2, "bfloat16", 4, (2, 1, 0.5, 2)),
    ("bfloat16", 3, "float32", 8, (0.25, 0.5, 0.5, 1)),
]


@pytest.mark.parametrize(("dtype", "stage", "summed", "ranks", "expected"), STATE)
def test_training_state_is_divided_among_the_ranks_as_zero_does(
    dtype: str, stage: int, summed: str, ranks: int, expected: tuple[float, ...], eight_billion: ModelShape
):
    learner = {"zero_stage": stage, "ranks": ranks, "grad_accum_dtype": summed, "minibatches_per_step": 1}
    found = learner_memory(run_config(model={"dtype": dtype}, learner=learner), eight_billion)
    state = (found.weights, found.master_weights, found.gradients, found.moments)
    assert state == pytest.approx(tuple(size * eight_billion.parameters for size in expected))


def test_what_is_offloaded_leaves_the_gpu_and_is_in_the_host_s_memory(eight_billion: ModelShape):
    config = run_config(model={"dtype": "bfloat16"}, learner={"ranks": 4})
    there, offloaded = (learner_memory(config, eight_billion, offload=where) for where in ("none", "optimizer"))
    assert offloaded.master_weights == offloaded.moments == 0.0
    assert there.state - offloaded.state == there.master_weights + there.moments
    # Master weights, two moments, and the gradients that the host's optimizer reads.
    assert offloaded.host == pytest.approx(16 * eight_billion.parameters / 4)


def test_a_kl_to_the_start_policy_holds_it_whole(eight_billion: ModelShape):
    objective = {"kind": "clipped", "kl_coefficient": 0.1}
    config = run_config(model={"dtype": "bfloat16"}, learner={"objective": objective, "zero_stage": 3, "ranks": 4})
    assert learner_memory(config, eight_billion).parts()["reference policy"] == 2 * eight_billion.parameters


@settings(deadline=None, max_examples=60)
@given(
    memory=st.floats(1.0, 400.0),
    more=st.floats(0.0, 400.0),
    block=st.sampled_from([8, 16, 32, 128]),
    parallel=st.sampled_from([1, 2, 4, 8]),
)
def test_more_memory_never_holds_fewer_responses(memory: float, more: float, block: int, parallel: int):
    shape = ModelShape(10**9, 10**9, 16, 2048, 8192, 100_000, 32, 8, 64)
    config = run_config(model={"dtype": "bfloat16"}, rollout={"engine": {"block_size": block}})
    workspace = engine_workspace(config, shape, tensor_parallel=parallel)
    small, large = (
        replica_memory(config, shape, size * GIB, tensor_parallel=parallel, workspace=workspace)
        for size in (memory, memory + more)
    )
    assert small.responses <= large.responses
    assert small.tokens <= large.tokens
    assert 0 <= small.cache <= memory * GIB
    # All responses that are said to fit do, and one more does not.
    for found in (small, large):
        whole = -(-161 // block) * block
        assert found.responses * whole <= found.tokens < (found.responses + 1) * whole
        sharing = parallel
        assert found.tokens * shape.kv_bytes_per_token(2) / sharing <= found.cache + 1


def test_blocks_that_are_given_are_taken(eight_billion: ModelShape):
    config = run_config(rollout={"engine": {"num_gpu_blocks_override": 13}})
    assert replica_memory(config, eight_billion, None).responses == 13 // 6
