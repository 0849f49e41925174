"""Tiny models of two families, made from a seed, for tests that need a real model directory.

Their weights are random but large enough that next-token distributions are peaked (logits of standard deviation
1 to 2), so that sampling, entropies and importance ratios are not those of a uniform distribution.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

EOS_TOKEN = "<|end|>"
PAD_TOKEN = "<|pad|>"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
TOKENIZER_LENGTH = 258
"""256 bytes, end of sequence, padding: ids from here to the vocabulary's end are free for sentinels."""


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """One token a byte (in the byte-level alphabet's order), then end of sequence (256) and padding (257)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        tokenizer_models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _sizes(
    *,
    vocab_size: int = 320,
    hidden_size: int = 64,
    layers: int = 2,
    max_length: int = 1024,
    initializer_range: float = 0.2,
) -> dict[str, Any]:
    """What both families' configurations have in common. Head dimension 32, float32."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": max_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "initializer_range": initializer_range,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 257,
        "dtype": "float32",
    }


def _save(family: type[PreTrainedModel], config: PretrainedConfig, directory: Path, seed: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family(config)
    tokenizer = byte_tokenizer(config.max_position_embeddings)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def tiny_qwen3(directory: Path, *, tied: bool = True, seed: int = 0, **sizes: Any) -> Path:
    """Write a Qwen3 with a byte tokenizer into `directory` and return `directory`. `sizes`: see `_sizes`."""
    return _save(Qwen3ForCausalLM, Qwen3Config(**_sizes(**sizes), tie_word_embeddings=tied), directory, seed)


def tiny_llama(directory: Path, *, seed: int = 0, **sizes: Any) -> Path:
    """Write an untied Llama with a byte tokenizer into `directory` and return `directory`. `sizes`: see `_sizes`."""
    return _save(LlamaForCausalLM, LlamaConfig(**_sizes(**sizes), tie_word_embeddings=False), directory, seed)
