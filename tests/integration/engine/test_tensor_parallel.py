"""A replica on two processes: what one process alone generates, erases and holds after a sync."""

from pathlib import Path

import pytest
import torch

from common.config import ErasurePolicy, FixedSegmentation
from common.trajectory import Trajectory
from rollout_server.engine.errors import WeightSyncError
from tests.engines import ReferenceModel, RunningEngine, group_requests, running_engine
from tests.integration.weights.test_weight_sync import DEADLINE, update_from
from tests.models import tiny_qwen3

POLICY = ErasurePolicy(
    segmentation=FixedSegmentation(length=8), threshold=4.9, max_erasures=2, retry_temperature=1.0, prior_strength=0.0
)


def generated(engine: RunningEngine) -> list[Trajectory]:
    """Sampled with seeds, and erased where they are uncertain: some segments are."""
    return engine.generate(
        group_requests(6, 2, max_tokens=40, prompt_tokens=40, seed=3, policy=POLICY, ignore_eos=True)
    )


def decisions(answers: list[Trajectory]) -> list[list[tuple[int, int, str, list[int]]]]:
    return [[(a.segment, a.attempt, a.verdict, a.token_ids) for a in answer.attempts] for answer in answers]


def test_two_processes_generate_erase_and_load_as_one_does(tmp_path: Path) -> None:
    first, second = (tiny_qwen3(tmp_path / str(seed), seed=seed) for seed in range(2))
    with running_engine(first, max_concurrent_responses=16) as one:
        alone = generated(one)
    with running_engine(first, max_concurrent_responses=16, tensor_parallel_size=2) as two:
        together = generated(two)
        assert decisions(together) == decisions(alone)
        assert sum(answer.erasures for answer in together) > 0
        for mine, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(torch.tensor(mine.logprobs), torch.tensor(theirs.logprobs), atol=1e-4, rtol=0)
        counters = two.counters()
        assert counters["following"] == 0
        assert counters["erasures"] == sum(answer.erasures for answer in together)
        update = update_from(second, 1, tmp_path)
        assert two.run(two.engine.sync(update, DEADLINE)) == update.checksum
        reference = ReferenceModel(second)
        for answer in generated(two):
            assert set(answer.token_versions) == {1}
            expected = reference.logprobs(answer.prompt_token_ids, answer.token_ids)
            torch.testing.assert_close(torch.tensor(answer.logprobs).double(), expected, atol=1e-4, rtol=0)
        with pytest.raises(WeightSyncError):
            two.run(two.engine.sync(update.model_copy(update={"checksum": "0" * 16, "version": 2}), DEADLINE))
