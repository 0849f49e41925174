"""The erasable engine at its limits: preemption, cancellation, leaks, temperatures, listeners, bad requests."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import ErasurePolicy, FixedSegmentation
from common.trajectory import Attempt, ResponseRequest
from rollout_server.engine.errors import PromptTooLong
from rollout_server.monitor.spec import statistics_kind
from tests.engines import ReferenceModel, RunningEngine, SilentListener, group_requests, running_engine
from tests.models import tiny_qwen3

POLICY = ErasurePolicy(segmentation=FixedSegmentation(length=8), kappa=0.0, max_erasures=3)
ALWAYS = POLICY.model_copy(update={"threshold": 0.0, "regeneration_budget": 100.0})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[RunningEngine]:
    with running_engine(path, max_concurrent_responses=64) as running:
        yield running


@pytest.fixture(scope="module")
def reference(path: Path) -> ReferenceModel:
    return ReferenceModel(path)


def test_preempted_requests_keep_their_state(path: Path, reference: ReferenceModel) -> None:
    # 24 responses of up to 20 + 120 tokens want 24 x 5 blocks of 32; there are 40.
    requests = group_requests(6, 4, max_tokens=120, seed=3, policy=POLICY, ignore_eos=True)
    with running_engine(path, max_concurrent_responses=24, num_gpu_blocks_override=40) as small:
        trajectories = small.generate(requests)
        counters = small.counters()
    assert counters["resumed"] > 10, "vLLM preempted too little for this test to mean anything"
    assert counters["following"] == 0
    for trajectory in trajectories:
        assert len(trajectory.token_ids) == 120
        judged = [(a.segment, a.attempt) for a in trajectory.attempts]
        assert len(judged) == len(set(judged)), "a segment was judged twice"
        assert [a.segment for a in trajectory.accepted] == list(range(15))
        expected = reference.logprobs(trajectory.prompt_token_ids, trajectory.token_ids)
        torch.testing.assert_close(torch.tensor(trajectory.logprobs).double(), expected, atol=1e-4, rtol=0)


def test_an_always_exceeded_threshold_erases_every_segment_as_often_as_allowed(engine: RunningEngine) -> None:
    (trajectory,) = engine.generate(group_requests(1, 1, max_tokens=24, policy=ALWAYS, ignore_eos=True))
    assert [(a.segment, a.attempt) for a in trajectory.attempts] == [(s, e) for s in range(3) for e in range(4)]
    assert trajectory.erased_tokens == 3 * 3 * 8
    assert trajectory.generated_tokens == 4 * 24


def test_the_budget_ends_erasure(engine: RunningEngine) -> None:
    policy = ALWAYS.model_copy(update={"regeneration_budget": 0.5})
    (trajectory,) = engine.generate(group_requests(1, 1, max_tokens=40, policy=policy, ignore_eos=True))
    # 20 tokens may be erased: two segments of 8, a third would make 24.
    assert [(a.segment, a.attempt) for a in trajectory.attempts if a.verdict == "erased"] == [(0, 0), (0, 1)]


def test_the_last_partial_segment_is_judged_too(engine: RunningEngine) -> None:
    (trajectory,) = engine.generate(group_requests(1, 1, max_tokens=11, policy=ALWAYS, ignore_eos=True))
    assert [(a.start, a.end, a.verdict) for a in trajectory.attempts][-1] == (8, 11, "accepted")
    assert sum(a.verdict == "erased" for a in trajectory.attempts if a.segment == 1) == 3


def test_a_regenerated_segment_differs_and_a_seed_reproduces_all(engine: RunningEngine) -> None:
    requests = group_requests(1, 1, max_tokens=24, policy=ALWAYS, ignore_eos=True)
    first, second = engine.generate(requests)[0], engine.generate(requests)[0]
    assert [a.token_ids for a in first.attempts] == [a.token_ids for a in second.attempts]
    assert len({tuple(a.token_ids) for a in first.attempts if a.segment == 0}) == 4


def test_regenerated_segments_are_sampled_at_the_retry_temperature(
    engine: RunningEngine, reference: ReferenceModel
) -> None:
    policy = ALWAYS.model_copy(update={"retry_temperature": 1.6})
    requests = group_requests(4, 2, max_tokens=24, policy=policy, temperature=0.6, ignore_eos=True)
    for trajectory in engine.generate(requests):
        for attempt in trajectory.attempts:
            assert attempt.temperature == pytest.approx(1.6 if attempt.attempt else 0.6)
            prompt = trajectory.prompt_token_ids + trajectory.token_ids[: attempt.start]
            expected = reference.logprobs(prompt, attempt.token_ids, attempt.temperature)
            behaviour = torch.tensor(attempt.behaviour_logprobs).double()
            torch.testing.assert_close(behaviour, expected, atol=1e-4, rtol=0)
            own = reference.logprobs(prompt, attempt.token_ids)
            torch.testing.assert_close(torch.tensor(attempt.logprobs).double(), own, atol=1e-4, rtol=0)


def test_after_a_greedy_response_regenerates_a_segment_it_is_greedy_again(
    engine: RunningEngine, reference: ReferenceModel
) -> None:
    # Segments of a greedy group differ between prompts only, so a prior of earlier groups is what judges them.
    policy = POLICY.model_copy(update={"retry_temperature": 0.8, "kappa": -1.0, "max_erasures": 1})
    greedy: dict[str, Any] = {"max_tokens": 48, "policy": policy, "temperature": 0.0, "ignore_eos": True}
    engine.generate(group_requests(4, 2, seed=4, **greedy))
    trajectories = engine.generate(group_requests(12, 2, seed=5, **greedy))
    retried = greedy_after_retry = 0
    for trajectory in trajectories:
        best = reference.logits(trajectory.prompt_token_ids, trajectory.token_ids)
        best[:, list(engine.engine.sentinel_ids)] = -float("inf")
        for attempt in trajectory.accepted:
            chosen = best[attempt.start : attempt.end].argmax(-1).tolist()
            if attempt.attempt:
                retried += 1
            else:
                greedy_after_retry += retried > 0
                assert attempt.token_ids == chosen
                assert set(attempt.behaviour_logprobs) == {0.0}
    assert retried > 5
    assert greedy_after_retry > 5


def test_greedy_erasure_without_a_retry_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match="set retry_temperature"):
        group_requests(1, 1, max_tokens=8, policy=POLICY, temperature=0.0)


def test_a_prompt_that_does_not_fit_is_refused_with_both_lengths(engine: RunningEngine) -> None:
    (request,) = group_requests(1, 1, max_tokens=240, policy=POLICY)
    with pytest.raises(PromptTooLong, match=r"prompt \(20 tokens\).*240.*256"):
        engine.generate([request])


def test_a_burst_of_long_prompts_with_seeds_is_served(engine: RunningEngine, reference: ReferenceModel) -> None:
    """More tokens than one step takes, so that vLLM would compute some prompts in parts."""
    requests = group_requests(40, 1, max_tokens=4, prompt_tokens=200, seed=19, policy=POLICY)
    for trajectory in engine.generate(requests):
        expected = reference.logprobs(trajectory.prompt_token_ids, trajectory.token_ids)
        torch.testing.assert_close(torch.tensor(trajectory.logprobs).double(), expected, atol=1e-4, rtol=0)


def test_cancelled_responses_free_their_blocks_and_their_groups(engine: RunningEngine) -> None:
    requests = group_requests(8, 4, max_tokens=200, seed=11, policy=POLICY, ignore_eos=True)

    async def cancel_half_way() -> None:
        listening = [_Listener() for _ in requests]
        tasks = [
            asyncio.create_task(engine.engine.generate(r, listener))
            for r, listener in zip(requests, listening, strict=True)
        ]
        await listening[-1].first.wait()
        for task in tasks[1:]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(result, asyncio.CancelledError) for result in results) == len(requests) - 1

    engine.run(cancel_half_way())
    assert engine.counters()["following"] == 0
    assert engine.run(engine.engine.llm.reset_prefix_cache()), "KV blocks are still in use"


def test_a_response_that_left_before_it_reached_the_batch_keeps_no_group_open(engine: RunningEngine) -> None:
    first, *others = group_requests(1, 4, max_tokens=16, seed=23, policy=POLICY, ignore_eos=True)

    async def leave_at_once() -> None:
        task = asyncio.create_task(engine.engine.generate(first))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    engine.run(leave_at_once())
    engine.run(engine.engine.settle())
    engine.generate(others)
    assert engine.counters()["following"] == 0


def test_ten_thousand_requests_leave_nothing_behind(engine: RunningEngine) -> None:
    policy = POLICY.model_copy(update={"segmentation": FixedSegmentation(length=1), "max_erasures": 1})
    requests = group_requests(2500, 4, max_tokens=2, prompt_tokens=3, policy=policy, ignore_eos=True)
    trajectories = engine.generate(requests)
    assert sum(t.erasures for t in trajectories) > 1000
    assert all(len(t.token_ids) == 2 for t in trajectories)
    counters = engine.counters()
    assert counters["following"] == 0
    assert counters["slots"] <= 2 * 64, "more slots than 64 concurrent requests can need"
    assert engine.run(engine.engine.llm.reset_prefix_cache()), "KV blocks are still in use"


class _Listener(SilentListener):
    """Applies what it is told to a text of its own, as a client of a live stream would."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.tokens: list[int] = []
        self.committed: list[int] = []

    def resumed(self, cached_tokens: int) -> None:
        pass

    def sampled(self, token_ids: list[int], logprobs: object) -> None:
        self.first.set()
        self.tokens += token_ids

    def judged(self, attempt: Attempt, final: bool) -> None:
        if attempt.verdict == "erased":
            assert self.tokens[len(self.committed) :] == attempt.token_ids
            del self.tokens[len(self.committed) :]
        else:
            self.committed += attempt.token_ids
            assert self.tokens[: len(self.committed)] == self.committed


