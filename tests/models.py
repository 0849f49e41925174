"""Tiny models, made from a seed, for tests that need a real model directory.

Those with a byte tokenizer have a token a byte and spare embedding rows; the everyday model has neither: its
tokenizer is byte-level BPE with merges, and its special tokens are those of a usual chat model.

Their weights are random but large enough that next-token distributions are peaked (logits of standard deviation
1 to 2), so that sampling, entropies and importance ratios are not those of a uniform distribution.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
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


EVERYDAY_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<repo_name>",
    "<reponame>",
    "<file_sep>",
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<empty_output>",
)
"""In the order of their ids, from 0. Nothing says which of them are unused: from the fourth on, all are."""

EVERYDAY_TEXT = """\
She said: "It's 23 °C. Is it?" — „Ja“, sagte er, «oui» et «déjà vu». Ærø, Łódź, naïve café, fiancée, Straße.

Сегодня хорошая погода. Завтра будет дождь. Добро пожаловать!
今日は天気がいいです。明日は雨が降るでしょう。日本語と漢字。
你好，世界！今天天气很好。안녕하세요 세계
नमस्ते दुनिया। مرحبا بالعالم. שלום עולם.
😀 👍🏽 👩‍👩‍👧 🇩🇪 ∑ ∫ √2 ½ ≤ → “quotes” ‘single’ … e\u0301 \u00a0
def f(x):\n    return {"a": [1, 2.5e-3]}\t# tab
<think>\nFirst, 12 + 34 = 46. So the answer is 46.\n</think>\n\nThe answer is 46.\r\n
"""  # noqa: RUF001
"""What the licence has none of: characters of two to four bytes, code, quotes, blank lines."""

EVERYDAY_CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {{- 'You may call these functions:\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
    {{- '\\n</tools>\\nA call: <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in (messages[1:] if tools and messages[0].role == 'system' else messages) %}
    {{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' }}
    {%- if message.role == 'tool' %}
        {{- '<tool_response>\\n' + message.content + '\\n</tool_response>' }}
    {%- elif message.content %}
        {{- message.content }}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- (call.function.arguments if call.function.arguments is string else call.function.arguments | tojson) }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
"""ChatML with a default system message, tools and their calls."""


@lru_cache(maxsize=1)
def _everyday_bpe() -> str:
    """JSON of a byte-level BPE tokenizer of 1,200 tokens, trained on the licence and `EVERYDAY_TEXT`.

    Digits are tokens of their own, and words take the space before them, as in GPT-2: no token holds ". ", and "\\n\\n"
    before a word is two tokens.
    """
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=list(EVERYDAY_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    licence = (Path(__file__).parents[1] / "LICENSE").read_text()
    tokenizer.train_from_iterator([licence, EVERYDAY_TEXT, EVERYDAY_TEXT], trainer)
    return tokenizer.to_str()


def everyday_tokenizer(max_length: int = 1024) -> PreTrainedTokenizerFast:
    """A tokenizer as real chat models have it: merges, tokens of parts of characters, a chat template with tools."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_everyday_bpe()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = EVERYDAY_CHAT_TEMPLATE
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


def _save(
    family: type[PreTrainedModel],
    config: PretrainedConfig,
    directory: Path,
    seed: int,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family(config)
    tokenizer = tokenizer or byte_tokenizer(config.max_position_embeddings)
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


def everyday_llama(directory: Path, *, seed: int = 0, **sizes: Any) -> Path:
    """Write a tied Llama with the everyday tokenizer and no spare embedding rows; returns `directory`."""
    tokenizer = everyday_tokenizer(sizes.get("max_length", 1024))
    named = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(**_sizes(**{"vocab_size": len(tokenizer), **sizes}) | named, tie_word_embeddings=True)
    return _save(LlamaForCausalLM, config, directory, seed, tokenizer)
