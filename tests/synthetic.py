"""The data path without models: actors make long responses, ranks fetch and batch them. Everything between is real."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray

from common import metrics as names
from common.config.run import EngineConfig, ModelConfig, RunConfig
from common.packed import PackedResponse, TokenArrays
from common.trajectory import Attempt, ResponseRequest, Trajectory
from learner.environments.data import PromptStream, read_rows, tokenise
from learner.environments.problems import Problems
from learner.environments.rewards import ChainRewards, RewardItem, Score
from learner.loop.driver import Driver
from learner.loop.driver_state import RunRecord, newest_state
from learner.loop.parts import Parts
from learner.objectives import ObjectiveStatistics
from learner.policy.batching import RankBatch, collate
from learner.policy.group import LearnerGroup
from learner.policy.rank import LearnerRank, MinibatchResult
from learner.run.display import Display
from learner.run.run_directory import RunDirectory
from learner.run.trajectory_writer import TrajectoryWriter
from rollout_server.replicas.packing import Shelf, packed
from rollout_server.replicas.placement import Placement
from rollout_server.replicas.ray_actor import Event, EventQueue, RayReplica
from tests.configs import run_config
from tests.fake_parts import TOKENIZER, FakeLearner, FakeRollouts
from tests.trajectories import attempt_of

SEGMENT = 512


def long_trajectory(request: ResponseRequest, tokens: int) -> Trajectory:
    """A response of `tokens` committed tokens in segments of `SEGMENT`, every eighth of which is erased once.

    Log-probs are float32, as an engine measures them; they follow from the request's seed.
    """
    rng = np.random.default_rng(request.seed)
    attempts: list[Attempt] = []
    for segment, start in enumerate(range(0, tokens, SEGMENT)):
        length = min(SEGMENT, tokens - start)
        erased = request.erasable and segment % 8 == 1
        for number in range(erased + 1):
            attempts.append(
                attempt_of(
                    rng.integers(97, 123, length).tolist(),
                    segment=segment,
                    start=start,
                    number=number,
                    verdict="erased" if number < erased else "accepted",
                    logprobs=rng.uniform(-6.0, -0.1, length).astype(np.float32).tolist(),
                    temperature=request.temperature,
                    uncertainty=float(rng.uniform(0.1, 3.0)) if request.policy else None,
                )
            )
    return Trajectory(
        prompt_id=request.prompt_id,
        group_id=request.group_id,
        sample=request.sample,
        seed=request.seed or 0,
        prompt_token_ids=request.prompt_token_ids,
        attempts=attempts,
        erasable=request.erasable,
        finish_reason="stop",
        policy=request.policy,
    )


class SyntheticActor:
    """Stands in for a replica's actor where that generates; what it does with what is finished is the same."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._shelf = Shelf()
        self._queue = EventQueue()

    async def submit_packed(self, key: int, request: ResponseRequest, recorded: bool) -> None:
        response = packed(long_trajectory(request, self._tokens), request, TOKENIZER)
        self._queue.put((key, "finished", self._shelf.header(key, response)))

    async def take(self, key: int) -> tuple[None, TokenArrays]:
        return self._shelf.take(key)

    async def events(self, seconds: float) -> list[Event]:
        return await self._queue.take(seconds)

    async def kept(self) -> int:
        return len(self._shelf)


