"""The bytes of tokens, joined, are the text that the tokenizer itself decodes, over tokenizers of every usual kind."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from common.token_bytes import token_bytes
from tests.models import EVERYDAY_TEXT, byte_tokenizer, everyday_tokenizer

TEXTS = st.text(st.sampled_from("ab .\n</think>é日本😀▁ĠČ\u00a0\x00") | st.characters(codec="utf-8"), max_size=20)


def fast(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **options)


def byte_level() -> PreTrainedTokenizerFast:
    """With added tokens that the byte alphabet has, does not have, and has for another byte."""
    tokenizer = everyday_tokenizer()
    tokenizer.add_tokens(["</think>", "two words", "é", "\u0120x", AddedToken("日本", normalized=False)])
    return tokenizer


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2: a space is written as a low line, what has no token as bytes, and the first space is taken away."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *alphabet])
    tokenizer.train_from_iterator([EVERYDAY_TEXT.replace("日", "")], trainer)
    # Bytes are tokens of the model, not added ones: the trainer knows no other way to name them.
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    merges = [tuple(pair) for pair in _model(tokenizer)["merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = tokenizer.normalizer
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _model(tokenizer: Tokenizer) -> dict[str, Any]:
    import json

    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


def metaspace() -> PreTrainedTokenizerFast:
    """As T5: Unigram, without bytes."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=["<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(EVERYDAY_TEXT.splitlines(), trainer)
    return fast(tokenizer, unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT: a decoder that looks at the tokens beside it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"])
    tokenizer.train_from_iterator(EVERYDAY_TEXT.splitlines(), trainer)
    return fast(tokenizer, unk_token="[UNK]")


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": lambda: byte_tokenizer(64),
    "byte level": byte_level,
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
    "word piece": word_piece,
}


@cache
def made(kind: str) -> tuple[PreTrainedTokenizerFast, list[bytes]]:
    tokenizer = KINDS[kind]()
    return tokenizer, token_bytes(tokenizer)


def decoded(tokenizer: Any, token_ids: list[int]) -> str:
    """What the tokens add to a text that is not empty, by the tokenizer itself."""
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    before = tokenizer.decode(anchor)
    text: str = tokenizer.decode([*anchor, *token_ids])
    assert text.startswith(before)
    return text[len(before) :]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(text=TEXTS)
def test_tokens_of_a_text_join_to_what_is_decoded(kind: str, text: str) -> None:
    tokenizer, table = made(kind)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(table[i] for i in ids).decode("utf-8", "replace") == decoded(tokenizer, ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(data=st.data())
def test_any_tokens_join_to_what_is_decoded(kind: str, data: st.DataObject) -> None:
    tokenizer, table = made(kind)
    assert len(table) == len(tokenizer)
    ids = data.draw(st.lists(st.integers(0, len(table) - 1), max_size=12))
    joined = b"".join(table[i] for i in ids)
    try:
        assert joined.decode("utf-8") == decoded(tokenizer, ids)
    except UnicodeDecodeError:
        # Of bytes that are no text each decoder shows something else; these two show what Python does.
        if kind in ("bytes", "byte level"):
            assert joined.decode("utf-8", "replace") == decoded(tokenizer, ids)


def test_characters_and_delimiters_are_spread_over_tokens() -> None:
    """The fixtures have what they are for."""
    tokenizer, table = made("byte level")
    for text in ("It is so. Then", "a\n\nb", "数"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) > 1
    assert not any(b". " in text for text in table)
    plain, table = made("sentencepiece")
    ids = plain("日", add_special_tokens=False)["input_ids"]
    assert [len(table[i]) for i in ids][-3:] == [1, 1, 1]


def test_a_row_without_a_token_adds_nothing() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 3, "<unk>": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.ByteLevel()
    assert token_bytes(fast(tokenizer, unk_token="<unk>")) == [b"a", b"", b"", b"b", b"<unk>"]
