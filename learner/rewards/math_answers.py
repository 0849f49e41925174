"""Mathematical answers: whether a response's final answer equals the reference, by `math-verify`."""

import logging
import re
from collections.abc import Iterable

from learner.data import Row
from learner.errors import InputError
from learner.rewards.base import RewardItem, UnusableAnswerError
from learner.rewards.worker_process import Loaded

_MARKUP = re.compile(r"\\boxed|[\s${}]")


def check_answers(rows: Iterable[Row]) -> None:
    """Raise InputError for reference answers that hold nothing. What else can't be read shows when it is drawn."""
    empty = [row.id for row in rows if not _MARKUP.sub("", row.answer)]
    if empty:
        raise InputError(
            f"reward.kind 'math' needs an answer to every prompt: {len(empty)} have none, "
            f"{', '.join(map(repr, empty[:3]))}{', ...' if len(empty) > 3 else ''}"
        )


def load_math() -> Loaded:
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
    return Loaded(score)


def _as_latex(answer: str) -> str:
    """Data sets hold bare answers; math-verify looks for marked-up ones."""
    return answer if "$" in answer or "\\boxed" in answer else f"\\boxed{{{answer}}}"
