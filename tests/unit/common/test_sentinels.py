"""Which token ids may serve as sentinels."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.config.run import ModelConfig
from common.sentinels import NoSentinelsError, find_sentinels, model_sentinels
from tests.models import (
    EVERYDAY_SPECIAL_TOKENS,
    TOKENIZER_LENGTH,
    byte_tokenizer,
    everyday_tokenizer,
)


def changed(model: Path, directory: Path, file: str, **values: Any) -> ModelConfig:
    """The model without its weights, with changes to one of its JSON files."""
    for source in model.iterdir():
        if source.suffix != ".safetensors":
            (directory / source.name).write_bytes(source.read_bytes())
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return ModelConfig(path=str(directory), max_length=64)


def test_embedding_rows_without_tokens_come_first() -> None:
    found = find_sentinels(320, byte_tokenizer(256))
    assert (found.ids, found.tokens) == ((318, 319), (None, None))


def test_reserved_special_tokens_come_next() -> None:
    tokenizer = byte_tokenizer(256)
    names = [f"<|reserved_special_token_{n}|>" for n in range(3)]
    tokenizer.add_special_tokens({"additional_special_tokens": [*names, "<|unknown_role|>", "<repo_name>"]})
    expected = tuple(tokenizer.convert_tokens_to_ids(names[-2:]))
    assert find_sentinels(len(tokenizer), tokenizer).ids == expected


def test_one_spare_row_and_one_special_token_are_enough() -> None:
    tokenizer = byte_tokenizer(256)
    tokenizer.add_tokens(["<repo_name>"], special_tokens=True)
    assert find_sentinels(len(tokenizer) + 1, tokenizer).ids == (TOKENIZER_LENGTH, TOKENIZER_LENGTH + 1)


def test_a_chat_model_without_spare_rows_gives_special_tokens_that_nothing_uses(everyday_model: Path) -> None:
    found = model_sentinels(ModelConfig(path=str(everyday_model), max_length=64))
    assert found.tokens == EVERYDAY_SPECIAL_TOKENS[-2:]
    assert found.ids == (11, 12)
    assert "11 (<jupyter_text>), 12 (<empty_output>)" in str(found)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("generation_config.json", {"eos_token_id": [2, 12]}),
        ("config.json", {"image_token_id": 12}),
        ("config.json", {"eos_token_id": [2, 12]}),
        ("tokenizer_config.json", {"mask_token": "<empty_output>"}),
        ("tokenizer_config.json", {"extra_special_tokens": ["<empty_output>"]}),
    ],
)
def test_what_the_model_uses_is_left_alone(
    everyday_model: Path, tmp_path: Path, file: str, values: dict[str, Any]
) -> None:
    model = changed(everyday_model, tmp_path, file, **values)
    assert model_sentinels(model).ids == (10, 11)
    with pytest.raises(NoSentinelsError, match="sentinel id 12 is the token '<empty_output>' that the model uses"):
        model_sentinels(model.model_copy(update={"sentinel_ids": (11, 12)}))


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}<empty_output>",
        "{% if tools is defined and tools %}{{ '<empty' + '_output>' }}{% endif %}{{ messages[-1].content }}",
        {"default": "{{ messages[0].content }}", "other": "<empty_output>"},
    ],
)
def test_what_a_chat_template_names_or_writes_is_left_alone(template: Any) -> None:
    tokenizer = everyday_tokenizer()
    tokenizer.chat_template = template
    assert find_sentinels(len(tokenizer), tokenizer).ids == (10, 11)


def test_special_tokens_that_models_generate_are_offered_but_not_taken() -> None:
    tokenizer = byte_tokenizer(256)
    tokenizer.add_tokens(["<|think|>", "<|tool_call|>"], special_tokens=True)
    ids = (TOKENIZER_LENGTH, TOKENIZER_LENGTH + 1)
    with pytest.raises(NoSentinelsError, match=rf"{ids[0]} \(<\|think\|>\), {ids[1]} \(<\|tool_call\|>\)"):
        find_sentinels(len(tokenizer), tokenizer)
    assert find_sentinels(len(tokenizer), tokenizer, ids).ids == ids


def test_special_tokens_that_read_like_text_do_not_serve() -> None:
    tokenizer = byte_tokenizer(256)
    tokenizer.add_tokens(["However", "\n\n"], special_tokens=True)
    with pytest.raises(NoSentinelsError, match="special tokens in use"):
        find_sentinels(len(tokenizer), tokenizer)


def test_a_model_without_spare_ids_is_refused_with_what_to_do() -> None:
    with pytest.raises(NoSentinelsError, match=rf"{TOKENIZER_LENGTH} embedding rows.*add_special.*model\.sentinel_ids"):
        find_sentinels(TOKENIZER_LENGTH, byte_tokenizer(256))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ((300, 300), "different"),
        ((300, 320), "not among"),
        ((-1, 300), "not among"),
        ((97, 300), "ordinary token"),
        ((256, 300), "uses"),
        ((300, 257), "uses"),
    ],
)
def test_an_unusable_choice_is_refused(chosen: tuple[int, int], message: str) -> None:
    with pytest.raises(NoSentinelsError, match=message):
        find_sentinels(320, byte_tokenizer(256), chosen)


def test_a_usable_choice_wins() -> None:
    assert find_sentinels(320, byte_tokenizer(256), (260, 300)).ids == (260, 300)
