"""The invariants of the algorithm (`algorithm.md`, section 8) on a real engine, with two model families."""

import asyncio
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams, TokensPrompt
from vllm.sampling_params import RequestOutputKind

from common.config import DelimiterSegmentation, ErasurePolicy, FixedSegmentation, SignalWeights
from common.segmentation import segment_length
from common.threshold import History, adaptive_threshold, is_erased, kept_attempt, shrunk_moments
from common.token_bytes import token_bytes
from common.trajectory import Attempt, ResponseRequest, SamplingExtras, Trajectory
from common.uncertainty import segment_uncertainty, token_signal
from tests.engines import ReferenceModel, RunningEngine, group_requests, running_engine
from tests.models import byte_tokenizer, tiny_llama, tiny_qwen3

TOLERANCE = 1e-4
TOKEN_BYTES = [*token_bytes(byte_tokenizer(64)), *[b""] * 64]
"""Also of the model's rows that no token has."""
TWO_BYTES = [f"{letter}\x01" for letter in "bcdfghij"]
"""Each of two tokens."""
FAMILIES = {"qwen3-tied": lambda path: tiny_qwen3(path, tied=True), "llama-untied": tiny_llama}
POLICIES = {
    "fixed": ErasurePolicy(segmentation=FixedSegmentation(length=7), kappa=0.0, gamma=0.1, eta=0.3, max_erasures=3),
    "delimiter": ErasurePolicy(
        segmentation=DelimiterSegmentation(delimiter=("e", "a", *TWO_BYTES), min_length=2, max_length=11),
        signal="entropy",
        window=3,
        weights=SignalWeights(base=0.5, extreme=0.7, gradient=0.2),
        kappa=-0.3,
        gamma=0.05,
        eta=0.5,
        max_erasures=4,
        regeneration_budget=0.6,
        prior_strength=3.0,
        observe="all",
    ),
    # Exhausted by either limit; segments of different lengths, so that not every attempt can be afforded.
    "best": ErasurePolicy(
        segmentation=DelimiterSegmentation(delimiter="e", min_length=2, max_length=9),
        kappa=-0.5,
        gamma=0.0,
        eta=0.3,
        max_erasures=2,
        regeneration_budget=0.7,
        on_exhaustion="best",
        statistics="group",
        min_uncertainty=0.0,
        window=2,
    ),
}


class Family:
    """A running engine, the same model in transformers, and one set of trajectories for each policy."""

    def __init__(self, path: Path, engine: RunningEngine) -> None:
        self.path = path
        self.engine = engine
        self.reference = ReferenceModel(path)
        self._trajectories: dict[str, list[Trajectory]] = {}

    def trajectories(self, policy: str) -> list[Trajectory]:
        """12 groups of 4, the first member of each plain, all 48 responses at once."""
        if policy not in self._trajectories:
            requests = group_requests(12, 4, max_tokens=60, seed=len(policy), policy=POLICIES[policy])
            requests = [r.model_copy(update={"erasable": r.sample > 0}) for r in requests]
            self._trajectories[policy] = self.engine.generate(requests)
        return self._trajectories[policy]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    path = FAMILIES[request.param](tmp_path_factory.mktemp(request.param))
    with running_engine(path, max_concurrent_responses=32) as engine:
        yield Family(path, engine)


@pytest.fixture(params=list(POLICIES))
def trajectories(family: Family, request: pytest.FixtureRequest) -> list[Trajectory]:
    return family.trajectories(request.param)


def ends_segment(trajectory: Trajectory, number: int) -> bool:
    """Whether an attempt is the last at its segment."""
    later = trajectory.attempts[number + 1 : number + 2]
    return not later or later[0].segment != trajectory.attempts[number].segment


def prefix_of(trajectory: Trajectory, attempt: Attempt) -> list[int]:
    """The committed tokens before an attempt."""
    return trajectory.token_ids[: attempt.start]


def test_something_is_erased_and_something_is_not(trajectories: list[Trajectory]) -> None:
    erased = sum(t.erasures for t in trajectories)
    assert erased > 20
    assert sum(len(t.accepted) for t in trajectories) > 20
    assert any(a.attempt > 1 for t in trajectories for a in t.attempts)


