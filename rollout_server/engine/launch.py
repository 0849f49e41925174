"""How vLLM is started for erasable generation: its environment, its arguments, and what ends its responses."""

import logging
import os
from pathlib import Path

from transformers import AutoConfig
from vllm.config import WeightTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM

from common.config.run import EngineConfig, ModelConfig
from common.sentinels import model_sentinels
from rollout_server.engine.cores import threads_per_engine
from rollout_server.engine.scheduling import SCHEDULER
from rollout_server.engine.worker_extension import WORKER_EXTENSION
from rollout_server.monitor.adapters.vllm_v1 import LOGITS_PROCESSOR
from rollout_server.weights.loading import BACKEND

log = logging.getLogger("e3rl.engine")


def prepare_environment(engine: EngineConfig) -> None:
    """Environment that vLLM reads when it is imported or started; what the user has set wins."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }
    if current_platform.is_cpu():
        defaults |= {
            "VLLM_CPU_KVCACHE_SPACE": str(engine.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(engine.threads or threads_per_engine(engine.tensor_parallel_size)),
            # oneDNN keeps what it compiles for each batch size, 0.1 MiB and more a piece; by default 1,024 of them.
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
        }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def engine_args(model: ModelConfig, engine: EngineConfig, address: str, version: int) -> AsyncEngineArgs:
    """vLLM's arguments; `address` is where the monitor sends its records.

    Raises:
        NoSentinelsError: the model has no token ids to spare for sentinels.
        ValueError: the model cannot be divided among `engine.tensor_parallel_size` ranks.
    """
    check_divides(model, engine.tensor_parallel_size)
    sentinels = model_sentinels(model)
    log.info("sentinels: %s", sentinels)
    return AsyncEngineArgs(
        model=model.path,
        # The label of vLLM's metrics: not the directory's path, which clients need not know.
        served_model_name=Path(model.path).name if is_model_directory(model.path) else model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        dtype=model.dtype,
        max_model_len=model.max_length,
        max_num_seqs=engine.max_concurrent_responses,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        num_gpu_blocks_override=engine.num_gpu_blocks_override,
        block_size=engine.block_size,
        enforce_eager=engine.enforce_eager,
        tensor_parallel_size=engine.tensor_parallel_size,
        # Within a placement group vLLM would make Ray actors of its workers, for which the group has no room.
        distributed_executor_backend="mp" if engine.tensor_parallel_size > 1 else None,
        enable_prefix_caching=True,
        # On CPU the engine dies of a seeded request whose prompt is computed in parts: torch's generator has no offset.
        enable_chunked_prefill=False if current_platform.is_cpu() else None,
        scheduling_policy="priority",
        scheduler_cls=SCHEDULER,
        logits_processors=[LOGITS_PROCESSOR],
        worker_extension_cls=WORKER_EXTENSION,
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        additional_config={"e3rl": {"address": address, "sentinel_ids": sentinels.ids, "version": version}},
        disable_log_stats=not engine.log_stats,
        enable_log_requests=False,
        seed=0,
    )


def check_divides(model: ModelConfig, ranks: int) -> None:
    """Raises ValueError unless each rank has key-value heads of its own: of copies a sync could not tell how many."""
    if ranks == 1:
        return
    config = AutoConfig.from_pretrained(
        model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
    ).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if heads % ranks:
        raise ValueError(
            f"rollout.engine.tensor_parallel_size ({ranks}) does not divide the model's {heads} key-value heads"
        )


def eos_token_ids(llm: AsyncLLM) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's, and those of the model's generation config."""
    ids: set[int] = set()
    configured = llm.model_config.try_get_generation_config().get("eos_token_id")
    if configured is not None:
        ids.update(configured if isinstance(configured, list) else [configured])
    tokenizer = llm.get_tokenizer()
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))


def is_model_directory(path: str) -> bool:
    """Whether `path` is a local directory with a model's configuration."""
    return (Path(path) / "config.json").is_file()