def test_a_listener_sees_the_committed_response_grow(engine: RunningEngine) -> None:
    requests = group_requests(6, 4, max_tokens=60, seed=13, policy=POLICY)
    listeners = [_Listener() for _ in requests]

    async def together() -> list:
        return await asyncio.gather(
            *(engine.engine.generate(r, listener) for r, listener in zip(requests, listeners, strict=True))
        )

    trajectories = engine.run(together())
    assert sum(t.erasures for t in trajectories) > 0
    for trajectory, listener in zip(trajectories, listeners, strict=True):
        assert listener.committed == listener.tokens == trajectory.token_ids


def test_responses_without_a_seed_differ(engine: RunningEngine) -> None:
    request = ResponseRequest(
        prompt_id="p", group_id="g", group_size=2, sample=0, prompt_token_ids=[1, 2, 3], max_tokens=16, policy=POLICY
    )
    first, second = engine.generate([request, request.model_copy(update={"sample": 1})])
    assert first.token_ids != second.token_ids


def test_priors_carry_over_to_a_restarted_engine(engine: RunningEngine, path: Path) -> None:
    engine.generate(group_requests(4, 4, max_tokens=40, seed=17, policy=POLICY, ignore_eos=True))
    priors = engine.run(engine.engine.priors())
    assert priors
    with running_engine(path, max_concurrent_responses=8) as other:
        other.run(other.engine.restore_priors(priors))
        assert other.run(other.engine.priors()) == priors
        requests = group_requests(1, 2, max_tokens=8, seed=17, policy=POLICY, ignore_eos=True)
        (first, *_) = other.generate(requests)
    statistics = first.attempts[0].judgement.statistics
    assert statistics.prior_strength == POLICY.prior_strength
    known = priors[statistics_kind(requests[0], POLICY)]
    assert statistics.prior_mean == pytest.approx(known[0][1])