def test_committed_tokens_are_the_accepted_attempts_without_a_sentinel(
    family: Family, trajectories: list[Trajectory]
) -> None:
    sentinels = set(family.engine.engine.sentinel_ids)
    for trajectory in trajectories:
        position = 0
        for number, attempt in enumerate(trajectory.attempts):
            assert attempt.start == position
            assert attempt.end - attempt.start == len(attempt.token_ids) > 0
            assert not sentinels & set(attempt.token_ids)
            # Another attempt at the same segment may follow the one that was kept.
            if ends_segment(trajectory, number):
                (kept,) = (a for a in trajectory.accepted if a.segment == attempt.segment)
                position = kept.end
        assert position == len(trajectory.token_ids) <= 60
        ended = trajectory.token_ids[-1] in family.engine.engine.eos_token_ids
        assert ended == (trajectory.finish_reason == "stop")
        assert ended or position == 60
        assert not set(trajectory.token_ids[:-1]) & set(family.engine.engine.eos_token_ids)


def test_segments_end_where_the_segmentation_says(trajectories: list[Trajectory]) -> None:
    for trajectory in trajectories:
        segmentation = trajectory.policy.segmentation
        for attempt in trajectory.attempts:
            last = attempt.end == 60 or attempt.token_ids[-1] == 256
            texts = [TOKEN_BYTES[token] for token in attempt.token_ids]
            length = segment_length(texts, segmentation, 60 - attempt.start)
            assert length == len(texts) or (length is None and last)


def byte_token(character: str) -> int:
    """The test tokenizer's id of an ASCII character."""
    (token,) = byte_tokenizer(256)(character)["input_ids"]
    return token


def test_every_log_prob_is_the_policys_given_only_the_committed_prefix(
    family: Family, trajectories: list[Trajectory]
) -> None:
    for trajectory in trajectories:
        expected = family.reference.logprobs(trajectory.prompt_token_ids, trajectory.token_ids)
        torch.testing.assert_close(torch.tensor(trajectory.logprobs).double(), expected, atol=TOLERANCE, rtol=0)
        assert trajectory.behaviour_logprobs == trajectory.logprobs


def test_erased_attempts_are_recorded_with_their_own_log_probs(family: Family, trajectories: list[Trajectory]) -> None:
    erased = [(t, a) for t in trajectories for a in t.attempts if a.verdict == "erased"]
    for trajectory, attempt in erased[::5]:
        prompt = trajectory.prompt_token_ids + prefix_of(trajectory, attempt)
        expected = family.reference.logprobs(prompt, attempt.token_ids)
        torch.testing.assert_close(torch.tensor(attempt.logprobs).double(), expected, atol=TOLERANCE, rtol=0)


def test_uncertainty_equals_the_reference_on_a_transformers_forward_pass(
    family: Family, trajectories: list[Trajectory]
) -> None:
    for trajectory in trajectories[::3]:
        policy = trajectory.policy
        for attempt in trajectory.attempts:
            prompt = trajectory.prompt_token_ids + prefix_of(trajectory, attempt)
            logits = family.reference.logits(prompt, attempt.token_ids)
            signal = token_signal(logits, torch.tensor(attempt.token_ids), policy.signal)
            torch.testing.assert_close(torch.tensor(attempt.signal).double(), signal, atol=TOLERANCE, rtol=0)
            expected = segment_uncertainty(signal, policy.window, policy.weights)
            judgement = attempt.judgement
            for part in ("uncertainty", "base", "extreme", "gradient"):
                assert getattr(judgement, part) == pytest.approx(getattr(expected, part), abs=TOLERANCE)


