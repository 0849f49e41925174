"""What becomes of responses that are under way at a sync: in all modes their tokens say which weights made them."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.config import ErasurePolicy, FixedSegmentation
from common.config.run import InFlight
from common.trajectory import ResponseRequest, Trajectory
from rollout_server.engine.errors import GenerationAborted, WeightSyncError
from tests.engines import ReferenceModel, RunningEngine, SilentListener, group_requests, running_engine
from tests.integration.weights.test_weight_sync import DEADLINE, update_from
from tests.models import tiny_qwen3

MONITORED = ErasurePolicy(segmentation=FixedSegmentation(length=8), max_erasures=0)
ERASING = ErasurePolicy(segmentation=FixedSegmentation(length=8), threshold=0.0, max_erasures=1, prior_strength=0.0)
TOKENS = 150


class Weights:
    """An engine, and the two sets of weights that it is given in turn."""

    def __init__(self, engine: RunningEngine, checkpoints: list[Path], directory: Path) -> None:
        self.engine = engine
        self.checkpoints = checkpoints
        self.directory = directory
        self.version = 0

    @property
    def here(self) -> ReferenceModel:
        """What the engine holds, in transformers."""
        return ReferenceModel(self.checkpoints[self.version % 2])

    async def sync(self, in_flight: InFlight, deadline: float = DEADLINE) -> None:
        update = update_from(self.checkpoints[(self.version + 1) % 2], self.version + 1, self.directory)
        await self.engine.engine.sync(update, deadline, in_flight)
        self.version += 1

    async def half_way(
        self, requests: list[ResponseRequest], in_flight: InFlight, deadline: float = DEADLINE
    ) -> list[Trajectory | BaseException]:
        """What `requests`, and then the same ones once more, end with: the weights change while the first are made."""
        listener = _AfterTokens(20)
        generate = self.engine.engine.generate
        first = [asyncio.create_task(generate(r, listener if n == 0 else None)) for n, r in enumerate(requests)]
        await asyncio.wait_for(listener.reached.wait(), DEADLINE)
        syncing = asyncio.create_task(self.sync(in_flight, deadline))
        # The weights are received while the engine goes on.
        while self.engine.engine._admitting.is_set() and not syncing.done():
            await asyncio.sleep(0.0)
        others = [r.model_copy(update={"group_id": f"{r.group_id} later"}) for r in requests]
        second = [asyncio.create_task(generate(request)) for request in others]
        await asyncio.gather(syncing, return_exceptions=deadline < DEADLINE)
        return await asyncio.gather(*first, *second, return_exceptions=True)


class _AfterTokens(SilentListener):
    def __init__(self, count: int) -> None:
        self.left = count
        self.reached = asyncio.Event()

    def sampled(self, token_ids: list[int], logprobs: object) -> None:
        self.left -= len(token_ids)
        if self.left <= 0:
            self.reached.set()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weights]:
    directory = tmp_path_factory.mktemp("in_flight")
    checkpoints = [tiny_qwen3(directory / str(seed), seed=seed) for seed in range(2)]
    with running_engine(checkpoints[0], max_concurrent_responses=16) as engine:
        yield Weights(engine, checkpoints, directory)


def some(policy: ErasurePolicy, seed: int) -> list[ResponseRequest]:
    """Eight responses of `TOKENS` tokens, whose prompts fill more than two blocks of the KV cache."""
    return group_requests(4, 2, max_tokens=TOKENS, prompt_tokens=70, seed=seed, policy=policy, ignore_eos=True)


def assert_made_by(answer: Trajectory, references: dict[int, ReferenceModel]) -> None:
    """Every token's log-prob is that of the weights that its label names, given all that comes before it."""
    versions = torch.tensor(answer.token_versions)
    assert len(versions) == len(answer.token_ids) == TOKENS
    assert set(versions.tolist()) <= references.keys()
    expected = torch.zeros(TOKENS, dtype=torch.float64)
    for version, reference in references.items():
        logprobs = reference.logprobs(answer.prompt_token_ids, answer.token_ids)
        expected = torch.where(versions == version, logprobs, expected)
    torch.testing.assert_close(torch.tensor(answer.logprobs).double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("policy", [MONITORED, ERASING], ids=["monitored", "erasing"])
@pytest.mark.parametrize("in_flight", ["recompute", "wait", "abort"])
def test_log_probs_are_those_of_the_weights_on_the_label(
    weights: Weights, in_flight: InFlight, policy: ErasurePolicy
) -> None:
    before, old = weights.here, weights.version
    ends = weights.engine.run(weights.half_way(some(policy, seed=old + 1), in_flight))
    references = {old: before, weights.version: weights.here}
    first, second = ends[:8], ends[8:]
    for answer in second:
        assert isinstance(answer, Trajectory)
        assert set(answer.token_versions) == {weights.version}
        assert_made_by(answer, references)
    labels = set()
    for answer in first:
        if in_flight == "abort":
            assert isinstance(answer, GenerationAborted)
            continue
        assert isinstance(answer, Trajectory)
        assert_made_by(answer, references)
        labels.add(frozenset(answer.token_versions))
    expected = {"recompute": {frozenset(references)}, "wait": {frozenset({old})}, "abort": set()}
    assert labels == expected[in_flight]
    assert weights.engine.counters()["following"] == 0


@torch.no_grad()
def kept_logprobs(
    old: ReferenceModel, new: ReferenceModel, prompt: list[int], response: list[int], by_old: int
) -> torch.Tensor:
    """Log-probs where `old` made the KV cache up to the last of its `by_old` tokens, and `new` went on with it."""
    ids = torch.tensor([prompt + response])
    # The last token that was sampled is computed when the next one is: by the new weights.
    cut = len(prompt) + by_old - 1
    past = old.model(ids[:, :cut], use_cache=True)
    rest = new.model(ids[:, cut:], past_key_values=past.past_key_values)
    logits = torch.cat([past.logits, rest.logits], dim=1)[0, len(prompt) - 1 : -1].double()
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(response).unsqueeze(-1)).squeeze(-1)


