"""What a user's reward function is called with, and what it may return; no process is started here."""

import functools
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from learner.environments.rewards.base import RewardItem
from learner.environments.rewards.descriptions import described
from learner.environments.rewards.number import NoNumberError, as_reward
from learner.environments.rewards.user_function import load_function
from learner.run.errors import InputError

ITEM = RewardItem("p", "the prompt", "the response", "the answer", 3, "length", (7, 8), {"level": 5, "note": "n"})
ITEM_TEXTS = ("the prompt", "the response", "the answer")
COLUMNS = ("level", "note")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Load a function as if a user's module held it."""

    def load(function: Any) -> Any:
        module = types.ModuleType("users_module")
        module.function = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "users_module", module)
        return load_function("users_module:function", COLUMNS)

    return load


class CallableObject:
    def __call__(self, response: str, level: int) -> Any:
        return response, level


def everything(**given: Any) -> Any:
    return given


def first_three(*given: Any) -> Any:
    return given


def first_three_and_more(*given: Any, level: int) -> Any:
    return given, level


def partly(prompt: str, completion: str, truth: str, level: int = 0) -> Any:
    return prompt, completion, truth, level


@pytest.mark.parametrize(
    ("function", "result", "columns"),
    [
        (lambda prompt, response, answer: (prompt, response, answer), ITEM_TEXTS, set()),
        (lambda answer, prompt, response: (prompt, response, answer), ITEM_TEXTS, set()),
        (lambda a, b, c: (a, b, c), ITEM_TEXTS, set()),
        (lambda a, b, c, /: (a, b, c), ITEM_TEXTS, set()),
        (first_three, ITEM_TEXTS, set()),
        (first_three_and_more, (ITEM_TEXTS, 5), {"level"}),
        (partly, (*ITEM_TEXTS, 5), {"level"}),
        (functools.partial(partly, level=9), (*ITEM_TEXTS, 5), {"level"}),
        (lambda response: response, "the response", set()),
        (lambda *, note, level: (level, note), (5, "n"), {"level", "note"}),
        (lambda level, other="kept": (level, other), (5, "kept"), {"level"}),
        (lambda row, sample: (row["level"], sample), (5, 3), None),
        (
            lambda token_ids, finish_reason, prompt_id: (token_ids, finish_reason, prompt_id),
            ((7, 8), "length", "p"),
            set(),
        ),
        (CallableObject(), ("the response", 5), {"level"}),
    ],
)
def test_a_function_gets_what_its_parameters_name(
    loaded: Callable[[Any], Any], function: Any, result: Any, columns: set[str] | None
):
    found = loaded(function)
    assert found.function(ITEM) == result
    # Rows are kept in memory for so much only.
    assert found.reading.columns == columns


def test_keywords_of_any_name_get_all_there_is(loaded: Callable[[Any], Any]):
    found = loaded(everything)
    assert found.reading.columns is None
    given = found.function(ITEM)
    assert given["level"] == 5
    assert given["prompt"] == "the prompt"
    assert given["token_ids"] == (7, 8)


def test_only_what_is_asked_for_is_fetched_and_tokens_come_as_a_list(loaded: Callable[[Any], Any]):
    assert not loaded(lambda prompt, response, answer: 0.0).reading.tokens
    asking = loaded(lambda token_ids: token_ids)
    assert asking.reading.tokens
    assert loaded(everything).reading.tokens
    tokens = asking.function(replace(ITEM, token_ids=np.array([7, 8], np.int32)))
    assert tokens == [7, 8]
    assert {type(token) for token in tokens} == {int}


def test_a_column_that_a_row_lacks_is_the_default_or_none(loaded: Callable[[Any], Any]):
    bare = RewardItem("p", "q", "r", "a")
    assert loaded(lambda level, note="-": (level, note)).function(bare) == (None, "-")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda response, levle: 0.0, ["'levle', which there is not", "finish_reason", "columns level, note"]),
        # The names say that its parameters are not prompt, response and answer in this order.
        (lambda response, answer, levle: 0.0, ["'levle', which there is not"]),
        (lambda a, b, c, d: 0.0, ["'d', which there is not"]),
        (lambda a, b, /: 0.0, ["'a' by its place only"]),
    ],
)
def test_a_parameter_that_there_is_nothing_for_is_refused(
    loaded: Callable[[Any], Any], function: Any, words: list[str]
):
    with pytest.raises(InputError) as caught:
        loaded(function)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("value", "reward"),
    [
        (1, 1.0),
        (0.25, 0.25),
        (-3, -3.0),
        (True, 1.0),
        (Fraction(1, 4), 0.25),
        (Decimal("0.25"), 0.25),
        (np.float32(0.5), 0.5),
        (np.int64(2), 2.0),
        (np.bool_(True), 1.0),
        (np.array(0.5), 0.5),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (torch.tensor(True), 1.0),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    ],
)
def test_numbers_of_every_kind_are_rewards(value: Any, reward: float):
    found = as_reward(value)
    assert found == reward
    assert type(found) is float


class Unreadable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("0.5", "returned '0.5' (str), which is not a number"),
        (b"1", "which is not a number"),
        (None, "returned None, which is not a number: does it `return` on every way through?"),
        (float("nan"), "returned nan, which is not a finite number"),
        (float("inf"), "returned inf"),
        (np.float32("nan"), "returned nan"),
        (torch.tensor(float("-inf")), "returned -inf"),
        (Decimal("Infinity"), "returned inf"),
        (10**400, "returned a number of kind int that is too large"),
        (Fraction(10**400), "too large"),
        (1e30, "returned 1e+30, which is beyond 1e+15"),
        (1j, "which is not a number"),
        ([0.5], "returned [0.5] (list), which is not a number"),
        ({"score": 1}, "which is not a number"),
        (np.array([0.5]), "returned a value of kind ndarray and shape (1,), which is not one number"),
        (torch.zeros(2, 2), "returned a value of kind Tensor and shape (2, 2), which is not one number"),
        (np.array("0.5"), "which is not a number"),
        (float, "which is not a number"),
        (Unreadable(), "returned a Unreadable whose repr raises RuntimeError"),
        ("\ud800", r"returned '\ud800' (str)"),
        ("x" * 1000, "x..."),
    ],
)
def test_what_is_no_number_is_refused_in_words(value: Any, words: str):
    with pytest.raises(NoNumberError) as caught:
        as_reward(value)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 300
    str(caught.value).encode()


def test_exceptions_are_described_in_text_that_can_be_written():
    assert described(KeyError("a")) == "KeyError: 'a'"
    assert described(ValueError()) == "ValueError"
    assert described(ValueError("\udcff")) == "ValueError: \\udcff"
    assert len(described(ValueError("x" * 10**6))) < 2000
