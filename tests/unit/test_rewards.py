"""Rewards: right values, time limits that hold against a hang, and errors that name the prompt."""

import asyncio
import multiprocessing
import os
import time
from collections.abc import Sequence

import psutil
import pytest

from common.config.data import ChainReward, FunctionReward, MathReward, Reward
from learner.errors import InputError
from learner.rewards import RewardItem, Scores, make_rewards
from learner.rewards.base import RewardError
from learner.tasks import chain

HERE = "tests.user_rewards"


def items(*responses: str, answer: str = "x") -> list[RewardItem]:
    return [RewardItem(f"p{n}", "prompt", response, answer) for n, response in enumerate(responses)]


def score(reward: Reward, given: Sequence[RewardItem]) -> Scores:
    """The scores of a reward that is started and closed around the call."""

    async def run() -> Scores:
        rewards = make_rewards(reward)
        try:
            await rewards.start()
            return await rewards.score(given)
        finally:
            await rewards.close()

    return asyncio.run(run())


def user_function(name: str, timeout_seconds: float = 20.0) -> FunctionReward:
    return FunctionReward(function=f"{HERE}:{name}", timeout_seconds=timeout_seconds)


def children() -> set[int]:
    return {
        process.pid
        for process in psutil.Process().children(recursive=True)
        if "resource_tracker" not in " ".join(process.cmdline())
    }


def test_a_chain_is_rewarded_only_if_every_step_is_right():
    problem = chain.generate(0, "train", 1, 6)[0]
    wrong_step = problem.response([(problem.true_values[0] + 1) % 10, *problem.true_values[1:]])
    given = [
        RewardItem("p", problem.prompt, text, problem.solution)
        for text in (problem.solution, wrong_step, "", problem.solution + "more")
    ]
    assert score(ChainReward(), given).values == [1.0, 0.0, 0.0, 0.0]


def test_the_chain_reward_refuses_a_prompt_that_is_no_chain():
    with pytest.raises(RewardError, match="prompt 'p0': not a chain prompt"):
        score(ChainReward(), items("a"))


def test_math_answers_are_compared_by_value_not_by_form():
    pairs = [
        (r"so the answer is \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{x^2+1}", "1+x^2", 1.0),
        (r"first $x=4$, then \boxed{7}", r"\frac{14}{2}", 1.0),
        (r"\boxed{\text{Yes}}", "Yes", 1.0),
        (r"\boxed{[0,1)}", "[0,1)", 1.0),
        (r"\boxed{8}", "7", 0.0),
        ("no answer at all", "7", 0.0),
        ("", "7", 0.0),
    ]
    given = [RewardItem("p", "q", response, answer) for response, answer, _ in pairs]
    assert score(MathReward(), given).values == [expected for _, _, expected in pairs]


def test_a_reference_that_is_no_mathematics_costs_the_response_its_reward_and_not_the_run(
    caplog: pytest.LogCaptureFixture,
):
    given = [RewardItem("good", "q", r"\boxed{7}", "7"), RewardItem("bad", "q", r"\boxed{7}", r"$ \boxed{} $")]
    assert score(MathReward(), given).values == [1.0, 0.0]
    assert "prompt 'bad': math-verify finds no expression in the reference answer" in caplog.text


def test_a_users_function_gets_prompt_response_and_answer():
    assert score(user_function("length"), items("abc", "")).values == [0.3, 0.0]
    assert score(user_function("equal"), items("x", "y")).values == [1.0, 0.0]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("no_such_module_anywhere:f", ["there is no module 'no_such_module_anywhere'"]),
        (f"{HERE}:missing", [f"module '{HERE}' has no 'missing'", "it has length, equal"]),
        (f"{HERE}:not_callable", ["'not_callable'", "is a float, no function"]),
    ],
)
def test_a_function_that_can_not_be_loaded_is_refused_at_the_start(function: str, words: list[str]):
    with pytest.raises(InputError) as caught:
        score(FunctionReward(function=function), items("a"))
    for word in words:
        assert word in str(caught.value)


def test_a_module_that_fails_to_import_says_how(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_reward.py").write_text("import json\njson.loads('')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="'broken_reward' fails to import: JSONDecodeError"):
        score(FunctionReward(function="broken_reward:f"), items("a"))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("text", "prompt 'p0': returned 'good' (str), which is not a number"),
        ("infinite", "prompt 'p0': returned nan, which is not a finite number"),
        ("raises", "prompt 'p0': KeyError: 'no a'"),
        ("exits", "prompt 'p0': the worker process died"),
    ],
)
def test_a_reward_that_is_no_number_is_an_error_that_names_the_prompt(function: str, words: str):
    with pytest.raises(RewardError) as caught:
        score(user_function(function), items("a"))
    assert words in str(caught.value)


def test_a_hanging_call_is_killed_counted_and_the_others_go_on():
    before = children()
    started = time.monotonic()
    scores = score(user_function("hangs_on_request", timeout_seconds=3.0), items("a", "hang", "b", "c"))
    assert scores == Scores([1.0, 0.0, 1.0, 1.0], timeouts=1)
    assert time.monotonic() - started < 60.0
    assert children() <= before


def test_if_no_call_is_ready_in_time_the_reward_is_broken():
    with pytest.raises(RewardError, match=r"none of the 1 calls .* within 0\.5 s \(reward\.timeout_seconds\)"):
        score(user_function("hangs_on_request", timeout_seconds=0.5), items("hang"))


def test_scoring_does_not_block_the_event_loop():
    async def run() -> int:
        rewards = make_rewards(user_function("hangs_on_request", timeout_seconds=1.0))
        await rewards.start()
        scoring = asyncio.ensure_future(rewards.score(items("hang", "a")))
        turns = 0
        while not scoring.done():
            await asyncio.wait({scoring}, timeout=0.01)
            turns += 1
        await rewards.close()
        return turns

    assert asyncio.run(run()) > 20


def test_a_worker_that_was_killed_between_two_calls_is_started_again():
    async def run() -> list[float]:
        rewards = make_rewards(user_function("length"))
        try:
            await rewards.start()
            (worker,) = multiprocessing.active_children()
            worker.kill()
            worker.join(10.0)
            return (await rewards.score(items("four"))).values
        finally:
            await rewards.close()

    assert asyncio.run(run()) == [0.4]


def test_workers_run_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path):
    (tmp_path / "pid_reward.py").write_text("import os\ndef f(p, r, a):\n    return os.getpid()\n")
    monkeypatch.syspath_prepend(tmp_path)
    values = score(FunctionReward(function="pid_reward:f"), items("a")).values
    assert values != [float(os.getpid())]
