"""Whether two models' configurations mean the same: what a checkpoint's may differ in from the served model's."""

from collections.abc import Iterator
from typing import Any

_FREE = frozenset(
    {
        # How a model was saved and is to be loaded.
        "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "source",
        # What a training run needs.
        "attention_dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop", "hidden_dropout", "initializer_range",
        "use_cache", "gradient_checkpointing", "pretraining_tp",
        # What the caller of a forward pass wants.
        "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "problem_type",
        "id2label", "label2id",
        # The server's own.
        "max_length",
    }
)  # fmt: skip
"""Settings without a meaning for what the served model computes."""

_TOKEN_IDS = "_token_id"
"""They may differ: trainers set them to their tokenizer's, and the server's are those that it was started with."""

_NAMED = 5
_MISSING = "nothing"


def differences(served: dict[str, Any], checkpoint: dict[str, Any]) -> list[str]:
    """What differs in meaning, each with both values; both are configurations with all their defaults."""
    here, there = dict(_flat(served)), dict(_flat(checkpoint))
    found = [
        f"{name} is {here.get(name, _MISSING)!r} here and {there.get(name, _MISSING)!r} in the checkpoint"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]
    ours, theirs = served.get("architectures"), checkpoint.get("architectures")
    if ours is not None and theirs is not None and not set(ours) & set(theirs):
        found.append(f"architectures is {ours} here and {theirs} in the checkpoint")
    return found


def described(found: list[str]) -> str:
    """The first differences in one line."""
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(found[:_NAMED]) + more


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted names, without those that may differ; null is no setting."""
    for name, value in settings.items():
        if value is None or (not prefix and (name in _FREE or name.startswith("_") or name.endswith(_TOKEN_IDS))):
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value
