"""Sentinel tokens: two vocabulary ids that the tokenizer never produces, which end a request when forced."""

from typing import Any


class NoSentinelsError(ValueError):
    """The model has no vocabulary ids to spare."""


def find_sentinels(vocabulary_size: int, tokenizer: Any, chosen: tuple[int, int] | None = None) -> tuple[int, int]:
    """Two token ids (erase, finish) for a model with `vocabulary_size` embedding rows.

    In this order: the user's choice, embedding rows above the tokenizer's length, reserved special tokens.

    Raises:
        NoSentinelsError: there are none, or the choice is not usable; the message says what to set.
    """
    if chosen is not None:
        return _checked(vocabulary_size, tokenizer, chosen)
    length = len(tokenizer)
    if vocabulary_size - length >= 2:
        return vocabulary_size - 2, vocabulary_size - 1
    reserved = sorted(
        token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special and "reserved" in token.content.lower() and token_id < vocabulary_size
    )
    if len(reserved) >= 2:
        return reserved[-2], reserved[-1]
    raise NoSentinelsError(
        f"erasure needs two token ids that the tokenizer never produces, but the model has {vocabulary_size} "
        f"embedding rows for a tokenizer of {length} tokens and {len(reserved)} reserved special tokens; "
        "name two unused ids in model.sentinel_ids, or with --sentinel-ids of the server"
    )


def _checked(vocabulary_size: int, tokenizer: Any, chosen: tuple[int, int]) -> tuple[int, int]:
    erase, finish = chosen
    if erase == finish:
        raise NoSentinelsError(f"model.sentinel_ids must be two different ids, not {erase} twice")
    for token_id in chosen:
        if not 0 <= token_id < vocabulary_size:
            raise NoSentinelsError(f"sentinel id {token_id} is not among the model's {vocabulary_size} embedding rows")
        if token_id < len(tokenizer) and token_id not in tokenizer.all_special_ids:
            raise NoSentinelsError(
                f"sentinel id {token_id} is the ordinary token {tokenizer.decode([token_id])!r}, "
                "which responses may contain"
            )
    return erase, finish
