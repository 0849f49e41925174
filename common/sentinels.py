"""Sentinel tokens: two vocabulary ids that no response needs, which end a request when forced.

They are found from a model's files alone: training, its dry run and the server look before an engine starts.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from common.config.run import ModelConfig

LISTED = 12
"""Candidates that an error names."""

_MARKER = re.compile(r"[▁\s]*[<\[{|].+[>\]}|]\s*", re.DOTALL)
_RESERVED = re.compile(r"reserved|unused|control|placeholder", re.IGNORECASE)
_GENERATED = re.compile(r"think|reason|tool|call|python|fim|image|audio|video|vision|answer|eo[stm]|end", re.IGNORECASE)
"""Names of special tokens that models do generate, though no template mentions them: never chosen by itself."""

_TEXT = "The quick brown fox: 12.5 × 3 = 37.5?\n\n\tNaïve “quotes” — 漢字, привет 😀 {[<|>]} end."
_QUESTION = [{"role": "user", "content": "Hi"}]
_CONVERSATION = [
    {"role": "system", "content": "Help."},
    *_QUESTION,
    {"role": "assistant", "content": "Yes."},
    *_QUESTION,
]
_TOOL = {"type": "function", "function": {"name": "f", "description": "g", "parameters": {"type": "object"}}}


class NoSentinelsError(ValueError):
    """The model has no vocabulary ids to spare, or those that were chosen serve for something else."""


@dataclass(frozen=True, slots=True)
class Sentinels:
    """Token ids that end a request when its last segment is erased (`erase`) and when it is complete (`finish`).

    `tokens`: their texts; None for an embedding row that no token has. `origin`: why these, in a few words.
    """

    erase: int
    finish: int
    tokens: tuple[str | None, str | None]
    origin: str

    @property
    def ids(self) -> tuple[int, int]:
        return self.erase, self.finish

    def __str__(self) -> str:
        named = (f"{i} ({token or 'no token'})" for i, token in zip(self.ids, self.tokens, strict=True))
        return f"{', '.join(named)}: {self.origin}"


def model_sentinels(model: ModelConfig) -> Sentinels:
    """The sentinels that an engine on `model` will use. Reads its files, weights excepted; starts no engine.

    Raises:
        NoSentinelsError: there are none, or those in `model.sentinel_ids` are not usable; says what to do.
        OSError, ValueError: as transformers raises for files that are missing or damaged.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    options: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    config = AutoConfig.from_pretrained(model.path, **options)
    tokenizer = AutoTokenizer.from_pretrained(model.path, **options)
    try:
        generation = GenerationConfig.from_pretrained(model.path, revision=model.revision or "main").to_dict()
    except OSError:
        generation = {}  # A model without generation_config.json: its config says all.
    text = config.get_text_config()
    used = _configured_ids(generation) | _configured_ids(config.to_dict()) | _configured_ids(text.to_dict())
    return find_sentinels(text.vocab_size, tokenizer, model.sentinel_ids, used)


def find_sentinels(
    vocabulary_size: int,
    tokenizer: Any,
    chosen: tuple[int, int] | None = None,
    configured: dict[int, str] | None = None,
) -> Sentinels:
    """Two token ids for a model with `vocabulary_size` embedding rows.

    In this order: the user's choice, embedding rows that no token has, special tokens whose names say that they are
    reserved, other special tokens that nothing uses. `configured`: ids that the model's configuration gives a use.

    Raises:
        NoSentinelsError: there are none, or the choice is not usable; the message says what to set.
    """
    uses = {**_tokenizer_uses(tokenizer), **(configured or {})}
    if chosen is not None:
        _check_choice(vocabulary_size, tokenizer, chosen, uses)
        return Sentinels(*chosen, _texts(tokenizer, chosen), "as the settings say")
    tokens = set(tokenizer.get_vocab().values())
    markers = _markers(tokenizer, vocabulary_size)
    rows = [row for row in range(vocabulary_size - 1, -1, -1) if row not in tokens and row not in uses][:2]
    unused = {token_id: name for token_id, name in markers.items() if token_id not in uses}
    reserved = [token_id for token_id, name in unused.items() if _RESERVED.search(name)]
    others = [i for i, name in unused.items() if i not in reserved and not _GENERATED.search(name)]
    found = [*rows, *reserved[::-1], *others[::-1]][:2]
    if len(found) == 2:
        erase, finish = sorted(found)
        origin = "embedding rows that no token has" if len(rows) == 2 else "special tokens that nothing uses"
        return Sentinels(erase, finish, _texts(tokenizer, (erase, finish)), origin)
    spare = len(rows) + len(reserved) + len(others)
    candidates = [f"{i} ({name})" for i, name in unused.items()] + [f"{row} (no token)" for row in rows]
    in_use = [f"{i} ({name}: {uses[i]})" for i, name in markers.items() if i in uses]
    raise NoSentinelsError(
        f"erasure needs two token ids that responses never hold, but the model has {vocabulary_size} embedding rows "
        f"for a tokenizer of {len(tokenizer)} tokens, and {spare} of them {'is' if spare == 1 else 'are'} known to be "
        f"unused; {_advice(candidates, in_use)}"
    )


