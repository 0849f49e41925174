"""A response that is resumed on another engine, after any of its attempts, is the one that nothing interrupted."""

from collections.abc import Iterator

import pytest

from common.config import ErasurePolicy, FixedSegmentation
from common.trajectory import Attempt, ResponseRequest, Trajectory
from tests.engines import RunningEngine, SilentListener, group_requests, running_engine
from tests.models import tiny_qwen3

ALWAYS = ErasurePolicy(
    segmentation=FixedSegmentation(length=8),
    threshold=0.0,
    max_erasures=1,
    prior_strength=0.0,
    regeneration_budget=100.0,
)
HALF = ALWAYS.model_copy(update={"retry_temperature": 0.8, "regeneration_budget": 0.5})
# What earlier groups observed counts for so much, and is kept so long, that what a group itself observes hardly counts:
# a resumed response's first group is gone. A window of its own, so that the other cases leave its prior alone.
ADAPTIVE = ErasurePolicy(
    segmentation=FixedSegmentation(length=8),
    window=31,
    kappa=0.0,
    eta=0.5,
    max_erasures=2,
    retry_temperature=0.8,
    prior_strength=1e6,
    prior_decay=1 - 1e-12,
    regeneration_budget=100.0,
)
# Everything exceeds the threshold, so that erasures are spent at every segment; later the budget is.
BEST = ALWAYS.model_copy(update={"max_erasures": 2, "on_exhaustion": "best", "regeneration_budget": 1.5})
CASES = {
    "sampled": (ALWAYS, 1.0),
    "greedy with a budget": (HALF, 0.0),
    "adaptive with history": (ADAPTIVE, 0.0),
    "the best is kept": (BEST, 1.0),
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningEngine, RunningEngine]]:
    path = tiny_qwen3(tmp_path_factory.mktemp("qwen3"))
    with running_engine(path) as first, running_engine(path) as second:
        for ignore_eos in (False, True):
            # Greedy, as the responses that are resumed: others would not be compared with them.
            group = {"group_id": f"first {ignore_eos}", "group_size": 16}
            requests = group_requests(
                16, 1, max_tokens=60, seed=1, policy=ADAPTIVE, temperature=0.0, ignore_eos=ignore_eos
            )
            first.generate(request.model_copy(update=group) for request in requests)
        second.run(second.engine.restore_priors(first.run(first.engine.priors())))
        yield first, second


def resumed(request: ResponseRequest, attempts: list[Attempt]) -> ResponseRequest:
    group = f"{request.group_id}~{len(attempts)}"
    return request.model_copy(update={"group_id": group, "resume_from": attempts})


@pytest.mark.parametrize("case", CASES)
def test_a_response_resumed_after_any_attempt_is_the_uninterrupted_one(
    engines: tuple[RunningEngine, RunningEngine], case: str
) -> None:
    first, second = engines
    policy, temperature = CASES[case]
    requests = group_requests(
        100 if temperature else 9, 1, max_tokens=60, seed=7, policy=policy, temperature=temperature
    )
    requests += group_requests(1, 1, max_tokens=44, seed=8, policy=policy, temperature=temperature, ignore_eos=True)
    wholes = first.generate(requests)
    if temperature:
        stopped = [n for n, whole in enumerate(wholes) if whole.finish_reason == "stop"]
        assert stopped, "no response ended by itself: that it need not be generated again is not tested"
        some = sorted({*stopped[:3], *range(6), len(wholes) - 1})
        requests, wholes = [requests[n] for n in some], [wholes[n] for n in some]
    cuts = [(n, cut) for n, whole in enumerate(wholes) for cut in range(len(whole.attempts))]
    if policy is BEST:
        # Of an attempt that is sampled anew another one may be the best.
        cuts = [(n, cut) for n, cut in cuts if not sampled_anew(wholes[n], cut)]
    answers = second.generate(resumed(requests[n], record_at(wholes[n], cut)) for n, cut in cuts)
    assert len(cuts) > 60
    if policy is BEST:
        assert any(a.verdict == "accepted" and 0 < a.attempt < 2 for whole in wholes for a in whole.attempts)
    else:
        assert any(attempt.verdict == "accepted" and attempt.attempt == 0 for attempt in wholes[-1].attempts[:-1]) == (
            policy is not ALWAYS
        )
    if policy is ADAPTIVE:
        modulations = [attempt.judgement.modulation for attempt in wholes[-1].attempts if attempt.judgement]
        assert max(modulations) - min(modulations) > 0.1, "the history says nothing, so it is not tested"
    for (n, cut), answer in zip(cuts, answers, strict=True):
        fresh = cut if temperature > 0.0 and sampled_anew(wholes[n], cut) else None
        assert_same(answer, wholes[n], fresh)
    assert second.counters()["following"] == 0


def record_at(whole: Trajectory, cut: int) -> list[Attempt]:
    """The first `cut` attempts as they were on record then: one that is kept in the end was erased at first."""
    attempts = whole.attempts[:cut]
    under_way = whole.attempts[cut].segment
    return [a.model_copy(update={"verdict": "erased"}) if a.segment == under_way else a for a in attempts]


def sampled_anew(whole: Trajectory, cut: int) -> bool:
    """Whether a response that is resumed before attempt number `cut` samples it with other random numbers.

    Within a submission their generator goes on over segments, which no seed of its own brings back. What follows an
    attempt that ended its submission has a seed again.
    """
    return cut > 0 and whole.attempts[cut].attempt == 0 and whole.attempts[cut - 1].verdict == "accepted"


