"""Rewards: right values, limits that hold against a hang, and a treatment for whatever a user's function does."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import pytest

from common.config.data import ChainReward, FunctionReward, MathReward, Reward
from learner.environments.rewards import RewardError, RewardItem, Rewards, Score, Tally, make_rewards
from learner.environments.tasks import chain
from learner.run.errors import InputError
from tests import user_rewards

HERE = "tests.user_rewards"
COLUMNS = frozenset({"level"})


def items(*responses: str, answer: str = "x") -> list[RewardItem]:
    return [RewardItem(f"p{n}", "prompt", response, answer) for n, response in enumerate(responses)]


def with_started(reward: Reward, work: Callable[[Rewards], Any]) -> Any:
    """What `work` returns, with a reward that is started and closed around it."""

    async def run() -> Any:
        rewards = make_rewards(reward, COLUMNS)
        try:
            await rewards.start()
            return await work(rewards)
        finally:
            await rewards.close()

    return asyncio.run(run())


def score(reward: Reward, given: Sequence[RewardItem]) -> list[Score]:
    async def work(rewards: Rewards) -> list[Score]:
        return await asyncio.gather(*(rewards.score(item) for item in given))

    return with_started(reward, work)


def values(reward: Reward, given: Sequence[RewardItem]) -> list[float]:
    return [score.value for score in score(reward, given)]


def user_function(name: str, **settings: Any) -> FunctionReward:
    return FunctionReward(function=f"{HERE}:{name}", **{"timeout_seconds": 20.0, "workers": 1} | settings)


def children() -> set[int]:
    return {
        process.pid
        for process in psutil.Process().children(recursive=True)
        if "resource_tracker" not in " ".join(process.cmdline())
    }


def sleepers() -> list[psutil.Process]:
    """What `user_rewards.with_children` left behind, wherever it is."""
    return [p for p in psutil.process_iter(["cmdline"]) if "import time; time.sleep(600)" in (p.info["cmdline"] or [])]


def test_a_chain_is_rewarded_only_if_every_step_is_right():
    problem = chain.generate(0, "train", 1, 6)[0]
    wrong_step = problem.response([(problem.true_values[0] + 1) % 10, *problem.true_values[1:]])
    given = [
        RewardItem("p", problem.prompt, text, problem.solution)
        for text in (problem.solution, wrong_step, "", problem.solution + "more")
    ]
    assert values(ChainReward(), given) == [1.0, 0.0, 0.0, 0.0]


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
    assert values(MathReward(), given) == [expected for _, _, expected in pairs]


def test_a_reference_that_is_no_mathematics_costs_the_response_its_reward_and_not_the_run(
    caplog: pytest.LogCaptureFixture,
):
    given = [RewardItem("good", "q", r"\boxed{7}", "7"), RewardItem("bad", "q", r"\boxed{7}", r"$ \boxed{} $")]
    good, bad = score(MathReward(), given)
    assert (good.value, good.failure) == (1.0, None)
    assert (bad.value, bad.failure) == (0.0, "unusable_answer")
    assert "prompt 'bad', sample 0: there is no answer in the reference" in caplog.text


def test_a_users_function_gets_what_its_parameters_name():
    assert values(user_function("length"), items("abc", "")) == [0.3, 0.0]
    assert values(user_function("equal"), items("x", "y")) == [1.0, 0.0]
    item = RewardItem("p", "q", "r", "a", 3, "length", (1, 2, 3, 4), {"level": 5})
    assert values(user_function("by_name"), [item]) == [1154.0]
    assert values(user_function("asynchronous"), items("a", "b")) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("no_such_module_anywhere:f", ["there is no module 'no_such_module_anywhere'"]),
        (f"{HERE}:missing", [f"module '{HERE}' has no 'missing'", "length, equal"]),
        (f"{HERE}:not_callable", ["'not_callable'", "is a float, no function"]),
        (f"{HERE}:half", ["asks for 'value', which there is not", "finish_reason", "the columns level"]),
    ],
)
def test_a_function_that_can_not_be_used_is_refused_at_the_start(function: str, words: list[str]):
    with pytest.raises(InputError) as caught:
        score(FunctionReward(function=function), items("a"))
    for word in words:
        assert word in str(caught.value)


def test_a_module_that_fails_to_import_says_how(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_reward.py").write_text("import json\njson.loads('')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        InputError, match=r"'broken_reward' fails to import: JSONDecodeError: .* \(.*broken_reward\.py, line 2\)"
    ):
        score(FunctionReward(function="broken_reward:f"), items("a"))


def test_a_module_that_does_not_end_to_load_is_refused_in_time(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "endless_reward.py").write_text("while True: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = children()
    with pytest.raises(InputError, match=r"did not load within 1\.5 s \(reward\.start_seconds\)"):
        score(FunctionReward(function="endless_reward:f", start_seconds=1.5), items("a"))
    assert children() <= before


def test_whatever_a_function_does_is_an_error_that_names_prompt_and_sample():
    expected = {
        "exit": f"SystemExit: 3 ({user_rewards.__file__}, line ",
        "interrupt": "KeyboardInterrupt",
        "os._exit": "the worker process died (exit status 7)",
        "killed": "the worker process died (signal SIGKILL)",
        "real-time signal": "the worker process died (signal 37)",
        "broken error": "BrokenError: (its message raises RuntimeError)",
        "broken value": "returned a BrokenValue whose repr raises SystemExit (BrokenValue), which is not a number",
        "surrogate": r"ValueError: \ud800",
        "noisy grandchild": "the worker process died (exit status 8)",
        "closes all files": "the worker process died",
    }
    given = [RewardItem(f"p{n}", "prompt", response, "x", sample=2) for n, response in enumerate(expected)]
    *failed, after = score(user_function("misbehaves", workers=2), [*given, *items("well")])
    for item, found in zip(given, failed, strict=True):
        assert (found.value, found.failure) == (0.0, "error")
        place = f"reward {HERE}:misbehaves, prompt {item.prompt_id!r}, sample 2: "
        assert found.message.startswith(place + expected[item.response])
    # Everything goes on, in a new worker if need be.
    assert after == Score(1.0)


def test_an_error_comes_with_its_traceback_and_a_death_with_the_last_output():
    failed, died = score(user_function("misbehaves"), items("surrogate", "os._exit"))
    assert 'raise ValueError("\\ud800")' in failed.traceback
    assert "the last words" in died.traceback


def test_a_forked_child_that_comes_back_does_not_answer_and_much_output_does_not_stop_a_worker():
    given = items("forked", "well", "writes much", "well")
    assert values(user_function("misbehaves"), given) == [0.5, 1.0, 0.5, 1.0]


def test_a_row_that_can_not_be_sent_is_an_error_of_that_row():
    unsendable = RewardItem("p", "q", "a", "x", row={"level": lambda: None})
    bad, good = score(user_function("length"), [unsendable, *items("ab")])
    assert bad.failure == "error"
    assert "its row can't be sent to another process" in bad.message
    assert good == Score(0.2)


def test_a_hanging_call_is_killed_counted_and_the_others_go_on():
    before = children()
    started = time.monotonic()
    scores = score(user_function("hangs_on_request", timeout_seconds=2.0), items("a", "hang", "b", "c"))
    assert [s.value for s in scores] == [1.0, 0.0, 1.0, 1.0]
    assert [s.failure for s in scores] == [None, "timeout", None, None]
    assert "prompt 'p1', sample 0: not ready within 2 s" in scores[1].message
    assert time.monotonic() - started < 60.0
    assert children() <= before


@pytest.mark.parametrize(("response", "failure"), [("hang", "timeout"), ("die", "error"), ("well", None)])
def test_processes_that_a_function_started_end_with_its_worker(response: str, failure: str | None):
    (found,) = score(user_function("with_children", timeout_seconds=3.0), items(response))
    assert found.failure == failure
    assert sleepers() == []


def test_a_function_may_use_processes_of_its_own():
    assert values(user_function("with_a_pool"), items("a")) == [1.5]


def test_as_many_calls_run_side_by_side_as_there_are_workers(tmp_path):
    given = [RewardItem(f"p{n}", "prompt", "3", str(tmp_path)) for n in range(3)]
    assert values(user_function("meets", workers=3), given) == [1.0, 1.0, 1.0]
    assert len(list(tmp_path.iterdir())) == 3


def test_closing_ends_calls_that_run_and_calls_that_wait():
    before = children()

    async def run() -> tuple[list[Score], float]:
        rewards = make_rewards(user_function("hangs_on_request", timeout_seconds=600.0))
        await rewards.start()
        calls = [asyncio.create_task(rewards.score(item)) for item in items("hang", "hang")]
        await asyncio.sleep(0.2)
        started = time.monotonic()
        await rewards.close()
        await rewards.close()
        ended = await asyncio.gather(*calls, return_exceptions=True)
        return ended, time.monotonic() - started

    ended, seconds = asyncio.run(run())
    assert all(isinstance(end, asyncio.CancelledError) or end.failure == "error" for end in ended)
    assert seconds < 10.0
    assert children() <= before


def test_scoring_does_not_block_the_event_loop():
    async def work(rewards: Rewards) -> int:
        scoring = asyncio.gather(*(rewards.score(item) for item in items("hang", "a")))
        turns = 0
        while not scoring.done():
            await asyncio.wait({scoring}, timeout=0.01)
            turns += 1
        return turns

    assert with_started(user_function("hangs_on_request", timeout_seconds=1.0), work) > 20


def test_a_worker_that_was_killed_between_two_calls_is_started_again(caplog: pytest.LogCaptureFixture):
    async def work(rewards: Rewards) -> list[Score]:
        first = await rewards.score(items("a")[0])
        worker = psutil.Process(int(first.value))
        worker.kill()
        worker.wait(10.0)
        return [first, await rewards.score(items("a")[0])]

    first, second = with_started(user_function("process_id"), work)
    assert second.failure is None
    assert second.value != first.value
    assert "died while it had nothing to do" in caplog.text


def test_a_supervisor_that_is_killed_takes_its_worker_along():
    async def work(rewards: Rewards) -> tuple[int, list[Score]]:
        worker = psutil.Process(int((await rewards.score(items("a")[0])).value))
        supervisor = worker.parent()
        assert supervisor is not None
        supervisor.kill()
        worker.wait(10.0)
        return worker.pid, [await rewards.score(items("a")[0])]

    before, (after,) = with_started(user_function("process_id"), work)
    assert after.failure is None
    assert after.value != before


def judged(tally: Tally, **settings: Any) -> str:
    """What `judge` says, empty if the run goes on."""
    rewards = make_rewards(user_function("length", **settings))
    try:
        rewards.judge(tally)
    except RewardError as error:
        return str(error)
    finally:
        asyncio.run(rewards.close())
    return ""


FAILURE = Score(0.0, "error", "prompt 'p': KeyError", "Traceback: here\n")


@pytest.mark.parametrize(
    ("responses", "errors", "settings", "ends"),
    [
        (64, 1, {}, False),
        (64, 7, {}, False),
        (64, 8, {}, True),
        # A single failure in a small step is no reason to end a run.
        (4, 1, {}, False),
        (4, 2, {}, True),
        (4, 1, {"max_error_share": 0.0}, True),
        (4, 1, {"on_error": "fail"}, True),
        (64, 63, {"max_error_share": 1.0}, False),
        (64, 64, {"max_error_share": 1.0}, True),
    ],
)
def test_the_run_ends_once_more_rewards_failed_than_allowed(
    responses: int, errors: int, settings: dict[str, Any], ends: bool
):
    tally = Tally(responses)
    for _ in range(errors):
        tally.count(FAILURE)
    text = judged(tally, **settings)
    assert bool(text) == ends
    if ends:
        assert "prompt 'p': KeyError" in text


def test_if_no_call_is_ready_in_time_the_reward_is_broken():
    tally = Tally(2)
    tally.count(Score(0.0, "timeout"))
    assert judged(tally) == ""
    tally.count(Score(0.0, "timeout"))
    assert "none of the 2 calls" in judged(tally)
    assert "(reward.timeout_seconds)" in judged(tally)
