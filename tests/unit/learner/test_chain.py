"""The chain task: problems, splits, prompts and step-by-step checks, against arithmetic written out here."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.environments.tasks.chain import ChainProblem, check, generate, parse_prompt, split_of

PROBLEM = ChainProblem((("+", 5), ("-", 8), ("×", 3), ("+", 9)), 7)

operations = st.one_of(
    st.tuples(st.sampled_from("+-"), st.integers(0, 9)),
    st.tuples(st.just("×"), st.sampled_from([3, 7, 9])),
)
chains = st.builds(ChainProblem, st.lists(operations, min_size=1, max_size=26).map(tuple), st.integers(0, 9))


def evaluated_prefixes(problem: ChainProblem) -> list[int]:
    """The true values, each computed from scratch as one big integer expression."""
    expression = str(problem.start)
    values = []
    for symbol, operand in problem.operations:
        expression = f"({expression}{symbol.replace('×', '*')}{operand})"
        values.append(eval(expression) % 10)
    return values


@given(chains)
def test_true_values_are_those_of_plain_integer_arithmetic(problem: ChainProblem) -> None:
    assert list(problem.true_values) == evaluated_prefixes(problem)


@given(chains)
def test_the_solution_writes_each_step_of_the_prompt_with_its_value(problem: ChainProblem) -> None:
    steps = re.findall(r"([a-z].\d)", problem.prompt.split(":")[0])
    lines = [f"{step}={value}" for step, value in zip(steps, evaluated_prefixes(problem), strict=True)]
    assert problem.solution == "\n".join(lines) + "\n"
    assert [step[0] for step in steps] == [chr(ord("a") + index) for index in range(len(steps))]


@given(chains, st.booleans())
def test_a_prompt_is_read_back_with_or_without_its_newline(problem: ChainProblem, newline: bool) -> None:
    assert problem.prompt.endswith(f":{problem.start}\n")
    assert parse_prompt(problem.prompt if newline else problem.prompt.removesuffix("\n")) == problem


@given(chains)
def test_the_solution_is_correct_and_every_proper_prefix_is_not(problem: ChainProblem) -> None:
    result = check(problem, problem.solution)
    assert result.correct
    assert result.complete
    assert result.step_right == (True,) * len(problem.operations)
    assert result.first_wrong_step is None
    assert not result.cascaded
    assert check(problem, problem.solution.removesuffix("\n")).correct
    for end in range(len(problem.solution) - 1):
        shorter = check(problem, problem.solution[:end])
        assert not shorter.correct
        assert not shorter.complete


@given(chains, st.data())
def test_one_slip_that_is_carried_on_makes_every_later_step_wrong(problem: ChainProblem, data: st.DataObject) -> None:
    slip_at = data.draw(st.integers(0, len(problem.operations) - 1))
    true = evaluated_prefixes(problem)
    slipped = (true[slip_at] + data.draw(st.integers(1, 9))) % 10
    rest = ChainProblem(problem.operations[slip_at + 1 :], slipped) if slip_at + 1 < len(true) else None
    written = [*true[:slip_at], slipped, *(evaluated_prefixes(rest) if rest else [])]
    result = check(problem, problem.response(written))
    assert result.complete
    assert not result.correct
    assert result.first_wrong_step == slip_at
    assert result.cascaded
    assert result.step_right == (True,) * slip_at + (False,) * (len(true) - slip_at)


def test_an_error_that_later_steps_do_not_carry_on_has_not_cascaded() -> None:
    true = evaluated_prefixes(PROBLEM)
    wrong = [true[0], (true[1] + 1) % 10, true[2], true[3]]
    result = check(PROBLEM, PROBLEM.response(wrong))
    assert result.step_right == (True, False, True, True)
    assert (result.first_wrong_step, result.cascaded, result.correct) == (1, False, False)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "\n",
        lambda text: text + "e+1=2\n",
        lambda text: text + "<|endoftext|>",
        lambda text: "\n" + text,
        lambda text: " " + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("=", " = "),
        lambda text: text.replace("b-8", "b+2"),
        lambda text: text.replace("×", "x"),
        lambda text: "\n".join(reversed(text.splitlines())),
        lambda text: text.replace("=2", "=12"),
        lambda text: text.replace("=2", "=²"),
    ],
)
def test_a_right_answer_in_any_other_form_is_neither_complete_nor_correct(change) -> None:
    assert "=2" in PROBLEM.solution
    result = check(PROBLEM, change(PROBLEM.solution))
    assert not result.correct
    assert not result.complete


def test_a_wrong_value_in_the_right_form_is_complete_but_not_correct() -> None:
    result = check(PROBLEM, PROBLEM.response([0, 0, 0, 0]))
    assert result.complete
    assert not result.correct


@given(chains, st.text())
def test_any_text_is_checked_without_an_error(problem: ChainProblem, text: str) -> None:
    result = check(problem, text)
    assert result.correct == (text in {problem.solution, problem.solution.removesuffix("\n")})
    assert len(result.step_right) <= len(problem.operations)


def test_no_text_at_all_has_no_wrong_step() -> None:
    result = check(PROBLEM, "")
    assert (result.correct, result.complete, result.step_right, result.first_wrong_step) == (
        False,
        False,
        (),
        None,
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":7",
        "a+5",
        "a+5:",
        "a+5:77",
        "b+5:7",
        "a+5a+5:7",
        "a+5c-8:7",
        "a+55:7",
        "a×2:7",
        "a*3:7",
        "a+5:7\n\n",
    ],
)
def test_a_text_that_is_no_prompt_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"chain|cancel"):
        parse_prompt(text)


@given(st.text())
def test_reading_any_text_gives_a_problem_or_a_value_error(text: str) -> None:
    try:
        problem = parse_prompt(text)
    except ValueError:
        return
    assert problem.prompt.removesuffix("\n") == text.removesuffix("\n")


@pytest.mark.parametrize(
    ("steps", "start"),
    [
        ((), 0),
        ((("+", 1),) * 27, 0),
        ((("+", 10),), 0),
        ((("+", 1),), 10),
        ((("×", 5),), 0),
        ((("/", 2),), 0),
    ],
)
def test_a_problem_outside_the_task_is_refused(steps: tuple[tuple[str, int], ...], start: int) -> None:
    with pytest.raises(ValueError, match=r"not|cancel|unknown"):
        ChainProblem(steps, start)


def test_every_generated_operation_maps_the_digits_one_to_one() -> None:
    steps = {step for problem in generate(3, "train", 200) for step in problem.operations}
    assert {symbol for symbol, _ in steps} == {"+", "-", "×"}
    for step in steps:
        assert len({ChainProblem((step,), start).true_values for start in range(10)}) == 10


def test_generation_depends_on_nothing_but_its_arguments() -> None:
    random.seed(1)
    first = generate(7, "train", 50)
    random.seed(2)
    assert generate(7, "train", 50) == first
    assert generate(7, "train", 20) == first[:20]
    assert generate(8, "train", 50) != first


def test_splits_share_no_problem_even_where_every_problem_is_likely_drawn() -> None:
    train, test = (
        {problem for seed in range(40) for problem in generate(seed, split, 25, length=2)}
        for split in ("train", "test")
    )
    assert train.isdisjoint(test)
    assert {split_of(problem) for problem in train} == {"train"}
    assert {split_of(problem) for problem in test} == {"test"}


def test_a_split_has_no_duplicates_and_every_problem_has_the_length_asked_for() -> None:
    problems = generate(0, "test", 100, length=2)
    assert len(set(problems)) == len(problems) == 100
    assert {len(problem.operations) for problem in problems} == {2}
    assert {len(problem.operations) for problem in generate(0, "test", 5)} == {24}


def test_more_problems_than_the_split_can_give_are_refused_with_the_count() -> None:
    with pytest.raises(ValueError, match="cannot draw 500 distinct problems"):
        generate(0, "train", 500, length=1)


@pytest.mark.parametrize("length", [0, 27])
def test_a_length_without_step_names_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="1 to 26 steps"):
        generate(0, "train", 1, length=length)
