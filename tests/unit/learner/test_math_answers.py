r"""Mathematical answers: a table of responses and references that are equal, one of those that are not, and monsters.

The tables are right by mathematics, not by what any program gives.
"""

import time
from collections.abc import Callable

import pytest

from common.config.data import MathReward
from learner.environments.rewards import RewardItem
from learner.environments.rewards.base import UnusableAnswerError
from learner.environments.rewards.final_answer import final_answers
from learner.environments.rewards.math_answers import answer_comparison
from tests.unit.learner.test_rewards import score

EQUAL = [
    # The last box counts.
    (r"\boxed{3} no wait, \boxed{4}", "4"),
    (r"$\boxed{3}$. Hmm, that is wrong: $\boxed{4}$", "4"),
    (r"\boxed{3}\boxed{4}", "4"),
    (r"\boxed{4} is what I put into \boxed{}", "4"),
    (r"$\boxed{3}$ and $\boxed{4}$", "3, 4"),
    (r"\boxed{3} and \boxed{4}", "4"),
    (r"\boxed{\boxed{4}}", "4"),
    (r"\boxed 4", "4"),
    (r"\fbox{4}", "4"),
    # Numbers.
    (r"\boxed{½}", "0.5"),
    (r"\boxed{0.5}", "½"),
    (r"\boxed{２１}", "21"),
    ("４２", "42"),
    (r"\boxed{-4}", "−4"),
    (r"\boxed{.5}", "0.5"),
    (r"\boxed{4.}", "4"),
    (r"\boxed{+4.0}", "4"),
    (r"\boxed{1000}", r"1\,000"),
    (r"\boxed{1{,}000}", "1,000"),
    (r"\boxed{1,\!000}", "1000"),
    (r"\boxed{1 000 000}", r"1\,000\,000"),
    (r"\boxed{1'000}", "1000"),
    (r"\boxed{3×10⁴}", "30000"),
    (r"\boxed{1e-7}", "0.0000001"),
    (r"\boxed{1.5\times10^{-7}}", "0.00000015"),
    (r"\boxed{0.333333}", r"\frac13"),
    (r"\boxed{3.141593}", r"\pi"),
    (r"\boxed{0.1+0.2}", "0.3"),
    (r"\boxed{2^{10}}", "1024"),
    (r"\boxed{5!}", "120"),
    (r"\boxed{1010_2}", "10"),
    (r"\boxed{12_{8}}", "12_8"),
    # Fractions and mixed numbers.
    (r"\boxed{\frac12}", "0.5"),
    (r"\boxed{\frac1 2}", "1/2"),
    (r"\boxed{\dfrac{1}2}", r"\tfrac12"),
    (r"\boxed{-\frac{1}{2}}", r"\frac{-1}{2}"),
    (r"\boxed{1\frac{1}{2}}", r"\frac{3}{2}"),
    (r"\boxed{2 1/2}", "2.5"),
    (r"\boxed{2½}", "2.5"),
    (r"\boxed{-2½}", "-2.5"),
    (r"\boxed{3¾ cups}", "3.75"),
    (r"\boxed{21/2}", "10.5"),
    # Roots and constants.
    (r"\boxed{√2}", r"\sqrt{2}"),
    (r"\boxed{2\sqrt3}", "2√3"),
    (r"\boxed{√(x+1)}", r"\sqrt{x+1}"),
    (r"\boxed{2 sqrt(3)}", r"2\sqrt{3}"),
    (r"\boxed{\frac{\sqrt{3}}{3}}", r"\frac{1}{\sqrt{3}}"),
    (r"\boxed{3 pi}", "3π"),
    (r"\boxed{e^{i\pi}}", "-1"),
    (r"\boxed{(1+i)^2}", "2i"),
    (r"\boxed{\log_2 8}", "3"),
    # Percent, money, units.
    (r"\boxed{50\%}", "50"),
    (r"\boxed{50\%}", "0.5"),
    (r"\boxed{12.5}", r"12.5\%"),
    (r"\boxed{25 percent}", "1/4"),
    (r"\boxed{5}", "5 dollars"),
    (r"\boxed{\$1,234.50}", "1234.5"),
    (r"\boxed{5\text{ dollars}}", "$5"),
    (r"\boxed{5 meters}", r"5 \text{ m}"),
    (r"\boxed{12\text{ cm}^2}", "12"),
    (r"\boxed{12 miles per hour}", "12"),
    (r"\boxed{45°}", r"45^{\circ}"),
    # Equations, algebra.
    (r"\boxed{x=4}", "4"),
    (r"\boxed{4}", "x = 4"),
    (r"\boxed{4=x}", "4"),
    (r"\boxed{x²+2x+1}", "(x+1)^2"),
    (r"\boxed{\frac{1}{x}+\frac1y}", r"\frac{x+y}{xy}"),
    (r"\boxed{f(x)=x^2}", "x^2"),
    (r"\boxed{2x - y + 1 = 0}", "y=2x+1"),
    # Intervals, sets, tuples, matrices.
    (r"\boxed{[0,1)}", "[0,1)"),
    (r"\boxed{\left[0,\frac12\right)}", "[0,0.5)"),
    (r"\boxed{(-∞, 3]}", r"(-\infty,3]"),
    (r"\boxed{[1,2]∪[3,4]}", r"[3,4]\cup[1,2]"),
    (r"\boxed{x\in[0,1)}", "[0,1)"),
    (r"\boxed{0\le x<1}", "[0,1)"),
    (r"\boxed{3\le x}", r"x\geq 3"),
    (r"\boxed{2,1}", "1,2"),
    (r"\boxed{1\text{ and }2}", r"\{1,2\}"),
    (r"\boxed{x=1, x=2}", "1,2"),
    (r"\boxed{±2}", r"\pm 2"),
    (r"\boxed{(\frac12,0.5)}", "(0.5,1/2)"),
    (r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    (r"\boxed{\varnothing}", "∅"),
    # Words and choices.
    (r"\boxed{\text{Yes}}", "yes"),
    (r"\boxed{\textbf{(C)}}", "C"),
    ("The answer is (B).", "B"),
    # Without a box.
    ("7", "7"),
    ("#### 1,000", "1000"),
    (r"\boxed{72}", "She sold 5*3 = 72.\n#### 72"),
    ("The answer is 3. Wait, the answer is 4.", "4"),
    ("**Answer:** 7", "7"),
    ("Final Answer:\n\n7", "7"),
    ("The answer is: 7, since 3+4=7.", "7"),
    ("Therefore, the answer is $\\frac{1}{2}$. I hope it is correct.", "0.5"),
    ("Answer: 1, 2", "1,2"),
    ("3 + 4 = 7", "7"),
    ("We add 3 and 4.\n7", "7"),
    ("The train needs 3 hours for 21 km.\nThe speed is 7 km/h", "7"),
]

DIFFERENT = [
    (r"\boxed{3} no wait, \boxed{4}", "3"),
    (r"\boxed{3} no wait, \boxed{4", "3"),
    (r"\boxed{3} and \boxed{4}", "3"),
    (r"\boxed{", "7"),
    # A list of guesses is no answer.
    ("1 2 3 4 5 6 7", "7"),
    ("1, 2, 3, 4, 5, 6, 7", "7"),
    ("1\n2\n3\n4\n5\n6\n7", "7"),
    ("Answer: 1 2 3 4 5 6 7", "7"),
    ("Answer: 5 or 6 or 7", "7"),
    ("I guess 5? 6? 7?", "7"),
    (r"The answer is $6$ or $7$", "7"),
    (r"\boxed{1 2 3 4 5 6 7}", "7"),
    (r"\boxed{5, 6, 7}", "7"),
    ("", "7"),
    ("no answer at all", "7"),
    # Small and large numbers are told apart.
    (r"\boxed{0.0000001}", "0.0000002"),
    (r"\boxed{0}", "0.0000001"),
    (r"\boxed{10^{-20}}", r"2\cdot10^{-20}"),
    (r"\boxed{\sqrt2\times10^{-20}}", r"\sqrt3\times10^{-20}"),
    (r"\boxed{0.001234}", "0.0012341"),
    (r"\boxed{1234567.1}", "1234567.2"),
    (r"\boxed{123456789012345678901}", "123456789012345678902"),
    (r"\boxed{0.33}", r"\frac13"),
    (r"\boxed{3.1416}", r"\pi"),
    (r"\boxed{-4}", "4"),
    (r"\boxed{10 00}", "1000"),
    (r"\boxed{1010_2}", "1010"),
    (r"\boxed{21/2}", r"2\frac12"),
    (r"\boxed{2\frac12}", "1"),
    (r"\boxed{½}", "1/3"),
    (r"\boxed{5\%}", r"50\%"),
    (r"\boxed{(1,200)}", "1200"),
    # Letters after a number are variables.
    (r"\boxed{2t}", "2"),
    (r"\boxed{3m}", "3"),
    (r"\boxed{2 x}", "2"),
    (r"\boxed{x^2}", "x2"),
    # Units that contradict each other.
    (r"\boxed{5 km}", "5 m"),
    (r"\boxed{5\text{ cents}}", "5 dollars"),
    (r"\boxed{€5}", "$5"),
    (r"\boxed{12\text{ cm}^2}", r"12\text{ cm}^3"),
    (r"\boxed{45°}", "45 radians"),
    (r"\boxed{x = 5}", "4"),
    (r"\boxed{y=4}", "x=4"),
    (r"\boxed{a=1,b=2}", "a=2,b=1"),
    (r"\boxed{[0,1]}", "[0,1)"),
    (r"\boxed{(1,2]}", "[1,2)"),
    (r"\boxed{(2,1)}", "(1,2)"),
    (r"\boxed{(1,2,3)}", "(1,3,2)"),
    (r"\boxed{x>3}", r"x\geq 3"),
    (r"\boxed{\infty}", r"-\infty"),
    (r"\boxed{1/0}", "1"),
    (r"\boxed{\frac{0}{0}}", "0"),
    (r"\boxed{\sin x}", r"\cos x"),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\3\end{pmatrix}"),
    (r"\boxed{3:2}", "2:3"),
    (r"\boxed{\text{No}}", "Yes"),
    (r"\boxed{D}", "(C)"),
]

MONSTERS = {
    "a tower": r"\boxed{9^9^9^9}",
    "a braced tower": r"\boxed{9^{9^{9^9}}}",
    "a negative tower": r"\boxed{9^{-9^{9^9}}}",
    "a root of a tower": r"\boxed{\sqrt{9^{9^9}}}",
    "a tower of e": r"\boxed{e^{e^{e^{e^{10}}}}}",
    "a power": r"\boxed{2^{100000000}}",
    "a float": r"\boxed{1e999999999}",
    "a factorial": r"\boxed{(10^9)!}",
    "a gamma function": r"\boxed{\Gamma(10^9)}",
    "a binomial": r"\boxed{\binom{10^9}{5\cdot10^8}}",
    "a sum": r"\boxed{\sum_{n=1}^{1000000000} \frac{1}{n!+n}}",
    "a product": r"\boxed{\prod_{n=1}^{100000000} (n+\frac1n)}",
    "a polynomial": r"\boxed{(x+y+z)^{500}}",
    "an integral": r"\boxed{\int_0^1 x^{x^x} dx}",
    "parentheses": r"\boxed{" + "(" * 5000 + "1" + ")" * 5000 + "}",
    "fractions": r"\boxed{" + r"\frac{1}{1+" * 300 + "1" + "}" * 300 + "}",
    "digits": r"\boxed{" + "9" * 15_000 + "}",
    "a box of megabytes": r"\boxed{" + "1" * 5_000_000 + "}",
    "boxes": r"\boxed{1} " * 200_000,
    "joined boxes": r"\boxed{1}, " * 200_000,
    "open boxes": r"\boxed{" * 200_000,
    "dollars": "$" * 1_000_000,
    "lines": "1\n" * 1_000_000,
    "braces": "{" * 1_000_000,
    "letters": "a" * 1_000_000,
    "answers": "the answer is " * 200_000,
    "full-width digits": "１" * 1_000_000,
}


@pytest.fixture(scope="module")
def equal() -> Callable[[str, str], bool]:
    compare = answer_comparison()
    # Loads the grammar.
    assert compare("0.5", r"\boxed{\frac{1}{2}}")
    return compare


@pytest.mark.parametrize(("response", "reference"), EQUAL)
def test_equal_answers_are_right(equal: Callable[[str, str], bool], response: str, reference: str):
    assert equal(reference, response)


@pytest.mark.parametrize(("response", "reference"), DIFFERENT)
def test_different_answers_are_wrong(equal: Callable[[str, str], bool], response: str, reference: str):
    assert not equal(reference, response)


@pytest.mark.parametrize("response", MONSTERS.values(), ids=MONSTERS.keys())
def test_monsters_end_in_time(equal: Callable[[str, str], bool], response: str):
    started = time.process_time()
    assert not equal("7", response)
    assert time.process_time() - started < 3.0


def test_a_monster_equals_itself_as_it_is_written(equal: Callable[[str, str], bool]):
    assert equal("9^{9^{9^9}}", r"\boxed{9^{9^{9^{9}}}}")


def test_what_escapes_all_limits_is_stopped_by_the_time_limit():
    given = [RewardItem("p", "q", rf"\boxed{{{'+'.join(f'sin({n}x)^{n}' for n in range(2, 60))}}}", "7")]
    (found,) = score(MathReward(timeout_seconds=0.05, workers=1), given)[:1]
    assert found.failure == "timeout"


def test_a_reference_without_an_answer_is_told_apart_from_a_wrong_response(equal: Callable[[str, str], bool]):
    for reference in ("", "  ", "$$", r"\boxed{}", "solution\n#### $"):
        with pytest.raises(UnusableAnswerError):
            equal(reference, r"\boxed{7}")


def test_several_boxes_are_joined_only_by_what_joins():
    assert final_answers(r"\boxed{1} so \boxed{2}, \boxed{3}") == ["3", "2,3"]
    assert final_answers(r"$\boxed{1}$, $\boxed{2}$ and $\boxed{3}$") == ["3", "1,2,3"]
    assert final_answers(r"\boxed{\{1\}}") == [r"\{1\}"]
    assert final_answers("text only") == ["text only"]
    assert final_answers("") == []
