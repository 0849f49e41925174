"""Weights on their way into a running engine: what it then holds, what its tokens are labelled, and failed syncs."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from common.config import ErasurePolicy, FixedSegmentation
from common.trajectory import Trajectory
from common.weights import WeightUpdate, weight_checksum
from rollout_server.engine import WeightSyncError
from tests.engines import ReferenceModel, RunningEngine, SilentListener, group_requests, running_engine
from tests.models import tiny_llama, tiny_qwen3

FAMILIES = {
    "qwen3-tied": lambda path, seed: tiny_qwen3(path, tied=True, seed=seed),
    "llama-untied": lambda path, seed: tiny_llama(path, seed=seed),
}
POLICY = ErasurePolicy(segmentation=FixedSegmentation(length=8), kappa=0.0, max_erasures=2)
DEADLINE = 60.0


def update_from(checkpoint: Path, version: int, directory: Path, checksum: str | None = None) -> WeightUpdate:
    """What a learner would send of the weights in a Hugging Face directory; tied heads are left out."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    path = directory / f"weights-{version}.safetensors"
    save_file(tensors, path)
    return WeightUpdate(
        version=version,
        backend="host",
        path=str(path),
        checksum=checksum or weight_checksum(tensors.values()),
        bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
    )


class Synced:
    """An engine that has taken three syncs, and the directories of all weights, by version."""

    def __init__(self, engine: RunningEngine, checkpoints: list[Path]) -> None:
        self.engine = engine
        self.checkpoints = checkpoints


@pytest.fixture(scope="module", params=list(FAMILIES))
def synced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Synced]:
    directory = tmp_path_factory.mktemp("weights")
    checkpoints = [FAMILIES[request.param](directory / str(seed), seed) for seed in range(4)]
    with running_engine(checkpoints[0], max_concurrent_responses=16) as engine:
        engine.generate(requests())
        for version in (1, 2, 3):
            update = update_from(checkpoints[version], version, directory)
            assert engine.run(engine.engine.sync(update, DEADLINE)) == update.checksum
        yield Synced(engine, checkpoints)


def requests(seed: int = 0, max_tokens: int = 40) -> list:
    """The same prompts every time, so that a stale prefix cache would be used."""
    return group_requests(4, 4, max_tokens=max_tokens, prompt_tokens=70, seed=seed, policy=POLICY, ignore_eos=True)


def assert_log_probs(trajectories: list[Trajectory], reference: ReferenceModel) -> None:
    for trajectory in trajectories:
        expected = reference.logprobs(trajectory.prompt_token_ids, trajectory.token_ids)
        torch.testing.assert_close(torch.tensor(trajectory.logprobs).double(), expected, atol=1e-4, rtol=0)


def test_after_three_syncs_log_probs_are_those_of_the_last_weights(synced: Synced) -> None:
    trajectories = synced.engine.generate(requests())
    assert_log_probs(trajectories, ReferenceModel(synced.checkpoints[3]))
    assert {v for t in trajectories for v in t.token_versions} == {3}


def test_after_three_syncs_an_engine_equals_one_started_from_the_checkpoint(synced: Synced) -> None:
    greedy = [r.model_copy(update={"temperature": 0.0, "erasable": False}) for r in requests(seed=1) if r.sample == 0]
    mine = synced.engine.generate(greedy)
    with running_engine(synced.checkpoints[3], max_concurrent_responses=16) as fresh:
        theirs = fresh.generate(greedy)
    for a, b in zip(mine, theirs, strict=True):
        assert a.token_ids == b.token_ids
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=0)


class _AfterTokens(SilentListener):
    """Sets `reached` once so many tokens were sampled."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.reached = asyncio.Event()

    def sampled(self, token_ids: list[int], logprobs: object) -> None:
        self.left -= len(token_ids)
        if self.left <= 0:
            self.reached.set()


def test_tokens_are_labelled_with_the_weights_that_sampled_them(synced: Synced, tmp_path: Path) -> None:
    engine = synced.engine
    update = update_from(synced.checkpoints[1], 7, tmp_path)
    listener = _AfterTokens(30)

    async def sync_half_way() -> list[Trajectory]:
        tasks = [
            asyncio.create_task(engine.engine.generate(r, listener if n == 0 else None))
            for n, r in enumerate(requests(seed=2, max_tokens=100))
        ]
        await asyncio.wait_for(listener.reached.wait(), DEADLINE)
        await engine.engine.sync(update, DEADLINE)
        return await asyncio.gather(*tasks)

    trajectories = engine.run(sync_half_way())
    before, after = ReferenceModel(synced.checkpoints[3]), ReferenceModel(synced.checkpoints[1])
    mixed = 0
    for trajectory in trajectories:
        versions = torch.tensor(trajectory.token_versions)
        assert len(versions) == len(trajectory.token_ids)
        assert set(versions.tolist()) <= {3, 7}
        mixed += len(set(versions.tolist())) == 2
        old = before.logprobs(trajectory.prompt_token_ids, trajectory.token_ids)
        new = after.logprobs(trajectory.prompt_token_ids, trajectory.token_ids)
        expected = torch.where(versions == 7, new, old)
        torch.testing.assert_close(torch.tensor(trajectory.logprobs).double(), expected, atol=1e-4, rtol=0)
    assert mixed > 3


@pytest.mark.parametrize("failure", ["checksum", "missing file", "deadline"])
def test_a_failed_sync_serves_nothing_until_one_succeeds(synced: Synced, tmp_path: Path, failure: str) -> None:
    engine = synced.engine
    good = update_from(synced.checkpoints[2], 9, tmp_path)
    bad, deadline, message = {
        "checksum": (good.model_copy(update={"checksum": "0" * 16}), DEADLINE, "checksum"),
        "missing file": (good.model_copy(update={"path": str(tmp_path / "gone")}), DEADLINE, "gone"),
        "deadline": (good, 1e-4, "was not loaded within"),
    }[failure]
    with pytest.raises(WeightSyncError, match=message):
        engine.run(engine.engine.sync(bad, deadline))
    with pytest.raises(WeightSyncError, match="version 9"):
        engine.generate(requests()[:1])
    engine.run(engine.engine.sync(good, DEADLINE))
    assert_log_probs(engine.generate(requests()), ReferenceModel(synced.checkpoints[2]))
