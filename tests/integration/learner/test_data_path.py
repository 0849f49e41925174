"""From a replica to ranks and files: arrays go by reference, outlive their maker, and leave nothing behind."""

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.internal_api import get_state_from_address, node_stats

from common.config import RunConfig
from common.packed import Group, PackedResponse, pack
from common.trajectory import Prompt, ResponseRequest
from learner.policy.batching import collate, split_minibatches
from learner.policy.samples import response_samples
from learner.run.errors import DiskFullError
from learner.run.trajectory_files import read_trajectories
from learner.run.trajectory_writer import TrajectoryWriter
from rollout_server.replicas.packing import INLINE_BYTES
from tests.configs import run_config
from tests.synthetic import BatchingLearner, SyntheticRollouts, long_trajectory

TOKENS = 8192
PROMPT = Prompt(id="p0", text="the prompt", token_ids=[10, 20, 30], answer="x", position=3)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=200 * 2**20,
    )
    yield
    ray.shutdown()


def settings() -> RunConfig:
    return run_config(
        model={"max_length": 16_384},
        rollout={"max_response_tokens": 2 * TOKENS - 1000},
        learner={
            "ranks": 2,
            "tokens_per_microbatch": 40_000,
            "minibatches_per_step": 2,
            "advantage": {"erased_weight": 0.5},
        },
    )


def requests(count: int) -> list[ResponseRequest]:
    policy = settings().rollout.erasure
    return [
        ResponseRequest(
            prompt_id="p0",
            group_id="g",
            group_size=count,
            sample=sample,
            seed=sample,
            prompt_token_ids=PROMPT.token_ids,
            max_tokens=2 * TOKENS,
            policy=policy,
        )
        for sample in range(count)
    ]


async def generated(rollouts: SyntheticRollouts, count: int) -> Group:
    responses = [response async for response in rollouts.generate([requests(count)])]
    for response in responses:
        response.reward = float(response.sample % 2)
    return Group(PROMPT, sorted(responses, key=lambda response: response.sample))


def store_bytes() -> int:
    here = get_state_from_address()
    node = next(node for node in ray.nodes() if node["Alive"])
    assert here is not None
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False)
    return int(stats.store_stats.object_store_bytes_used)


def wait_until(holds: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "not within the deadline"
        time.sleep(0.05)


def test_ranks_and_files_get_the_arrays_from_the_store_although_their_maker_is_dead(tmp_path: Path) -> None:
    config = settings()
    before = store_bytes()

    async def run() -> dict[str, float]:
        rollouts = SyntheticRollouts(TOKENS, actors=2)
        group = await generated(rollouts, 4)
        assert await rollouts.kept() == [0, 0]
        await rollouts.close()
        for response in group.trajectories:
            assert response.tokens is None
            assert response.response_tokens == TOKENS
            assert len(response.text) == TOKENS
        assert store_bytes() - before > 4 * INLINE_BYTES
        learner, writer = BatchingLearner(config, tmp_path), TrajectoryWriter()
        try:
            await asyncio.to_thread(writer.write, tmp_path / "step_1.parquet", 1, [group])
            metrics = await learner.train_step([group], 1)
        finally:
            await learner.close()
            writer.close()
        check_samples(group, config)
        return metrics

    metrics = asyncio.run(run())
    expected = [long_trajectory(request, TOKENS) for request in requests(4)]
    written = read_trajectories(tmp_path / "step_1.parquet")
    assert [t.attempts for t in written] == [t.attempts for t in expected]
    assert [t.reward for t in written] == [0.0, 1.0, 0.0, 1.0]
    own = [s for s in response_samples(with_rewards(expected), config.learner.advantage) for s in s]
    assert metrics["learner/tokens"] == sum(map(len, own))
    # Nobody refers to the arrays any more, so the store has room again.
    wait_until(lambda: store_bytes() <= before)


def with_rewards(trajectories: Any) -> list[PackedResponse]:
    responses = [pack(trajectory) for trajectory in trajectories]
    for response in responses:
        response.reward = float(response.sample % 2)
    return responses


def check_samples(group: Group, config: RunConfig) -> None:
    """What a rank makes of references is what is made of arrays that are here."""
    here = Group(PROMPT, with_rewards([long_trajectory(request, TOKENS) for request in requests(4)]))
    for planned, expected in zip(
        *(split_minibatches([g], config.learner.advantage, 1, 0, 1)[0] for g in (group, here)), strict=True
    ):
        assert len(planned) == len(expected)
    (fetched,) = ray.get([group.trajectories[0].reference])
    assert fetched.token_ids.tolist() == here.trajectories[0].arrays.token_ids.tolist()
    assert not fetched.token_ids.flags.owndata


def test_short_responses_travel_whole() -> None:
    async def run() -> None:
        rollouts = SyntheticRollouts(200)
        group = await generated(rollouts, 2)
        assert [len(response.token_ids) for response in group.trajectories] == [200, 200]
        assert await rollouts.kept() == [0]
        await rollouts.close()
        batch = collate([s for own in response_samples(group.trajectories, settings().learner.advantage) for s in own])
        assert batch.mask.sum() == 400

    asyncio.run(run())


def test_what_the_writer_cannot_write_is_said_as_if_it_was_written_here(tmp_path: Path) -> None:
    writer = TrajectoryWriter()
    (tmp_path / "step_1.parquet.partial").symlink_to("/dev/full")
    group = Group(PROMPT, with_rewards([long_trajectory(request, 100) for request in requests(2)]))
    try:
        with pytest.raises(DiskFullError, match=r"the disk is full: cannot write .*step_1\.parquet") as caught:
            writer.write(tmp_path / "step_1.parquet", 1, [group])
        assert caught.value.part == "run directory"
        # A process that is lost is replaced.
        ray.kill(writer._actor, no_restart=False)
        writer.write(tmp_path / "step_2.parquet", 2, [group])
    finally:
        writer.close()
    assert [t.sample for t in read_trajectories(tmp_path / "step_2.parquet")] == [0, 1]