def test_a_record_replays_to_the_same_threshold_and_verdict(trajectories: list[Trajectory]) -> None:
    for trajectory in trajectories:
        for number, attempt in enumerate(trajectory.attempts):
            policy, judgement = trajectory.policy, attempt.judgement
            replayed = adaptive_threshold(policy, judgement.statistics, judgement.history, attempt.attempt)
            for factor in ("baseline", "penalty", "modulation", "threshold"):
                recorded = getattr(judgement, factor)
                assert (math.inf if recorded is None else recorded) == pytest.approx(
                    getattr(replayed, factor), abs=TOLERANCE
                )
            erased = trajectory.erasable and is_erased(
                policy,
                judgement.uncertainty,
                replayed.threshold,
                attempt.attempt,
                judgement.erased_tokens_before,
                len(attempt.token_ids),
                trajectory.erased_token_limit,
            )
            assert erased == (not ends_segment(trajectory, number))
            if not erased:
                own = [a for a in trajectory.attempts if a.segment == attempt.segment]
                judgements = [a.judgement for a in own]
                kept = len(own) - 1
                if policy.on_exhaustion == "best" and judgement.uncertainty > replayed.threshold:
                    kept = kept_attempt(
                        [j.uncertainty for j in judgements],
                        [len(a.token_ids) for a in own],
                        judgements[0].erased_tokens_before,
                        trajectory.erased_token_limit,
                    )
                assert [a.verdict == "accepted" for a in own] == [n == kept for n in range(len(own))]


def test_group_statistics_are_those_of_the_groups_own_attempts(trajectories: list[Trajectory]) -> None:
    groups = defaultdict(list)
    for trajectory in trajectories:
        groups[trajectory.group_id].append(trajectory)
    for members in groups.values():
        observed: dict[int, list[float]] = defaultdict(list)
        latest = {}
        by_index = members[0].policy.statistics == "index"

        def place(attempt: Attempt, by_index: bool = by_index) -> int:
            return attempt.segment if by_index else 0

        for attempt in (a for t in members for a in t.attempts):
            if attempt.attempt == 0 or members[0].policy.observe == "all":
                observed[place(attempt)].append(attempt.judgement.uncertainty)
            seen = latest.get(place(attempt))
            if seen is None or attempt.judgement.statistics.count > seen.count:
                latest[place(attempt)] = attempt.judgement.statistics
        for segment, values in observed.items():
            values = torch.tensor(values, dtype=torch.float64)
            assert latest[segment].count == len(values)
            assert latest[segment].mean == pytest.approx(float(values.mean()), abs=1e-9)
            assert latest[segment].variance == pytest.approx(float(values.var(correction=0)), abs=1e-9)


def test_history_is_the_sum_over_accepted_segments(trajectories: list[Trajectory]) -> None:
    for trajectory in trajectories:
        history = History()
        for number, attempt in enumerate(trajectory.attempts):
            for name in ("uncertainty", "mean", "deviation"):
                assert getattr(attempt.judgement.history, name) == pytest.approx(getattr(history, name), abs=1e-9)
            if not ends_segment(trajectory, number):
                continue
            (kept,) = (a for a in trajectory.accepted if a.segment == attempt.segment)
            moments = shrunk_moments(kept.judgement.statistics)
            if moments is not None:
                history = History(
                    history.uncertainty + kept.judgement.uncertainty,
                    history.mean + moments[0],
                    history.deviation + moments[1],
                )


def test_erasures_stay_within_their_limits_and_plain_members_have_none(trajectories: list[Trajectory]) -> None:
    for trajectory in trajectories:
        assert max(a.attempt for a in trajectory.attempts) <= trajectory.policy.max_erasures
        assert trajectory.erased_tokens <= trajectory.erased_token_limit
        assert trajectory.erased_token_limit == int(trajectory.policy.regeneration_budget * 60)
        if not trajectory.erasable:
            assert trajectory.erasures == 0
            assert all(a.judgement is not None for a in trajectory.attempts)


def test_the_least_uncertain_attempt_is_kept_with_its_own_tokens_and_log_probs(family: Family) -> None:
    """That its log-probs, and those of what follows, are the policy's given the committed prefix is tested above."""
    restored = exhausted = ended = 0
    for trajectory in family.trajectories("best"):
        for kept in trajectory.accepted:
            own = [a for a in trajectory.attempts if a.segment == kept.segment]
            if kept is not own[-1]:
                restored += 1
                assert kept.judgement.uncertainty == min(
                    a.judgement.uncertainty for a in own if is_affordable(a, own, trajectory)
                )
                exhausted += len(own) <= trajectory.policy.max_erasures
                ended += kept is trajectory.accepted[-1]
    assert restored > 20
    assert exhausted, "no segment whose erasures the budget ended"
    assert ended, "no response that ends with an attempt that was kept"


