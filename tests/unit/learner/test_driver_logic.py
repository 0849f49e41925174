"""What the driver asks for and what it makes of the answers: pure logic, no loop."""

from typing import Any

import pytest

from common import metrics as names
from common.config import RunConfig
from common.config.data import ShareAdaptive, ShareFixed
from common.packed import Group, PackedResponse, pack
from common.seeds import derive_seed
from common.trajectory import Attempt, Prompt, Trajectory, Verdict
from learner.environments.step_checks import count_steps
from learner.environments.tasks.chain import ChainProblem
from learner.loop.ledger import Draw
from learner.loop.step_metrics import rollout_metrics
from learner.loop.treatment import (
    TreatedShare,
    first_treated_sample,
    plain_outcome,
    training_requests,
)
from learner.run.errors import PartError, part, summary
from tests.configs import run_config
from tests.fake_parts import TOKENIZER
from tests.trajectories import attempt_of, random_groups, unpacked, with_rewards

PROMPT = Prompt(id="p7", text="a+1:2\n", token_ids=[1, 2, 3], answer="a+1=3\n")


def draw(step: int, name: str = PROMPT.id) -> Draw:
    """The turn of a prompt in that step."""
    prompt = PROMPT.model_copy(update={"id": name})
    return Draw(number=2 * step, epoch=0, prompt=prompt, step=step, twice=(), version=0, drops=0)


UNIFORM = {"advantage": {"credit": {"kind": "uniform"}}}


