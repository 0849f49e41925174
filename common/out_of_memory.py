"""Which settings to lower where memory ran out. None changes what is learnt, so a resumed run may change them."""

import re

from common.config.run import EngineConfig, LearnerConfig

_SAYS_SO = re.compile(
    r"out of memory|outofmemory|\boom\b|can(?:'|no)t allocate memory|cannot allocate|not enough memory|bad_alloc"
    r"|no available memory|memoryerror|available (?:kv cache )?memory|free memory on device|kv cache is needed",
    re.IGNORECASE,
)


def ran_out_of_memory(text: str) -> bool:
    """Whether an error's text says that memory ran out, on a GPU or in the machine."""
    return _SAYS_SO.search(text) is not None


def learner_advice(learner: LearnerConfig, certain: bool) -> str:
    """What to change for a learner rank that ran out of memory, or may have (`certain` false)."""
    changes = [f"lower learner.tokens_per_microbatch ({learner.tokens_per_microbatch})"]
    if not learner.gradient_checkpointing:
        changes.append("set learner.gradient_checkpointing: true")
    return _advice(changes, certain)


def engine_advice(engine: EngineConfig, certain: bool) -> str:
    """What to change for a replica that ran out of memory, or may have (`certain` false)."""
    changes = [
        f"lower rollout.engine.max_concurrent_responses ({engine.max_concurrent_responses})",
        f"or gpu_memory_utilization ({engine.gpu_memory_utilization:g}, on a GPU) or kv_cache_gib "
        f"({engine.kv_cache_gib}, on CPU)",
    ]
    if not engine.enforce_eager:
        changes.append("or set rollout.engine.enforce_eager: true")
    return _advice(changes, certain)


def _advice(changes: list[str], certain: bool) -> str:
    beginning = "memory ran out" if certain else "if it was memory that ran out"
    return f"{beginning}: {', '.join(changes)}; --resume takes these changes"