def _advice(candidates: list[str], in_use: list[str]) -> str:
    """What who reads of missing sentinels can do."""
    if len(candidates) >= 2:
        more = f" and {len(candidates) - LISTED} more" if len(candidates) > LISTED else ""
        return (
            "if this model never generates two of these, name them in model.sentinel_ids, or with --sentinel-ids of "
            f"the server: {', '.join(candidates[:LISTED])}{more}"
        )
    return (
        "add two special tokens to the tokenizer and rows for them to the model (tokenizer.add_special_tokens, "
        "model.resize_token_embeddings), or name two ids in model.sentinel_ids, or with --sentinel-ids of the "
        f"server; special tokens in use: {', '.join(in_use[:LISTED]) or 'none'}"
    )


def _check_choice(vocabulary_size: int, tokenizer: Any, chosen: tuple[int, int], uses: dict[int, str]) -> None:
    erase, finish = chosen
    if erase == finish:
        raise NoSentinelsError(f"model.sentinel_ids must be two different ids, not {erase} twice")
    tokens = set(tokenizer.get_vocab().values())
    added = tokenizer.added_tokens_decoder
    for token_id in chosen:
        if not 0 <= token_id < vocabulary_size:
            raise NoSentinelsError(f"sentinel id {token_id} is not among the model's {vocabulary_size} embedding rows")
        special = added.get(token_id)
        if token_id in tokens and (special is None or not special.special):
            raise NoSentinelsError(
                f"sentinel id {token_id} is the ordinary token {tokenizer.decode([token_id])!r}, "
                "which responses may contain"
            )
        if token_id in uses:
            name = f"the token {special.content!r}" if special is not None else "a row"
            raise NoSentinelsError(f"sentinel id {token_id} is {name} that the model uses ({uses[token_id]})")


def _markers(tokenizer: Any, vocabulary_size: int) -> dict[int, str]:
    """The added tokens that are special and look like markers, not like text: ids in order, with their texts."""
    return {
        token_id: token.content
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and token_id < vocabulary_size and _MARKER.fullmatch(token.content)
    }


def _texts(tokenizer: Any, ids: tuple[int, int]) -> tuple[str | None, str | None]:
    erase, finish = (tokenizer.convert_ids_to_tokens(token_id) for token_id in ids)
    return erase, finish


def _configured_ids(settings: dict[str, Any]) -> dict[int, str]:
    """Ids in the settings that name tokens (`eos_token_id`, `image_token_index`, ...), with the setting's name."""
    ids: dict[int, str] = {}
    for name, value in settings.items():
        if re.search(r"token_(id|ids|index)$", name):
            for entry in value if isinstance(value, list) else [value]:
                if isinstance(entry, int) and not isinstance(entry, bool):
                    ids[entry] = name
    return ids


def _tokenizer_uses(tokenizer: Any) -> dict[int, str]:
    """Special tokens that the tokenizer or its chat template gives a use, with a few words on which."""
    uses: dict[int, str] = {}
    for use, ids in (("it occurs in text", tokenizer(_TEXT)["input_ids"]), *_template_ids(tokenizer)):
        uses |= dict.fromkeys(ids, use)
    templates = tokenizer.chat_template or ""
    text = "\n".join(templates.values()) if isinstance(templates, dict) else str(templates)
    listed = {str(token) for token in getattr(tokenizer, "extra_special_tokens", None) or []}
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.content in text:
            uses[token_id] = "the chat template names it"
        elif token.content in listed and not _RESERVED.search(token.content):
            uses[token_id] = "the tokenizer lists it among those of the model"
    for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"):
        token_id = getattr(tokenizer, f"{name}_token_id", None)
        if token_id is not None:
            uses[token_id] = f"{name}_token"
    return uses


def _template_ids(tokenizer: Any) -> Iterator[tuple[str, list[int]]]:
    """Tokens of conversations through each chat template."""
    templates = tokenizer.chat_template or {}
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        for messages in (_QUESTION, _CONVERSATION):
            for options in ({}, {"tools": [_TOOL]}, {"enable_thinking": False}):
                try:
                    text = tokenizer.apply_chat_template(
                        messages, chat_template=template, tokenize=False, add_generation_prompt=True, **options
                    )
                except Exception:
                    continue  # A template refuses what it has no place for, with errors of any kind.
                yield "the chat template writes it", tokenizer(text, add_special_tokens=False)["input_ids"]