def config(rollout: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    return run_config(rollout={"max_response_tokens": 152, "temperature": 0.9} | (rollout or {}), **changes)


def test_a_mixed_group_has_its_plain_members_first_and_they_are_monitored():
    requests = training_requests(config(), draw(3), share_applies=True)
    assert [r.erasable for r in requests] == [False, False, True, True]
    assert [r.sample for r in requests] == [0, 1, 2, 3]
    assert all(r.policy == config().rollout.erasure for r in requests)
    assert {r.group_id for r in requests} == {"3-p7"}
    assert {r.temperature for r in requests} == {0.9}
    assert {r.max_tokens for r in requests} == {152}
    assert {r.group_size for r in requests} == {4}


def test_nothing_is_erasable_while_the_share_does_not_apply():
    requests = training_requests(config(), draw(3), share_applies=False)
    assert not any(r.erasable for r in requests)
    assert all(r.policy is not None for r in requests)


def test_all_erasable_and_all_plain_are_the_ends_of_the_share():
    everything = config({"group_share": {"mode": "fixed", "share": 1.0}})
    assert all(r.erasable for r in training_requests(everything, draw(1), share_applies=True))
    grpo = config({"group_share": {"mode": "fixed", "share": 0.0}}, learner=UNIFORM)
    requests = training_requests(grpo, draw(1), share_applies=True)
    assert all(r.policy is not None and not r.erasable for r in requests)


def test_the_temperature_control_changes_the_treated_half_and_erases_nothing():
    control = config({"treatment": {"kind": "temperature", "temperature": 0.5}}, learner=UNIFORM)
    requests = training_requests(control, draw(1), share_applies=True)
    assert [r.temperature for r in requests] == [0.9, 0.9, 0.5, 0.5]
    assert not any(r.erasable for r in requests)
    off = training_requests(control, draw(1), share_applies=False)
    assert {r.temperature for r in off} == {0.9}


def test_every_response_of_a_run_has_a_seed_of_its_own_that_its_place_decides():
    seeds = {
        r.seed
        for step in range(1, 4)
        for name in ("a", "b")
        for r in training_requests(config(), draw(step, name), share_applies=True)
    }
    assert len(seeds) == 3 * 2 * 4
    (first, *_) = training_requests(config(seed=5), draw(2), share_applies=True)
    assert first.seed == derive_seed(5, 2, "p7", 0)


def test_the_share_applies_until_plain_responses_succeed_and_again_when_they_stop():
    share = TreatedShare(ShareAdaptive(share=0.5, success_threshold=0.10, decay=0.7))
    assert share.applies
    expected = 0.0
    seen = []
    for successes in (0, 2, 32, 32, 0, 0, 0, 0, 0, 0, 0):
        share.update(successes, 32)
        expected = 0.7 * expected + 0.3 * successes / 32
        assert share.success_rate == pytest.approx(expected)
        seen.append(share.applies)
    assert seen[:4] == [True, True, False, False]
    assert seen[-1] is True


def test_a_fixed_share_always_applies_and_a_step_without_plain_responses_changes_nothing():
    share = TreatedShare(ShareFixed(share=1.0), success_rate=0.4)
    share.update(0, 0)
    assert share.applies
    assert share.success_rate == 0.4


def test_the_success_rate_counts_plain_members_only():
    (group,) = random_groups(0, 1, 4)
    rewards = [1.0, 0.0, 1.0, 1.0]
    mixed = [with_rewards(group, rewards)]
    assert plain_outcome(mixed, [first_treated_sample(config(), True)], 0.5) == (1, 2)
    assert plain_outcome(mixed, [first_treated_sample(config(), False)], 0.5) == (3, 4)


def test_rollout_metrics_equal_a_count_by_hand():
    groups = random_groups(seed=1, groups=2, size=4)
    responses = [t for group in groups for t in unpacked(group)]
    attempts = [a for t in responses for a in t.attempts]
    erased = [a for a in attempts if a.verdict == "erased"]
    values = rollout_metrics(groups, [2, 2], None)
    assert values[names.GENERATED_TOKENS] == sum(len(a.token_ids) for a in attempts)
    assert values[names.ERASED_TOKENS] == sum(len(a.token_ids) for a in erased)
    assert values[names.ERASURES] == len(erased)
    assert values[names.ERASE_RATE] == pytest.approx(len(erased) / len(attempts))
    assert values[names.SIGNAL_SHARE] == 1.0
    assert values[names.TREATED_SHARE] == 0.5
    assert values[names.REWARD_MEAN] == pytest.approx(sum(t.reward or 0 for t in responses) / 8)
    treated = [t.reward or 0 for t in responses if t.sample >= 2]
    assert values[names.REWARD_TREATED] == pytest.approx(sum(treated) / len(treated))
    assert values[names.THRESHOLD_MEAN] is None
    assert values[names.CASCADE_RATE] is None


def response(lines: list[tuple[int, str, Verdict]], *, erasable: bool = True) -> PackedResponse:
    """A response of attempts (segment, line, verdict) to the problem `CHAIN`."""
    attempts: list[Attempt] = []
    position, numbers = 0, {}
    for segment, line, verdict in lines:
        tokens = TOKENIZER.encode(line)
        number = numbers[segment] = numbers.get(segment, -1) + 1
        attempts.append(attempt_of(tokens, segment=segment, number=number, start=position, verdict=verdict))
        if verdict == "accepted":
            position += len(tokens)
    committed = [line for _, line, verdict in lines if verdict == "accepted"]
    trajectory = Trajectory(
        prompt_id="c",
        group_id="c",
        sample=0,
        seed=0,
        prompt_token_ids=[1],
        attempts=attempts,
        erasable=erasable,
        finish_reason="stop",
        text="".join(committed),
    )
    return pack(trajectory, attempt_texts=tuple(line for _, line, _ in lines))


CHAIN = ChainProblem((("+", 1), ("+", 2), ("×", 3)), start=0)
RIGHT = ("a+1=1\n", "b+2=3\n", "c×3=9\n")


def counts(*responses: PackedResponse) -> tuple[int, int, int, int]:
    prompt = Prompt(id="c", text=CHAIN.prompt, token_ids=[1])
    found = count_steps(config(), [Group(prompt=prompt, trajectories=list(responses))])
    assert found is not None
    return found.responses, found.cascaded, found.slips, found.recovered


def test_a_slip_that_erasure_put_right_is_recovered():
    lines: list[tuple[int, str, Verdict]] = [
        (0, RIGHT[0], "accepted"),
        (1, "b+2=4\n", "erased"),
        (1, RIGHT[1], "accepted"),
        (2, RIGHT[2], "accepted"),
    ]
    assert counts(response(lines)) == (1, 0, 1, 1)


def test_a_slip_that_stayed_cascades_and_what_follows_it_is_no_further_slip():
    lines: list[tuple[int, str, Verdict]] = [
        (0, RIGHT[0], "accepted"),
        (1, "b+2=5\n", "erased"),
        (1, "b+2=4\n", "accepted"),
        (2, "c×3=2\n", "accepted"),
    ]
    assert counts(response(lines)) == (1, 1, 1, 0)
    assert counts(response(lines, erasable=False)) == (1, 1, 0, 0)


def test_an_erased_line_that_was_right_is_no_slip_and_a_right_response_no_cascade():
    lines: list[tuple[int, str, Verdict]] = [
        (0, RIGHT[0], "erased"),
        (0, RIGHT[0], "accepted"),
        (1, RIGHT[1], "accepted"),
        (2, RIGHT[2], "accepted"),
    ]
    assert counts(response(lines), response(lines[1:])) == (2, 0, 0, 0)


def test_slips_are_found_where_segments_do_not_end_with_lines():
    first, second = RIGHT[0] + "b+2=", "4\n" + "c"
    lines: list[tuple[int, str, Verdict]] = [
        (0, first, "accepted"),
        (1, second, "erased"),
        (1, "3\n", "accepted"),
        (2, RIGHT[2], "accepted"),
    ]
    assert counts(response(lines)) == (1, 0, 1, 1)


def test_a_task_without_checkable_steps_has_no_counts():
    run = config(reward={"kind": "math"})
    assert count_steps(run, random_groups(0, 1, 2)) is None
    assert not training_requests(run, draw(1), share_applies=True)[0].attempt_texts


def test_steps_are_checked_where_the_texts_of_attempts_were_asked_for():
    assert all(r.attempt_texts for r in training_requests(config(), draw(1), share_applies=True))
    (group,) = random_groups(0, 1, 2)
    group = Group(Prompt(id="p0", text=CHAIN.prompt, token_ids=[1]), group.trajectories)
    with pytest.raises(ValueError, match="response 0 to prompt 'p0' lacks its attempts' texts"):
        count_steps(config(), [group])


def test_a_failure_names_its_part_and_its_innermost_cause():
    cause = ConnectionResetError("peer went away\nlong traceback")
    with pytest.raises(PartError) as caught, part("rollout", step=3):
        raise RuntimeError("wrapped") from cause
    assert str(caught.value) == "rollout: step 3: ConnectionResetError: peer went away"
    assert summary(TimeoutError("3 of 8 responses did not arrive")) == "3 of 8 responses did not arrive"
    assert summary(KeyError()) == "KeyError"