def test_keep_goes_on_with_the_old_cache_and_lends_it_to_nobody(weights: Weights) -> None:
    before, old = weights.here, weights.version
    requests = some(MONITORED, seed=old + 1)
    ends = weights.engine.run(weights.half_way(requests, "keep"))
    after = weights.here
    worst = 0.0
    for answer in ends[:8]:
        assert isinstance(answer, Trajectory)
        by_old = answer.token_versions.count(old)
        assert answer.token_versions == [old] * by_old + [weights.version] * (TOKENS - by_old)
        assert 0 < by_old < TOKENS
        found = torch.tensor(answer.logprobs).double()
        kept = kept_logprobs(before, after, answer.prompt_token_ids, answer.token_ids, by_old)
        torch.testing.assert_close(found, kept, atol=1e-4, rtol=0)
        worst = max(
            worst, float((found - after.logprobs(answer.prompt_token_ids, answer.token_ids))[by_old:].abs().max())
        )
    assert worst > 0.01, "the old cache made no difference, so that this test shows nothing"
    # The same prompts again, at once and later: none of the old cache is in what they say.
    later = weights.engine.generate(r.model_copy(update={"group_id": f"{r.group_id} again"}) for r in requests)
    for answer in (*ends[8:], *later):
        assert isinstance(answer, Trajectory)
        assert_made_by(answer, {weights.version: after})


def test_erasures_under_keep_label_their_tokens_with_what_made_them(weights: Weights) -> None:
    old = weights.version
    ends = weights.engine.run(weights.half_way(some(ERASING, seed=old + 1), "keep"))
    for answer in ends[:8]:
        assert isinstance(answer, Trajectory)
        labels = [v for a in answer.attempts for span in a.versions for v in [span.version] * (span.end - span.start)]
        assert labels == sorted(labels)
        assert set(labels) == {old, weights.version}
    for answer in ends[8:]:
        assert isinstance(answer, Trajectory)
        assert_made_by(answer, {weights.version: weights.here})


def test_waiting_ends_with_the_deadline_and_says_for_what_it_waited(weights: Weights) -> None:
    long = [r.model_copy(update={"max_tokens": 180}) for r in some(MONITORED, seed=99)]
    with pytest.raises(WeightSyncError, match=r"was not loaded within 0\.\d s: \d responses were still under way"):
        weights.engine.run(_sync_too_soon(weights, long))
    weights.engine.run(weights.sync("wait"))
    (answer,) = weights.engine.generate(some(MONITORED, seed=5)[:1])
    assert_made_by(answer, {weights.version: weights.here})


async def _sync_too_soon(weights: Weights, requests: list[ResponseRequest]) -> None:
    listener = _AfterTokens(1)
    generate = weights.engine.engine.generate
    tasks = [asyncio.create_task(generate(r, listener if n == 0 else None)) for n, r in enumerate(requests)]
    await asyncio.wait_for(listener.reached.wait(), DEADLINE)
    try:
        await weights.sync("wait", deadline=0.1)
    finally:
        await asyncio.gather(*tasks, return_exceptions=True)