def assert_same(answer: Trajectory, whole: Trajectory, fresh: int | None) -> None:
    """`fresh`: the attempt that was sampled anew, and like the other only in its place."""
    assert answer.token_ids == whole.token_ids
    assert answer.finish_reason == whole.finish_reason
    assert answer.token_versions == whole.token_versions
    assert answer.erased_token_limit == whole.erased_token_limit
    assert len(answer.attempts) == len(whole.attempts)
    for number, (mine, other) in enumerate(zip(answer.attempts, whole.attempts, strict=True)):
        names = {"segment", "attempt", "start", "verdict", "temperature"}
        if number != fresh:
            names |= {"end", "token_ids", "versions"}
            for name in ("logprobs", "behaviour_logprobs", "signal"):
                assert getattr(mine, name) == pytest.approx(getattr(other, name), abs=1e-4)
        assert mine.model_dump(include=names) == other.model_dump(include=names)
        mine_numbers, other_numbers = numbers(mine, number == fresh), numbers(other, number == fresh)
        if fresh is not None and number > fresh:
            mine_numbers["erased before"] -= len(answer.attempts[fresh].token_ids)
            other_numbers["erased before"] -= len(whole.attempts[fresh].token_ids)
        # Log-probs are float32, and differ a little between tokens of a prompt and those of a response.
        assert mine_numbers == pytest.approx(other_numbers, abs=1e-5)


def numbers(attempt: Attempt, fresh: bool) -> dict[str, float | None]:
    """What decided over an attempt, but for what its group observed."""
    judgement = attempt.judgement
    assert judgement is not None
    history = judgement.history
    known = {
        "penalty": judgement.penalty,
        "modulation": judgement.modulation,
        "erased before": judgement.erased_tokens_before,
        "past uncertainty": history.uncertainty,
        "past mean": history.mean,
        "past deviation": history.deviation,
    }
    if fresh:
        return known
    of_tokens = ("uncertainty", "base", "extreme", "gradient", "threshold")
    return known | {name: getattr(judgement, name) for name in of_tokens}


def test_a_response_whose_answer_alone_was_lost_is_not_generated_again(
    engines: tuple[RunningEngine, RunningEngine],
) -> None:
    first, second = engines
    requests = group_requests(6, 1, max_tokens=40, seed=9, policy=ALWAYS)
    wholes = first.generate(requests)
    steps = second.counters()["steps"]
    answers = second.generate(resumed(r, whole.attempts) for r, whole in zip(requests, wholes, strict=True))
    assert second.counters()["steps"] == steps
    for answer, whole in zip(answers, wholes, strict=True):
        assert answer.attempts == whole.attempts
        assert answer.finish_reason == whole.finish_reason


class _Judged(SilentListener):
    """Keeps what it hears of a response; `wants_tokens` is whether it hears of tokens."""

    def __init__(self, wants_tokens: bool) -> None:
        self.wants_tokens = wants_tokens
        self.attempts: list[Attempt] = []
        self.finals: list[bool] = []
        self.sampled_tokens = 0
        self.cached_tokens = 0

    def sampled(self, token_ids: list[int], logprobs: object) -> None:
        self.sampled_tokens += len(token_ids)

    def resumed(self, cached_tokens: int) -> None:
        self.cached_tokens += cached_tokens

    def judged(self, attempt: Attempt, final: bool) -> None:
        self.attempts.append(attempt)
        self.finals.append(final)

    def restored(self, attempt: Attempt, kept: Attempt, final: bool) -> None:
        assert attempt.verdict == "erased"
        self.judged(attempt, final)
        (place,) = (n for n, one in enumerate(self.attempts) if one.model_copy(update={"verdict": "accepted"}) == kept)
        self.attempts[place] = kept


@pytest.mark.parametrize("wants_tokens", [True, False])
def test_a_listener_hears_of_every_attempt_with_or_without_tokens(
    engines: tuple[RunningEngine, RunningEngine], wants_tokens: bool
) -> None:
    first, _ = engines
    policy = ADAPTIVE.model_copy(update={"prior_strength": 0.0})
    (request,) = group_requests(1, 1, max_tokens=100, seed=3, policy=policy, ignore_eos=True)
    listener = _Judged(wants_tokens)
    trajectory = first.run(first.engine.generate(request, listener))
    assert listener.attempts == trajectory.attempts
    assert listener.finals == [False] * 12 + [True]
    assert listener.sampled_tokens == (trajectory.generated_tokens if wants_tokens else 0)
    assert listener.cached_tokens == trajectory.reused_prefix_tokens


@pytest.mark.parametrize("wants_tokens", [True, False])
def test_a_listener_hears_which_attempt_is_kept_in_the_end(
    engines: tuple[RunningEngine, RunningEngine], wants_tokens: bool
) -> None:
    first, _ = engines
    kept_early = 0
    policy = BEST.model_copy(update={"regeneration_budget": 100.0})
    for seed in range(6):
        (request,) = group_requests(1, 1, max_tokens=30, seed=seed, policy=policy, ignore_eos=True)
        listener = _Judged(wants_tokens)
        trajectory = first.run(first.engine.generate(request, listener))
        assert listener.attempts == trajectory.attempts
        assert listener.finals == [False] * (len(trajectory.attempts) - 1) + [True]
        assert listener.sampled_tokens == (trajectory.generated_tokens if wants_tokens else 0)
        kept_early += trajectory.attempts[-1].verdict == "erased"
    assert kept_early, "no response ended with an attempt that was kept"
    assert first.counters()["following"] == 0