class SyntheticReplica(RayReplica):
    """The driver's side of a replica, as it is, of a `SyntheticActor`."""

    def __init__(self, number: int, tokens: int) -> None:
        engine = EngineConfig()
        super().__init__(number, ModelConfig(path="none", max_length=1024), engine, 0, Placement(engine))
        self.actor: Any = ray.remote(SyntheticActor).options(num_cpus=0).remote(tokens)
        self._actor = self.actor

    def begin(self) -> None:
        """Listen to the actor, in the loop that runs."""
        self._polling = self._polling or asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Kill the actor."""
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.gather(self._polling, return_exceptions=True)
        ray.kill(self.actor)


class SyntheticRollouts(FakeRollouts):
    """Responses of `tokens` committed tokens from `actors` processes. `on_sync`: called at the end of each step."""

    def __init__(self, tokens: int, actors: int = 1, on_sync: Callable[[int], None] = lambda version: None) -> None:
        super().__init__()
        self.on_sync = on_sync
        self.replicas = [SyntheticReplica(number, tokens) for number in range(actors)]

    async def generate(self, groups: Sequence[Sequence[ResponseRequest]]) -> AsyncIterator[PackedResponse]:
        for replica in self.replicas:
            replica.begin()
        requests = [request for group in groups for request in group]
        tasks = [
            asyncio.create_task(self.replicas[number % len(self.replicas)].generate_packed(request, None))
            for number, request in enumerate(requests)
        ]
        for finished in asyncio.as_completed(tasks):
            yield await finished

    async def kept(self) -> list[int]:
        """Responses whose arrays were not called for, of each actor."""
        return [await replica.actor.kept.remote() for replica in self.replicas]

    async def sync(self, update: Any, deadline_seconds: float, *others: Any) -> Any:
        report = await super().sync(update, deadline_seconds, *others)
        self.on_sync(update.version)
        return report

    async def close(self) -> None:
        for replica in self.replicas:
            await replica.stop()


class BatchingRank(LearnerRank):
    """A rank that fetches its samples and makes its batches, but has no model."""

    def _train_minibatch(self, batch: RankBatch, *others: Any) -> MinibatchResult:
        statistics = ObjectiveStatistics()
        for samples in batch.microbatches:
            collated = collate(samples)
            statistics.tokens += int(collated.mask.sum())
            statistics.ratio_min = statistics.ratio_max = 1.0
        return MinibatchResult(0.0, statistics, 0.0, 0.0, 0)


class BatchingLearner(FakeLearner):
    """A `LearnerGroup` of `BatchingRank`s."""

    def __init__(self, config: RunConfig, log_directory: Path) -> None:
        super().__init__()
        self._group = LearnerGroup(config, log_directory)
        actor = ray.remote(BatchingRank).options(num_cpus=0)
        self._group._ranks = [
            actor.remote(config, rank, str(log_directory.resolve())) for rank in range(config.learner.ranks)
        ]

    async def train_step(self, groups: Any, step: int) -> dict[str, float]:
        found = await self._group.train_step(groups, step)
        # What a rank without a model has no figures for.
        return {key: value for key, value in found.items() if np.isfinite(value)} | {names.LOSS: 0.0}

    async def close(self) -> None:
        for rank in self._group._ranks:
            ray.kill(rank)


class LengthRewards(ChainRewards):
    """Half of the responses of a group are rewarded."""

    async def score(self, item: RewardItem) -> Score:
        return Score(float(item.sample % 2))


def synthetic_config(directory: Path, groups: int, size: int, tokens: int, steps: int) -> RunConfig:
    """Responses may be as long as `tokens` and all that can be erased of them."""
    return run_config(
        name="synthetic",
        runs_directory=str(directory),
        steps=steps,
        model={"max_length": 2 * tokens},
        rollout={
            "groups_per_step": groups,
            "responses_per_group": size,
            "max_response_tokens": 2 * tokens - 100,
            "erasure": {"segmentation": {"mode": "fixed", "length": SEGMENT}},
        },
        learner={"ranks": 2, "tokens_per_microbatch": 4 * tokens, "minibatches_per_step": 4},
        data={"source": "chain", "length": 4, "train_problems": groups, "test_problems": 2},
        # Without checkable steps, so that texts of attempts are not asked for.
        reward={"kind": "math"},
        evaluation={"problems": 1, "responses_per_problem": 1, "every_steps": 0},
        checkpoint={"every_steps": 0, "latest": False},
    )


def synthetic_run(config: RunConfig, rollouts: SyntheticRollouts) -> RunDirectory:
    """A run of the real driver in the cluster that is connected; its directory."""
    directory = RunDirectory.create(config)
    sets = {split: tokenise(read_rows(config, split), TOKENIZER, config, split).prompts for split in ("train", "test")}
    stream = PromptStream(sets["train"], config.seed, config.rollout.groups_per_step)
    learner = cast(LearnerGroup, BatchingLearner(config, directory.log))
    with closing(directory), closing(TrajectoryWriter()) as writer, closing(RunRecord(directory, 1)) as record:
        parts = Parts(rollouts, learner, LengthRewards(), writer.write)
        problems = Problems(stream, sets["test"])
        driver = Driver(config, directory, newest_state(directory), parts, problems, record, Display(sys.stderr))
        asyncio.run(driver.run())
    return directory
