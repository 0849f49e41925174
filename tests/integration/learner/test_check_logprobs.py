"""The log-prob check against a real engine: it agrees where all is well, and notices, and names, what is not."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from common.config import RunConfig
from common.config.run import ModelConfig
from common.packed import Group, PackedResponse, pack
from common.trajectory import Prompt, ResponseRequest
from common.weights import DiskUpdate, ReplicaSync, SyncReport, WeightUpdate, weights_checksum
from learner.evaluation.logprob_check import Result, check
from learner.policy.model import load_policy
from learner.policy.probe import SampleLogprobs, measure
from learner.policy.samples import TrainingSample
from rollout_server.weights import loading
from tests.configs import run_config
from tests.engines import RunningEngine, running_engine
from tests.models import tiny_qwen3

ROOT = Path(__file__).resolve().parents[3]


class EngineRollouts:
    """One engine of this process, as the check sees a pool."""

    def __init__(self, running: RunningEngine) -> None:
        self.engine = running.engine

    async def generate(self, groups: Sequence[Sequence[ResponseRequest]]) -> AsyncIterator[PackedResponse]:
        work = [self.engine.generate(request) for group in groups for request in group]
        for trajectory in await asyncio.gather(*work):
            yield pack(trajectory)

    async def sync(self, update: WeightUpdate, deadline_seconds: float) -> SyncReport:
        checksum = await self.engine.sync(update, deadline_seconds)
        replica = ReplicaSync(replica=0, version=update.version, checksum=checksum, seconds=0.0)
        return SyncReport(version=update.version, seconds=0.0, bytes=update.bytes, replicas=[replica])


class PlainLearner:
    """The learner without DeepSpeed. A training step scales the weights."""

    def __init__(self, model: Path, directory: Path) -> None:
        self.policy: Any = load_policy(ModelConfig(path=str(model), max_length=256)).requires_grad_(False)
        self.directory = directory
        self.head: torch.Tensor | None = None

    async def remember_head(self) -> None:
        self.head = self.policy.get_output_embeddings().weight.clone()

    async def measure(self, samples: Sequence[TrainingSample], *, alone: bool = False) -> list[SampleLogprobs]:
        parts = [[sample] for sample in samples] if alone else [samples]
        cpu = torch.device("cpu")
        return [found for part in parts for found in measure(self.policy, part, cpu, self.head, self.policy)]

    async def train_step(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        assert {response.reward for group in groups for response in group.trajectories} == {0.0, 1.0}
        generator = torch.Generator().manual_seed(step)
        for parameter in self.policy.parameters():
            parameter.mul_(1.0 + 0.05 * torch.randn(parameter.shape, generator=generator))
        return {"learner/gradient_norm": 1.0}

    def update(self, version: int) -> DiskUpdate:
        tensors = {name: parameter.clone() for name, parameter in self.policy.named_parameters()}
        path = self.directory / f"weights-{version}.safetensors"
        save_file(tensors, path)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        return DiskUpdate(version=version, path=str(path), checksum=weights_checksum(tensors), bytes=size)

    @asynccontextmanager
    async def publishing(self, version: int) -> AsyncIterator[WeightUpdate]:
        yield self.update(version)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3(tmp_path_factory.mktemp("model") / "tied", tied=True)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[RunningEngine]:
    with running_engine(model, max_concurrent_responses=16) as running:
        yield running


@pytest.fixture
def config(model: Path) -> RunConfig:
    erasure = {"segmentation": {"mode": "fixed", "length": 8}, "retry_temperature": 0.6}
    return run_config(model={"path": str(model)}, rollout={"temperature": 0.8, "erasure": erasure})


@pytest.fixture
def learner(model: Path, engine: RunningEngine, tmp_path: Path) -> PlainLearner:
    """With the weights that the engine has, too."""
    learner = PlainLearner(model, tmp_path)
    engine.run(engine.engine.sync(learner.update(0), 60.0))
    return learner


def checked(config: RunConfig, engine: RunningEngine, learner: PlainLearner) -> Result:
    tokens = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [Prompt(id=f"p{n}", text="", token_ids=ids) for n, ids in enumerate(tokens)]
    return engine.run(check(config, EngineRollouts(engine), learner, prompts))  # type: ignore[arg-type]


def test_engine_and_learner_agree_before_and_after_a_sync(
    config: RunConfig, engine: RunningEngine, learner: PlainLearner
) -> None:
    result = checked(config, engine, learner)
    assert result.agrees
    assert [one.name for one in result.comparisons] == ["weights as loaded", "after a step and a sync"]
    for comparison in result.comparisons:
        assert all(gaps.tokens > 50 for gaps in comparison.parts.values())
        assert comparison.whole.max < 1e-4
    # The step changed the head by more than rounding, or a stale one would not be noticed.
    assert result.comparisons[1].earlier_head is not None
    assert result.comparisons[1].earlier_head.mean > 1e-2


def test_a_stale_output_head_is_noticed_and_named(
    config: RunConfig, engine: RunningEngine, learner: PlainLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM's CPU backend leaves it after a reload of tied embeddings; the checksum is right all the same."""
    monkeypatch.setattr(loading, "_repack_tied_head", lambda model: None)
    result = checked(config, engine, learner)
    first, second = result.comparisons
    assert first.agrees
    assert not second.agrees
    assert second.whole.mean > 1e-3
    (cause,) = result.causes
    assert "output head of the weights before the sync" in cause


def test_an_engine_with_one_other_weight_is_noticed_and_a_sync_cures_it(
    config: RunConfig, engine: RunningEngine, learner: PlainLearner
) -> None:
    weight = learner.policy.model.layers[0].mlp.down_proj.weight
    original = weight[0].clone()
    weight[0] += 0.5
    engine.run(engine.engine.sync(learner.update(5), 60.0))
    weight[0] = original
    result = checked(config, engine, learner)
    assert [one.agrees for one in result.comparisons] == [False, True]
    (cause,) = result.causes
    assert "the engines loaded other weights than the learner" in cause


def test_the_command_line_starts_a_pool_and_ranks_and_leaves_nothing(tmp_path: Path) -> None:
    model = tiny_qwen3(tmp_path / "model", max_length=128)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{n} and {n}?", "answer": "1"}) + "\n" for n in range(4)))
    data = {"source": "file", "train_path": str(rows), "test_path": str(rows), "chat": False}
    config = run_config(
        runs_directory=str(tmp_path / "runs"),
        model={"path": str(model), "max_length": 96},
        data=data,
        reward={"kind": "math"},
        rollout={"max_prompt_tokens": 32, "max_response_tokens": 32, "engine": {"max_concurrent_responses": 8}},
        learner={"ranks": 2, "zero_stage": 3},
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    figures = tmp_path / "gaps.json"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "learner.check_logprobs", "--config", str(path), "--json", str(figures)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the gap is rounding: engines and learner agree" in done.stdout
    result = json.loads(figures.read_text())
    assert result["agrees"]
    assert len(result["checksum"]) == 16
    assert [one["agrees"] for one in result["comparisons"]] == [True, True]
    assert result["comparisons"][1]["earlier_head"]["mean"] > 10.0 * result["comparisons"][1]["whole"]["max"]
    assert not list(temporary.glob("e3rl-check-*"))
    assert not (tmp_path / "runs").exists()