def is_affordable(attempt: Attempt, own: list[Attempt], trajectory: Trajectory) -> bool:
    """Whether the others of a segment's attempts can count as erased."""
    others = sum(len(a.token_ids) for a in own if a is not attempt)
    return own[0].judgement.erased_tokens_before + others <= trajectory.erased_token_limit


def test_every_token_carries_the_version_that_sampled_it(trajectories: list[Trajectory]) -> None:
    for trajectory in trajectories:
        assert trajectory.token_versions == [0] * len(trajectory.token_ids)


def test_nothing_is_left_behind(family: Family) -> None:
    family.trajectories("fixed")
    assert family.engine.counters()["following"] == 0
    assert family.engine.run(family.engine.engine.llm.reset_prefix_cache()), "KV blocks are still in use"


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_an_infinite_threshold_gives_plain_vllms_tokens(family: Family, temperature: float) -> None:
    requests = group_requests(8, 2, max_tokens=50, seed=7, temperature=temperature)
    monitored = [
        r.model_copy(
            update={
                "policy": ErasurePolicy(
                    segmentation=FixedSegmentation(length=8), threshold=math.inf, retry_temperature=1.0
                )
            }
        )
        for r in requests
    ]
    erasable = family.engine.generate(monitored)
    # Rows of the random test models that stand for sentinels are as likely as others: not so in a trained model.
    plain = plain_vllm(family.engine, requests, excluded=family.engine.engine.sentinel_ids)
    assert [t.token_ids for t in erasable] == plain
    assert {t.finish_reason for t in erasable} <= {"stop", "length"}


EXTRAS: dict[str, dict[str, Any]] = {
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
    "biases and masks": {
        "logit_bias": {65: 4.0, 256: 3.0, 70: -100.0},
        "allowed_token_ids": (*range(64, 90), 256),
        "bad_words": ("ab", "b", "cde", "ca"),
        "min_tokens": 20,
        "stop_token_ids": (66, 80),
    },
    "short": {"min_tokens": 12, "stop_token_ids": tuple(range(60, 100)), "frequency_penalty": -0.5},
}


@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.parametrize("temperature", [0.9, 0.0])
def test_with_extras_an_infinite_threshold_gives_plain_vllms_tokens(
    family: Family, name: str, temperature: float
) -> None:
    """The plain path is vLLM's own implementation; the monitored one is the adapter's."""
    extras = SamplingExtras(**EXTRAS[name])
    requests = group_requests(8, 2, max_tokens=50, seed=17, temperature=temperature, extras=extras)
    policy = ErasurePolicy(segmentation=FixedSegmentation(length=8), threshold=math.inf, retry_temperature=1.0)
    erasable = family.engine.generate([r.model_copy(update={"policy": policy}) for r in requests])
    sentinels = dict.fromkeys(family.engine.engine.sentinel_ids, -100.0)
    biased = extras.model_copy(update={"logit_bias": {**extras.logit_bias, **sentinels}})
    plain = family.engine.generate([r.model_copy(update={"extras": biased}) for r in requests])
    assert [t.token_ids for t in erasable] == [t.token_ids for t in plain]
    assert [t.finish_reason for t in erasable] == [t.finish_reason for t in plain]
    assert min(len(t.token_ids) for t in plain) >= extras.min_tokens


