"""Mathematical answers: whether a response's final answer equals the reference, compared by `math-verify`."""

import logging
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from learner.environments.records import BadRowError
from learner.environments.rewards.base import Reading, RewardItem, UnusableAnswerError
from learner.environments.rewards.descriptions import described, shown
from learner.environments.rewards.final_answer import final_answers, reference_answer
from learner.environments.rewards.math_notation import latex, words
from learner.environments.rewards.math_numbers import equal_numbers, is_too_large, places, with_imaginary_unit
from learner.environments.rewards.worker_process import Loaded
from learner.environments.rows import Row
from learner.run.errors import InputError

LONGEST_ANSWER = 1000
DEEPEST_ANSWER = 20
MEMORY_BYTES = 8 * 1024**3
"""Address space of a worker that compares: what escapes the limits above fails with a MemoryError."""

log = logging.getLogger(__name__)

_MARKUP = re.compile(r"\\boxed|[\s${}]")
_BASED = re.compile(r"([0-9A-Za-z]{1,100})_\{?(\d{1,2})\}?")
_SPACED_DIGITS = re.compile(r"(?<![_\d])\d+\s+\d")


def check_answer(row: Row) -> None:
    """Raise BadRowError for a reference answer that holds nothing. What else can't be read shows when it is drawn."""
    if not _MARKUP.sub("", row.answer):
        raise BadRowError("reward.kind 'math' needs an answer, and it is empty")


def load_math() -> Loaded:
    """A function that gives 1 to responses whose final answer equals the reference. For a worker process."""
    # It warns at each call that its own time limits are off, which they are: the process is killed from outside.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES if most < 0 else min(MEMORY_BYTES, most), most))
    try:
        compare = answer_comparison()
    except ModuleNotFoundError as error:
        raise InputError(f"the math reward needs the package math-verify: {error}") from error

    def score(item: RewardItem) -> float:
        return float(compare(item.answer, item.response))

    # The first comparison loads sympy's grammar, which can take seconds: no response's time limit should pay for that.
    score(RewardItem("", "", r"\boxed{\frac{1}{2}}", "0.5"))
    return Loaded(score, Reading(frozenset(), "response, answer"))


def answer_comparison() -> Callable[[str, str], bool]:
    """A function of reference and response. It raises UnusableAnswerError for a reference that holds no answer."""
    import math_verify

    # Units are left to `math_notation`: math-verify takes the letters of 2t, 3m and 5d for units.
    default = math_verify.LatexExtractionConfig()
    without_units = replace(default.normalization_config, units=False)
    extraction = [replace(default, boxed_match_priority=0, normalization_config=without_units)]

    def parsed(text: str) -> Any:
        """The answer as a sympy object; None if it can't be read as one."""
        if len(text) > LONGEST_ANSWER or _depth(text) > DEEPEST_ANSWER or _SPACED_DIGITS.search(text):
            return None
        found = math_verify.parse(f"\\boxed{{{text}}}", extraction, fallback_mode="no_fallback", parsing_timeout=0)
        return found[0] if found else None

    def equal(reference: str, answer: str) -> bool:
        if len(answer) > LONGEST_ANSWER:
            return answer.strip() == reference.strip()
        if words(reference) == words(answer) != "":
            return True
        (gold_text, gold_unit), (text, unit) = latex(reference), latex(answer)
        if gold_unit and unit and "?" not in gold_unit + unit and gold_unit != unit:
            return False
        if equal_values(gold_text, text):
            return True
        # 50% is 50 where the question asks for percent, and 0.5 elsewhere.
        gold_percent, percent = gold_unit == "%" != unit, unit == "%" != gold_unit
        return (gold_percent and equal_values(_hundredth(gold_text), text)) or (
            percent and equal_values(gold_text, _hundredth(text))
        )

    def equal_values(gold_text: str, text: str) -> bool:
        bases = [_based(value) for value in (gold_text, text)]
        if any(bases):
            return (bases[0] or gold_text) == (bases[1] or text)
        gold, found = parsed(gold_text), parsed(text)
        if gold is None or found is None:
            return False
        if is_too_large(gold) or is_too_large(found):
            return bool(gold == found)
        gold, found = with_imaginary_unit(gold), with_imaginary_unit(found)
        same = equal_numbers(gold, found)
        if same is not None:
            return same
        rounding = places(gold, found)
        return bool(math_verify.verify(gold, found, rounding, allow_set_relation_comp=True, timeout_seconds=None))

    def tried(reference: str, answer: str) -> bool:
        """As `equal`. What fails is a response that nothing can be made of."""
        try:
            return equal(reference, answer)
        except Exception as error:
            log.warning("%s is not compared with %s: %s", shown(answer), shown(reference), described(error))
            return False

    def compare(reference: str, response: str) -> bool:
        wanted = reference_answer(reference)
        if not _MARKUP.sub("", wanted):
            raise UnusableAnswerError(f"there is no answer in the reference {reference!r:.80}")
        return any(tried(wanted, answer) for answer in final_answers(response))

    return compare


def _hundredth(text: str) -> str:
    return rf"\frac{{{text}}}{{100}}"


def _based(text: str) -> str | None:
    """The value of a number in another base, such as 1010_2; None if it is none."""
    match = _BASED.fullmatch(text)
    if match is None or not 2 <= int(match[2]) <= 36:
        return None
    try:
        return str(int(match[1], int(match[2])))
    except ValueError:
        return None


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest
