"""The bytes that each token adds to a text.

Text is searched in bytes: a character may be spread over several tokens, and a delimiter too.
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

Chain = Callable[[str], bytes]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNDECODED = b"\xff"
"""Stands for what only tells its characters together with other tokens; no UTF-8 text holds it."""

_ANCHOR = "a"


def token_bytes(tokenizer: Any) -> list[bytes]:
    """For each token id of a Hugging Face tokenizer, the bytes that it adds to a text that holds something already.

    Joined, those of any tokens are the UTF-8 text that the tokenizer decodes them to, special tokens included; but what
    a tokenizer takes away at a text's very start (a space, often) is there. An id without a token adds nothing.
    Byte-level and sentencepiece tokenizers are known; any other is asked for the text of each token after another one,
    and where such a text is not whole characters, it matches nothing.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    result = [b""] * (max(vocabulary.values(), default=-1) + 1)
    chain = _decoder(getattr(tokenizer, "backend_tokenizer", None))
    if chain is None:
        ids = sorted(vocabulary.values())
        for token_id, text in zip(ids, _texts_after_another(tokenizer, ids), strict=True):
            result[token_id] = text.encode("utf-8").replace("\ufffd".encode(), _UNDECODED)
        return result
    for token, token_id in vocabulary.items():
        result[token_id] = chain(token)
    return result


def _decoder(backend: Any) -> Chain | None:
    """How a tokenizer of the `tokenizers` library turns one token into bytes; None if that takes its neighbours."""
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return None
    described: dict[str, Any] = json.loads(decoder.__getstate__())
    steps = described["decoders"] if described["type"] == "Sequence" else [described]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] or set(kinds) == {"ByteLevel", "Fuse"}:
        return _of_byte_level
    if kinds == ["Metaspace"]:
        marker = steps[0]["replacement"]
        return lambda token: token.replace(marker, " ").encode("utf-8")
    return _of_sentencepiece(steps, kinds)


def _of_byte_level(token: str) -> bytes:
    """One character a byte; a token with any other character is its own text."""
    alphabet = _byte_alphabet()
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes of Latin-1 are themselves, the others follow from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + place): byte for place, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


def _of_sentencepiece(steps: Sequence[dict[str, Any]], kinds: Sequence[str]) -> Chain | None:
    """Text replaced in each token, bytes as `<0xNN>`, and at the end nothing but a strip at the whole text's ends."""
    joined = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    replaced = [step for step in steps[:joined] if step["type"] == "Replace"]
    if set(kinds[:joined]) - {"Replace", "ByteFallback"} or set(kinds[joined:]) - {"Fuse", "Strip"}:
        return None
    if any("String" not in step["pattern"] for step in replaced):
        return None
    has_bytes = "ByteFallback" in kinds

    def decode(token: str) -> bytes:
        byte = _BYTE.fullmatch(token) if has_bytes else None
        if byte:
            return bytes([int(byte[1], 16)])
        for step in replaced:
            token = token.replace(step["pattern"]["String"], step["content"])
        return token.encode("utf-8")

    return decode


def _texts_after_another(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text of each token, given that another one is before it."""
    anchor = tokenizer(_ANCHOR, add_special_tokens=False)["input_ids"]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(anchor, **options)
    texts = tokenizer.batch_decode([[*anchor, token_id] for token_id in token_ids], **options)
    return [text.removeprefix(before) for text in texts]
