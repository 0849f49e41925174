"""Which device each learner rank is given. The ranks themselves run in `tests/integration/learner/test_learner.py`."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.config import RunConfig
from common.weights import DiskUpdate, WeightUpdate
from common.weights.weight_file import WrittenWeights
from learner.policy.group import LearnerError, LearnerGroup, _failure, environments, trains_on_gpus
from learner.policy.rank import LearnerRank, Placement
from learner.run.errors import PartError
from tests.configs import run_config


def config_for(replicas: int, ranks: int, dtype: str) -> RunConfig:
    """As many engines, and as many ranks."""
    rollout: dict[str, Any] = {"engine": {"replicas": replicas}}
    changes = {"rollout": rollout, "learner": {"ranks": ranks}, "model": {"dtype": dtype}}
    return run_config(**changes)


@pytest.mark.parametrize(("gpus", "expected"), [(0, False), (3, False), (7, False), (8, True), (9, True)])
def test_ranks_get_gpus_beside_those_of_the_replicas(gpus: int, expected: bool) -> None:
    assert trains_on_gpus(config_for(4, 4, "float32"), gpus) is expected


def test_a_model_for_gpus_is_not_trained_on_cpus_of_a_cluster_with_too_few() -> None:
    config = config_for(4, 4, "bfloat16")
    with pytest.raises(LearnerError, match=r"has 7 GPUs.*\(4 \+ 4 = 8\)"):
        trains_on_gpus(config, 7)
    assert trains_on_gpus(config, 8)


def test_a_rank_that_sees_one_gpu_alone_uses_device_0() -> None:
    placements = [Placement(node, f"10.0.0.{node}", 4000 + number) for number, node in enumerate("1122")]
    on_gpus, on_cpus = environments(placements, on_gpus=True), environments(placements, on_gpus=False)
    assert [environment["LOCAL_RANK"] for environment in on_gpus] == ["0"] * 4
    assert [environment["LOCAL_RANK"] for environment in on_cpus] == ["0", "1", "0", "1"]
    for environment in on_gpus:
        assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "4000")
        assert (environment["WORLD_SIZE"], environment["LOCAL_SIZE"]) == ("4", "2")


class CalledRanks:
    """A group whose ranks answer with `written`, or fail with it; the names of the calls, in order."""

    def __init__(self, written: WrittenWeights | Exception, update: WeightUpdate) -> None:
        self.calls: list[str] = []
        self._written, self._update = written, update
        self.group = object.__new__(LearnerGroup)
        self.group._config, self.group._ranks = config_for(1, 1, "float32"), [None]
        self.group._failure = self.group._path = None
        self.group._call = self._answer  # type: ignore[method-assign]

    async def _answer(self, method: str, *_: Any, **__: Any) -> list[Any]:
        self.calls.append(method)
        if method == "publish":
            if isinstance(self._written, Exception):
                raise self._written
            return [self._written]
        return [self._update if method == "begin_publishing" else None]


WRITTEN = WrittenWeights("1" * 16, 1, 4, None)
UPDATE = DiskUpdate(version=7, checksum="", bytes=4, path="/none")


class StreamedUpdate(DiskUpdate):
    streams = True


async def test_weights_that_are_not_finite_are_the_learners_failure_and_are_discarded() -> None:
    """A failure of another part would be followed by a checkpoint of these weights."""
    ranks = CalledRanks(replace(WRITTEN, not_finite="model.norm.weight"), UPDATE)
    with pytest.raises(PartError, match=r"version 7: model\.norm\.weight holds NaN or infinity") as error:
        await ranks.group.publishing(7).__aenter__()
    assert error.value.part == "learner"
    assert ranks.calls == ["begin_publishing", "publish", "discard"]


async def test_only_a_version_that_is_everywhere_replaces_the_one_before() -> None:
    ranks = CalledRanks(WRITTEN, UPDATE)
    async with ranks.group.publishing(7) as update:
        assert update == UPDATE.model_copy(update={"checksum": WRITTEN.checksum})
        assert ranks.calls == ["begin_publishing", "publish"]
    assert ranks.calls[2:] == ["keep_only"]
    ranks.calls.clear()
    with pytest.raises(ZeroDivisionError):
        async with ranks.group.publishing(7):
            raise ZeroDivisionError
    assert ranks.calls == ["begin_publishing", "publish", "discard"]


async def test_replicas_receive_a_stream_while_it_is_sent_and_the_senders_failure_goes_first() -> None:
    streamed = StreamedUpdate(**UPDATE.model_dump())
    ranks = CalledRanks(WRITTEN, streamed)
    async with ranks.group.publishing(7) as update:
        assert update is streamed
        assert ranks.calls == ["begin_publishing"]
        await asyncio.sleep(0)
        assert ranks.calls == ["begin_publishing", "publish"]
    assert ranks.calls[2:] == ["keep_only"]
    failing = CalledRanks(LearnerError("rank 0 died"), streamed)
    with pytest.raises(LearnerError, match="rank 0 died"):
        async with failing.group.publishing(7):
            raise ZeroDivisionError("what a replica saw of it")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        MemoryError("Unable to allocate: out of memory"),
    ],
)
def test_a_rank_that_ran_out_of_memory_says_what_to_lower(error: Exception) -> None:
    learner = config_for(1, 1, "float32").learner
    failure = _failure({0: error}, [False], "training step 3", 1.0, learner)
    text = str(failure)
    assert "training step 3: learner rank 0 failed" in text
    assert "lower learner.tokens_per_microbatch (8192), set learner.gradient_checkpointing: true; --resume" in text
    already = learner.model_copy(update={"gradient_checkpointing": True})
    assert "gradient_checkpointing" not in str(_failure({0: error}, [False], "training", 1.0, already))
    other = _failure({0: RuntimeError("shapes differ")}, [False], "training", 1.0, learner)
    assert "memory" not in str(other)


def test_a_checkpoint_does_not_bring_the_optimizer_s_old_settings_back() -> None:
    rank: Any = object.__new__(LearnerRank)
    rank._config = run_config(learner={"optimizer": {"betas": [0.5, 0.6], "weight_decay": 0.3}})
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], betas=(0.9, 0.999), weight_decay=0.01)
    saved = optimizer.state_dict()

    def load(directory: str, tag: str) -> tuple[str, dict[str, Any]]:
        optimizer.load_state_dict(saved)
        return directory, {}

    rank._engine = SimpleNamespace(load_checkpoint=load, optimizer=optimizer)
    rank.load_checkpoint("somewhere")
    (group,) = optimizer.param_groups
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.5, 0.6), 0.3, 1e-8)
