"""Avg@k and Pass@k against enumeration, and the report's names."""

import itertools
from pathlib import Path

import pytest

from common import metrics as names
from common.packed import Group
from common.trajectory import Prompt
from learner.environments.step_checks import StepCounts
from learner.evaluation.evaluate import Evaluation, evaluate_groups, evaluation_requests, pass_at_k
from learner.run.plots import draw_plots
from learner.run.report import build_report, comparison_table, final_table
from tests.configs import run_config
from tests.trajectories import random_groups
from tests.trajectories import with_rewards as rewarded

CONFIG = run_config(evaluation={"responses_per_problem": 3})
PROMPTS = [Prompt(id=name, text=name, token_ids=[1, 2]) for name in "abc"]


@pytest.mark.parametrize("responses", [1, 2, 5, 7])
def test_pass_at_k_equals_the_share_of_draws_with_a_success(responses: int):
    for successes, k in itertools.product(range(responses + 1), range(1, responses + 1)):
        marks = [True] * successes + [False] * (responses - successes)
        draws = list(itertools.combinations(marks, k))
        expected = sum(any(draw) for draw in draws) / len(draws)
        assert pass_at_k(responses, successes, k) == pytest.approx(expected)


def test_pass_at_k_of_too_few_responses_is_an_error():
    with pytest.raises(ValueError, match=r"pass@4 needs at least 4 responses, there are 3"):
        pass_at_k(3, 1, 4)


def with_rewards(rewards: list[list[float]]) -> list[Group]:
    groups = random_groups(0, len(rewards), len(rewards[0]))
    return [rewarded(group, row) for group, row in zip(groups, rewards, strict=True)]


def test_an_evaluation_averages_over_responses_and_over_problems():
    groups = with_rewards([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    result = evaluate_groups(8, "plain", 3, groups, StepCounts(9, 6, 4, 1), seconds=2.0, success_threshold=0.5)
    assert result.avg_at_k == pytest.approx(3 / 9)
    assert result.pass_at_k == pytest.approx(2 / 3)
    assert result.cascade_rate == pytest.approx(6 / 9)
    assert result.recovered_rate is None
    assert result.generated_tokens == sum(t.generated_tokens for g in groups for t in g.trajectories)
    erasable = evaluate_groups(8, "erasable", 3, groups, StepCounts(9, 6, 4, 1), seconds=2.0, success_threshold=0.5)
    assert erasable.recovered_rate == pytest.approx(1 / 4)
    unchecked = evaluate_groups(8, "plain", 3, groups, None, seconds=2.0, reward_timeouts=2, success_threshold=0.5)
    assert (unchecked.cascade_rate, unchecked.reward_timeouts) == (None, 2)


def test_plain_evaluation_is_plain_vllm_and_erasable_evaluation_erases_everywhere():
    plain = [r for group in evaluation_requests(CONFIG, PROMPTS, "plain") for r in group]
    erasable = [r for group in evaluation_requests(CONFIG, PROMPTS, "erasable") for r in group]
    assert all(r.policy is None and not r.erasable for r in plain)
    assert all(r.policy == CONFIG.rollout.erasure and r.erasable for r in erasable)
    assert [r.seed for r in plain] == [r.seed for r in erasable]
    assert len({r.seed for r in plain}) == 9
    assert len({r.group_id for r in [*plain, *erasable]}) == 6
    assert all(r.group_size == 3 for r in plain)


def evaluations() -> list[Evaluation]:
    groups = with_rewards([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    return [
        evaluate_groups(step, mode, 3, groups, StepCounts(6, 1, 1, 1), seconds=1.0, success_threshold=0.5)
        for step in (0, 2, 4)
        for mode in ("plain", "erasable")
    ]


METRICS = [
    {
        "step": step,
        names.GENERATED_TOKENS: 100,
        names.ERASED_TOKENS: 10,
        names.ERASURES: 2,
        names.ERASE_RATE: 0.1,
        names.UNCERTAINTY_MEAN: 0.4,
        names.THRESHOLD_MEAN: None,
        names.REWARD_MEAN: 0.5,
        names.ROLLOUT_SECONDS: 3.0,
        names.TRAIN_SECONDS: 1.0,
        names.SYNC_SECONDS: 0.5,
        names.OTHER_SECONDS: 0.5,
        names.STEP_SECONDS: 5.0,
    }
    for step in range(1, 5)
]
PROCESS = {"start": 7.0, "process": 30.0}


def test_the_report_has_the_names_that_other_tools_read():
    report = build_report("run", "e3rl", METRICS, evaluations(), PROCESS, 1.5)
    for key, step in (("before", 0), ("after", 4)):
        for mode in ("plain", "erasable"):
            entry = report[f"{mode}_{key}"]
            assert entry["step"] == step
            assert {"avg_at_k", "pass_at_k", "k", "cascade_rate", "generated_tokens"} <= entry.keys()
    assert report["generated_tokens"] == 400
    assert report["erased_tokens"] == 40
    assert report["erasures"] == 8
    assert report["seconds"]["steps"] == 20.0
    assert report["seconds"]["evaluation"] == 6.0
    assert report["working_share"] == pytest.approx(0.8)
    assert report["seconds"]["start"] == 7.0
    assert report["peak_memory_gib"] == 1.5
    assert report["seconds"].keys() == {"rollout", "train", "sync", "other", "steps", "evaluation", "start", "process"}


def test_tables_show_what_the_report_says(tmp_path: Path):
    from rich.console import Console

    report = build_report("run", "e3rl", METRICS, evaluations(), PROCESS, 1.5)
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    console.print(final_table(report, tmp_path))
    console.print(comparison_table([report, report | {"name": "run-grpo"}]))
    console.file.close()
    text = console.export_text()
    for words in ("0.500", "Pass@3", "400, 40 of them erased", "1.5 GiB", "run-grpo", str(tmp_path)):
        assert words in text


def test_plots_are_pictures_even_without_anything_to_show(tmp_path: Path):
    for metrics, points in ((METRICS, evaluations()), ([], [])):
        paths = draw_plots(tmp_path, metrics, points)
        assert [path.name for path in paths] == ["reward.png", "accuracy.png", "erase_rate.png", "threshold.png"]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
