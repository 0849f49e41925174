"""Which token ids may serve as sentinels."""

from pathlib import Path

import pytest

from rollout_server.sentinels import NoSentinelsError, find_sentinels
from tests.models import TOKENIZER_LENGTH, byte_tokenizer


def test_embedding_rows_above_the_tokenizer_come_first() -> None:
    assert find_sentinels(320, byte_tokenizer(256)) == (318, 319)


def test_reserved_special_tokens_come_next() -> None:
    tokenizer = byte_tokenizer(256)
    names = [f"<|reserved_special_token_{n}|>" for n in range(3)]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    expected = tuple(tokenizer.convert_tokens_to_ids(names[-2:]))
    assert find_sentinels(len(tokenizer), tokenizer) == expected


def test_a_model_without_spare_ids_is_refused_with_what_to_set() -> None:
    with pytest.raises(NoSentinelsError, match=rf"{TOKENIZER_LENGTH} embedding rows.*model\.sentinel_ids"):
        find_sentinels(TOKENIZER_LENGTH, byte_tokenizer(256))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [((300, 300), "different"), ((300, 320), "not among"), ((97, 300), "ordinary token")],
)
def test_an_unusable_choice_is_refused(chosen: tuple[int, int], message: str) -> None:
    with pytest.raises(NoSentinelsError, match=message):
        find_sentinels(320, byte_tokenizer(256), chosen)


def test_a_usable_choice_wins(tmp_path: Path) -> None:
    assert find_sentinels(320, byte_tokenizer(256), (260, 300)) == (260, 300)