@pytest.mark.parametrize("name", EXTRAS)
def test_with_extras_every_token_is_the_best_given_the_committed_prefix(family: Family, name: str) -> None:
    """Greedy first attempts, with erasures between: each token is what transformers and a few lines here find best."""
    extras = SamplingExtras(**EXTRAS[name])
    policy = ErasurePolicy(
        segmentation=FixedSegmentation(length=5), threshold=0.0, max_erasures=1, retry_temperature=1.0
    )
    common = {"max_tokens": 40, "temperature": 0.0, "extras": extras, "policy": policy}
    checked = 0
    for trajectory in family.engine.generate(group_requests(6, 2, seed=23, **common)):
        for attempt in trajectory.attempts:
            committed = trajectory.token_ids[: attempt.start]
            logits = family.reference.logits(trajectory.prompt_token_ids + committed, attempt.token_ids)
            logits[:, list(family.engine.engine.sentinel_ids)] = -math.inf
            for place, token in enumerate(attempt.token_ids):
                so_far = committed + attempt.token_ids[:place]
                adjusted = adjusted_logits(logits[place], extras, trajectory.prompt_token_ids, so_far)
                assert adjusted[token] > -math.inf
                if attempt.attempt == 0:
                    assert adjusted[token] >= adjusted.max() - TOLERANCE
                    checked += 1
    assert checked > 100
    assert family.engine.counters()["following"] == 0


def adjusted_logits(logits: torch.Tensor, extras: SamplingExtras, prompt: list[int], so_far: list[int]) -> torch.Tensor:
    """OpenAI's and vLLM's definitions, for one position."""
    result = logits.clone()
    for token in range(len(result)):
        value = float(result[token]) + extras.logit_bias.get(token, 0.0)
        if token in prompt or token in so_far:
            value = value / extras.repetition_penalty if value > 0 else value * extras.repetition_penalty
        count = so_far.count(token)
        value -= extras.frequency_penalty * count + extras.presence_penalty * (count > 0)
        banned = extras.allowed_token_ids is not None and token not in extras.allowed_token_ids
        ends = len(so_far) < extras.min_tokens and token in (256, *extras.stop_token_ids)
        result[token] = -math.inf if banned or ends else value
    for word in extras.bad_words:
        *before, last = [byte_token(character) for character in word]
        if so_far[len(so_far) - len(before) :] == before:
            result[last] = -math.inf
    return result


def test_a_prompts_scores_are_those_of_transformers(family: Family) -> None:
    prompt = group_requests(1, 1, max_tokens=1, prompt_tokens=60)[0].prompt_token_ids
    scores = family.engine.run(family.engine.engine.score(prompt, 3))
    expected = torch.log_softmax(family.reference.logits(prompt[:1], prompt[1:]), dim=-1)
    assert scores[0] is None
    assert len(scores) == len(prompt)
    for token, known, row in zip(prompt[1:], scores[1:], expected, strict=True):
        assert known[token][0] == pytest.approx(float(row[token]), abs=TOLERANCE)
        assert known[token][1] == int((row > row[token]).sum()) + 1
        for likely in row.topk(3).indices.tolist():
            assert known[likely][0] == pytest.approx(float(row[likely]), abs=TOLERANCE)


def plain_vllm(engine: RunningEngine, requests: list[ResponseRequest], excluded: Iterable[int] = ()) -> list[list[int]]:
    """What vLLM itself samples, without any monitor, from a vocabulary without `excluded`."""

    async def one(number: int) -> list[int]:
        request = requests[number]
        params = SamplingParams(
            temperature=request.temperature,
            seed=request.seed,
            max_tokens=request.max_tokens,
            logit_bias=dict.fromkeys(excluded, -100.0),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = TokensPrompt(prompt_token_ids=request.prompt_token_ids)
        async for output in engine.engine.llm.generate(
            prompt, params, f"reference-{request.seed}-{request.temperature}"
        ):
            tokens = list(output.outputs[0].token_ids)
        return tokens

    async def together() -> list[list[int]]:
        return await asyncio.gather(*(one(number) for number in range(len(requests))))

    return engine.run(together())


def test_without_a_policy_the_engine_is_plain_vllm(family: Family) -> None:
    requests = group_requests(4, 2, max_tokens=30, seed=9, temperature=0.0)
    trajectories = family.engine.generate(requests)
    assert [t.token_ids for t in trajectories] == plain_vllm(family.engine, requests)
    assert all(a.judgement is None for t in trajectories for a in t.attempts)
