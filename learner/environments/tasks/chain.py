"""Chains of single-digit operations modulo 10: a long-horizon task whose every written step can be checked.

A prompt lists the steps and ends with the start value, ``a+5b-8c×3:7``; the response works them out one a
line, ``a+5=2``, ``b-8=4``, ``c×3=2``. The start value comes last, so that nothing can be computed while the
steps are read. Every operation is a bijection of the ten digits (``×`` only by 3, 7 and 9): no later step
cancels an earlier error, so one wrong line makes every line after it wrong, and the answer, unless a second
slip happens to undo it.
"""

import hashlib
import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")

STEP_NAMES = string.ascii_lowercase
DEFAULT_LENGTH = 24
GENERATED_OPERANDS: dict[str, tuple[int, ...]] = {
    "+": (1, 2, 3, 4, 5, 6, 7, 8, 9),
    "-": (1, 2, 3, 4, 5, 6, 7, 8, 9),
    "×": (3, 7, 9),
}
# One problem in this many belongs to the test split.
TEST_SHARE = 8

_PROMPT = re.compile(r"((?:[a-z][-+×][0-9])+):([0-9])\n?")
_STEP = re.compile(r"([a-z])([-+×])([0-9])")


@dataclass(frozen=True, slots=True)
class ChainProblem:
    """One chain: its operations in order, as (symbol, operand), and the start value.

    Raises ValueError for anything outside the task: more than 26 steps, an unknown symbol, ``×`` by a number
    that is not coprime to 10, or a value that is not one digit.
    """

    operations: tuple[tuple[str, int], ...]
    start: int

    def __post_init__(self) -> None:
        if not 1 <= len(self.operations) <= len(STEP_NAMES):
            raise ValueError(f"a chain has 1 to {len(STEP_NAMES)} steps, not {len(self.operations)}")
        if not 0 <= self.start <= 9:
            raise ValueError(f"the start value is one digit, 0 to 9, not {self.start}")
        for symbol, operand in self.operations:
            if symbol not in GENERATED_OPERANDS:
                raise ValueError(f"unknown operation {symbol!r}: the task knows + - ×")
            if not 0 <= operand <= 9:
                raise ValueError(f"an operand is one digit, 0 to 9, not {operand}")
            if symbol == "×" and operand not in GENERATED_OPERANDS["×"]:
                raise ValueError(f"×{operand} can cancel an error: × is only by 3, 7 or 9")

    @property
    def prompt(self) -> str:
        """The prompt's text, ``a+5b-8:7`` and a newline."""
        return "".join(self._step_texts()) + f":{self.start}\n"

    @property
    def true_values(self) -> tuple[int, ...]:
        """The right result of every step."""
        values = []
        value = self.start
        for symbol, operand in self.operations:
            value = apply_operation(symbol, value, operand)
            values.append(value)
        return tuple(values)

    @property
    def solution(self) -> str:
        """The one right response: a line a step, each ended by a newline."""
        return self.response(self.true_values)

    def response(self, values: Sequence[int]) -> str:
        """Return the response that writes `values`, one a step, as the steps' results, right or wrong."""
        return "".join(f"{step}={value}\n" for step, value in zip(self._step_texts(), values, strict=True))

    def _step_texts(self) -> list[str]:
        return [
            f"{name}{symbol}{operand}" for name, (symbol, operand) in zip(STEP_NAMES, self.operations, strict=False)
        ]


@dataclass(frozen=True, slots=True)
class ChainCheck:
    """What a response got right.

    `correct`: every step is written, every one is right, and there is nothing else; the reward is 1 then,
    else 0. `complete`: every step is written in the right form, whatever its result, and there is nothing
    else. `step_right`: for each written line, at most one a step, whether it is that step with its TRUE
    result. A line that follows correctly from a wrong one is therefore wrong too. `first_wrong_step`: index
    of the first wrong line, None if no written line is wrong. `cascaded`: there is a first wrong step and
    every written step after it is wrong as well.
    """

    correct: bool
    complete: bool
    step_right: tuple[bool, ...]
    first_wrong_step: int | None
    cascaded: bool


def generate(seed: int, split: Split, count: int, length: int = DEFAULT_LENGTH) -> list[ChainProblem]:
    """Return `count` distinct problems of a split, the same for the same arguments everywhere.

    A hash of a problem's prompt decides its split, so that train and test share no problem whatever the
    seeds. A shorter list is the beginning of a longer one. Raises ValueError if the split has too few
    problems of that length.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    if not 1 <= length <= len(STEP_NAMES):
        raise ValueError(f"a chain has 1 to {len(STEP_NAMES)} steps, not {length}")
    choices = sum(len(operands) for operands in GENERATED_OPERANDS.values())
    in_split = 10 * choices**length * (1 if split == "test" else TEST_SHARE - 1) // TEST_SHARE
    if not 0 <= count <= in_split // 2:
        raise ValueError(
            f"cannot draw {count} distinct problems: the {split} split has about {in_split} of length "
            f"{length}, and at most half of them, {in_split // 2}, are given out"
        )
    # A string seed is hashed by the generator itself, the same way in every Python version and process.
    rng = random.Random(f"chain/{split}/{length}/{seed}")
    symbols = tuple(GENERATED_OPERANDS)
    problems: dict[ChainProblem, None] = {}
    while len(problems) < count:
        drawn = [rng.choice(symbols) for _ in range(length)]
        operations = tuple((symbol, rng.choice(GENERATED_OPERANDS[symbol])) for symbol in drawn)
        problem = ChainProblem(operations, rng.randrange(10))
        if split_of(problem) == split:
            problems[problem] = None
    return list(problems)


def split_of(problem: ChainProblem) -> Split:
    """Return the split that a problem belongs to."""
    digest = hashlib.blake2b(problem.prompt.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % TEST_SHARE == 0 else "train"


def parse_prompt(text: str) -> ChainProblem:
    """Read a problem back from its prompt's text, with or without the final newline.

    Raises ValueError, naming what a prompt looks like, for any other text.
    """
    match = _PROMPT.fullmatch(text)
    if match is None:
        raise ValueError(f"not a chain prompt: {text[:80]!r}; one looks like 'a+5b-8c×3:7'")
    steps = _STEP.findall(match[1])
    names = "".join(name for name, _, _ in steps)
    if not STEP_NAMES.startswith(names):
        raise ValueError(f"the steps of a chain are named a, b, c, ... in order, not {names!r}")
    operations = tuple((symbol, int(operand)) for _, symbol, operand in steps)
    return ChainProblem(operations, int(match[2]))


def check(problem: ChainProblem, response_text: str) -> ChainCheck:
    """Check a response, its text decoded without special tokens, step by step. Never raises on any text.

    The final newline may be missing, because chat clients strip it; any other difference counts.
    """
    written = response_text.removesuffix("\n").split("\n") if response_text else []
    expected = problem.solution.splitlines()
    step_right = tuple(line == right for line, right in zip(written, expected, strict=False))
    complete = len(written) == len(expected) and all(
        line[:-1] == right[:-1] and line[-1] in string.digits for line, right in zip(written, expected, strict=True)
    )
    first_wrong = step_right.index(False) if False in step_right else None
    return ChainCheck(
        correct=complete and all(step_right),
        complete=complete,
        step_right=step_right,
        first_wrong_step=first_wrong,
        cascaded=first_wrong is not None and not any(step_right[first_wrong:]),
    )


def apply_operation(symbol: str, value: int, operand: int) -> int:
    """Return the result digit of one step."""
    if symbol == "+":
        return (value + operand) % 10
    if symbol == "-":
        return (value - operand) % 10
    return (value * operand) % 10
