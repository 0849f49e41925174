"""Rewards that run in worker processes: `math-verify` and a user's own function."""

import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from learner.data import Row
from learner.errors import InputError
from learner.rewards.base import RewardError, RewardItem, Scores, UnusableAnswerError
from learner.rewards.workers import Outcome, RewardFunction, WorkerPool

log = logging.getLogger(__name__)

MOST_WORKERS = 8
_MARKUP = re.compile(r"\\boxed|[\s${}]")


class WorkerRewards:
    """A reward function in worker processes. What is not ready in time gets 0, is counted and logged."""

    def __init__(self, load: Callable[[], RewardFunction], name: str, timeout_seconds: float) -> None:
        self._name = name
        self._timeout_seconds = timeout_seconds
        self._pool = WorkerPool(load, min(MOST_WORKERS, os.cpu_count() or 1))

    async def start(self) -> None:
        outcome = await self._pool.start()
        if outcome.error is not None:
            raise InputError(f"reward {self._name}: {outcome.error}")

    async def score(self, items: Sequence[RewardItem]) -> Scores:
        outcomes = await self._pool.call(items, self._timeout_seconds)
        values = [self._value(item, outcome) for item, outcome in zip(items, outcomes, strict=True)]
        timeouts = sum(outcome.timed_out for outcome in outcomes)
        if items and timeouts == len(items):
            raise RewardError(
                f"none of the {len(items)} calls of {self._name} was ready within "
                f"{self._timeout_seconds:g} s (reward.timeout_seconds)"
            )
        return Scores(values, timeouts)

    async def close(self) -> None:
        self._pool.close()

    def _value(self, item: RewardItem, outcome: Outcome) -> float:
        if outcome.timed_out:
            log.warning(
                "reward %s: prompt %r not ready within %g s, so its reward is 0",
                self._name,
                item.prompt_id,
                self._timeout_seconds,
            )
            return 0.0
        if outcome.error is not None:
            log.error("reward %s, prompt %r:\n%s", self._name, item.prompt_id, outcome.traceback)
            raise RewardError(f"reward {self._name}, prompt {item.prompt_id!r}: {outcome.error}")
        if outcome.warning:
            log.warning("reward %s: prompt %r: %s, so its reward is 0", self._name, item.prompt_id, outcome.warning)
        return float(outcome.value)


def check_answers(rows: Iterable[Row]) -> None:
    """Raise InputError for reference answers that hold nothing. What else can't be read shows when it is drawn."""
    empty = [row.id for row in rows if not _MARKUP.sub("", row.answer)]
    if empty:
        raise InputError(
            f"reward.kind 'math' needs an answer to every prompt: {len(empty)} have none, "
            f"{', '.join(map(repr, empty[:3]))}{', ...' if len(empty) > 3 else ''}"
        )


def math_rewards(timeout_seconds: float) -> WorkerRewards:
    """1 if `math-verify` finds the response's answer equal to the reference, else 0."""
    return WorkerRewards(load_math, "math-verify", timeout_seconds)


def function_rewards(function: str, timeout_seconds: float) -> WorkerRewards:
    """A user's `module:function`; modules in the working directory are found, as with `python -m`."""
    return WorkerRewards(partial(load_function, function), function, timeout_seconds)


def load_function(name: str) -> RewardFunction:
    """The user's function as one that takes a `RewardItem`. Raises InputError that says what is missing."""
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"there is no module {error.name!r} in the working directory or on the Python path") from error
    except Exception as error:
        raise InputError(f"module {module_name!r} fails to import: {type(error).__name__}: {error}") from error
    function: Any = getattr(module, attribute, None)
    if function is None:
        own = {k: v for k, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__}
        functions = [key for key, value in own.items() if callable(value) and key[0] != "_"]
        raise InputError(
            f"module {module_name!r} has no {attribute!r}; it has {', '.join(functions) or 'no functions'}"
        )
    if not callable(function):
        raise InputError(f"{attribute!r} of module {module_name!r} is a {type(function).__name__}, no function")
    return lambda item: function(item.prompt, item.response, item.answer)


def load_math() -> RewardFunction:
    """A function that compares a response's final answer with the reference by `math-verify`."""
    try:
        import math_verify
    except ModuleNotFoundError as error:
        raise InputError(f"the math reward needs the package math-verify: {error}") from error

    # It warns at each call that its own time limits are off, which they are: the process is killed from outside.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # A boxed answer is what a response is asked for, so it goes before any other expression in the text.
    boxed_first = [
        math_verify.LatexExtractionConfig(boxed_match_priority=0),
        math_verify.ExprExtractionConfig(),
    ]

    def score(item: RewardItem) -> float:
        reference = math_verify.parse(_as_latex(item.answer), parsing_timeout=0)
        if not reference:
            raise UnusableAnswerError(f"math-verify finds no expression in the reference answer {item.answer!r:.80}")
        answer = math_verify.parse(item.response, extraction_config=boxed_first, parsing_timeout=0)
        return float(math_verify.verify(reference, answer, timeout_seconds=None))

    # The first comparison loads sympy's grammar, which can take seconds: no response's time limit should pay for that.
    score(RewardItem("", "", r"\boxed{\frac{1}{2}}", "0.5"))
    return score


def _as_latex(answer: str) -> str:
    """Data sets hold bare answers; math-verify looks for marked-up ones."""
    return answer if "$" in answer or "\\boxed" in answer else f"\\boxed{{{answer}}}"
