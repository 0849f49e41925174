"""What tells of a run that still runs but no longer learns: its metrics, the warnings, and the share that succeeds."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import metrics as names
from common.config import ConfigError
from common.config.run import ShapeOverlong, WarningsConfig
from common.packed import Group, pack
from common.repetition import repeated_share
from learner.environments.overlong import length_penalty, shaped_groups
from learner.evaluation.evaluate import evaluate_groups
from learner.loop.driver_state import newest_state
from learner.loop.step_metrics import rollout_metrics
from learner.loop.watch import REPEAT_STEPS, Watch
from learner.policy.batching import rank_batches, split_minibatches, token_counts
from learner.policy.samples import response_samples
from learner.run.run_directory import read_jsonl
from tests.configs import run_config
from tests.trajectories import attempt_of, random_groups, trajectory, unpacked, with_rewards
from tests.unit.learner.test_driver import config, run

HEALTHY = {
    names.TRUNCATED_SHARE: 0.1,
    names.REPEATED_SHARE: 0.1,
    names.ENTROPY: 1.0,
    names.REWARD_SPREAD: 0.4,
}


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 3), max_size=60), length=st.integers(1, 5))
def test_repetition_is_counted_as_by_a_set_of_sequences(tokens: list[int], length: int) -> None:
    sequences = [tuple(tokens[n : n + length]) for n in range(len(tokens) - length + 1)]
    expected = 1.0 - len(set(sequences)) / len(sequences) if sequences else 0.0
    assert repeated_share(tokens, length) == pytest.approx(expected)


def test_a_loop_is_repetition_and_ordinary_text_is_not() -> None:
    rng = np.random.default_rng(0)
    assert repeated_share([5, 6, 7] * 200) > 0.99
    assert repeated_share(rng.integers(0, 150_000, 4000).tolist()) == 0.0
    assert repeated_share([1, 2, 3]) == repeated_share([]) == 0.0


def test_metrics_of_a_step_tell_how_it_goes() -> None:
    groups = random_groups(1, 2, 3)
    groups[0].trajectories[0].finish_reason = "length"
    for group in groups:
        assert group.trajectories[1].finish_reason == "stop"
    found = rollout_metrics(groups, [3] * len(groups), None)
    assert found[names.TRUNCATED_SHARE] == pytest.approx(1 / 6)
    # One of three succeeds in each group: sqrt(1/3 * 2/3).
    assert found[names.REWARD_SPREAD] == pytest.approx(np.sqrt(2) / 3)
    sampled = [-v for g in groups for t in unpacked(g) for a in t.attempts for v in a.behaviour_logprobs]
    assert found[names.ENTROPY] == pytest.approx(np.mean(sampled))


@pytest.mark.parametrize(
    ("metric", "value", "setting"),
    [
        (names.TRUNCATED_SHARE, 0.51, "truncated_share is 0.5"),
        (names.REPEATED_SHARE, 0.51, "repeated_share is 0.5"),
        (names.ENTROPY, 0.009, "entropy is 0.01"),
        (names.REWARD_SPREAD, 0.0, "reward_spread is 0.001"),
    ],
)
def test_each_threshold_is_told_when_it_is_crossed_and_when_it_is_over(metric: str, value: float, setting: str) -> None:
    watch = Watch(WarningsConfig())
    assert watch.check(1, HEALTHY) == []
    (told,) = watch.check(2, HEALTHY | {metric: value})
    assert told.startswith("warning, step 2: ")
    assert setting in told
    assert watch.active == 1
    assert watch.check(3, HEALTHY | {metric: value}) == []
    assert watch.check(4, HEALTHY | {metric: None}) == []
    (again,) = watch.check(2 + REPEAT_STEPS, HEALTHY | {metric: value})
    assert "since step 2" in again
    (over,) = watch.check(90, HEALTHY)
    assert "again" in over
    assert watch.active == 0
    name = setting.split()[0]
    assert Watch(WarningsConfig.model_validate({name: None})).check(1, HEALTHY | {metric: value}) == []


def test_a_run_shows_its_warnings_and_counts_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run(config(tmp_path, steps=2, warnings={"entropy": 9.0, "reward_spread": None})).directory
    assert [line[names.WARNINGS] for line in read_jsonl(directory.metrics)] == [1, 1]
    assert capsys.readouterr().out.count("nats of entropy are left") == 1


def test_what_counts_as_a_success_is_a_setting_for_the_share_and_for_evaluations(tmp_path: Path) -> None:
    held_out = {"problems": 3, "responses_per_problem": 2}
    usual = run(config(tmp_path, "usual", evaluation=held_out | {"success_threshold": 1.0}))
    never = run(config(tmp_path, "never", evaluation=held_out | {"success_threshold": 1.5}))
    always = run(config(tmp_path, "always", evaluation=held_out | {"success_threshold": 0.0}))
    assert newest_state(never.directory).success_rate == 0.0
    assert 0.0 < newest_state(usual.directory).success_rate < newest_state(always.directory).success_rate
    assert {e.pass_at_k for e in never.record.evaluations} == {0.0}
    assert {e.avg_at_k for e in always.record.evaluations} == {1.0}


def test_partial_rewards_succeed_from_the_threshold_on() -> None:
    group = random_groups(0, 1, 4)[0]
    rewards = (0.1, 0.3, 0.7, 0.9)
    groups = [with_rewards(group, rewards)]
    for threshold, share in ((0.0, 1.0), (0.3, 0.75), (0.31, 0.5), (0.9, 0.25), (1.0, 0.0)):
        found = evaluate_groups(1, "plain", 1, groups, None, 1.0, success_threshold=threshold)
        assert found.avg_at_k == pytest.approx(share)


def with_lengths(lengths: Sequence[int], truncated: Sequence[bool]) -> Group:
    group = random_groups(0, 1, len(lengths))[0]
    members = []
    for sample, (length, cut) in enumerate(zip(lengths, truncated, strict=True)):
        attempts = [attempt_of([1] * length, segment=0, start=0)]
        members.append(pack(trajectory(attempts, reward=float(sample % 2), sample=sample)))
        members[-1].finish_reason = "length" if cut else "stop"
    return Group(group.prompt, members)


@given(tokens=st.integers(0, 200), buffer=st.integers(1, 100), penalty=st.floats(0.01, 10))
def test_the_penalty_is_dapo_s(tokens: int, buffer: int, penalty: float) -> None:
    limit = 100
    if tokens <= limit - buffer:
        expected = 0.0
    elif tokens <= limit:
        expected = ((limit - buffer) - tokens) / buffer
    else:
        expected = -1.0
    shape = ShapeOverlong(buffer_tokens=buffer, penalty=penalty)
    assert length_penalty(tokens, shape, limit) == pytest.approx(penalty * expected)


def test_shaping_changes_the_rewards_that_are_learnt_from_and_no_others() -> None:
    group = with_lengths([5, 9, 10], [False, False, True])
    learner = run_config(learner={"overlong": {"mode": "shape", "buffer_tokens": 4, "penalty": 2.0}}).learner
    (shaped,) = shaped_groups([group], learner.overlong, 10)
    assert [t.reward for t in shaped.trajectories] == [0.0, 1.0 - 1.5, -2.0]
    assert [t.reward for t in group.trajectories] == [0.0, 1.0, 0.0]
    assert shaped_groups([group], run_config().learner.overlong, 10) == [group]


def test_masked_responses_carry_no_loss_and_stay_in_the_baseline() -> None:
    settings = run_config(learner={"overlong": {"mode": "mask"}, "advantage": {"credit": {"kind": "uniform"}}})
    advantage, overlong = settings.learner.advantage, settings.learner.overlong
    group = with_lengths([5, 9, 10], [False, True, False])
    whole = response_samples(group.trajectories, advantage)
    masked = response_samples(group.trajectories, advantage, overlong)
    assert [len(own) for own in masked] == [1, 0, 1]
    for before, after in ((whole[0], masked[0]), (whole[2], masked[2])):
        assert after[0].advantages.tolist() == before[0].advantages.tolist()
    (part,) = split_minibatches([group], advantage, 1, 0, 0, overlong)
    (batch,) = rank_batches(part, 1, 100)
    assert (batch.totals.responses, batch.totals.response_tokens) == (2, 15)
    everything = with_lengths([5, 9], [True, True])
    assert split_minibatches([everything], advantage, 1, 0, 0, overlong) == []
    assert token_counts(rank_batches([], 2, 100, True))[0] == 0


def test_overlong_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"buffer_tokens \(81\) exceeds max_response_tokens \(80\)"):
        run_config(learner={"overlong": {"mode": "shape", "buffer_tokens": 81}})
    with pytest.raises(ConfigError, match="buffer_tokens"):
        run_config(learner={"overlong": {"mode": "shape"}})
    with pytest.raises(ConfigError, match="unknown setting"):
        run_config(learner={"overlong": {"mode": "mask", "penalty": 1.0}})
