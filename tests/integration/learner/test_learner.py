"""The learner as it runs: DeepSpeed ranks in Ray actors on a tiny model, against plain PyTorch in this process."""

import asyncio
import itertools
import json
import logging
import math
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common import metrics
from common.config.run import AdvantageConfig, RunConfig
from common.trajectory import Group, Trajectory
from common.weights import weight_checksum
from learner.objectives.clipped import MinibatchTotals, ObjectiveInputs, compute_objective
from learner.policy.batching import collate, split_minibatches
from learner.policy.group import LearnerError, LearnerGroup
from learner.policy.model import load_policy, response_logprobs
from tests.models import tiny_llama, tiny_qwen3
from tests.trajectories import random_groups, recorded_near

STEPS = 3
WARMUP = 2
RATE = 2e-3


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {
        "tied": tiny_qwen3(directory / "tied", hidden_size=32),
        "untied": tiny_llama(directory / "untied", hidden_size=32),
    }


def run_config(model: Path, *, run: str = "learner-test", **learner: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "ranks": 1,
        "zero_stage": 2,
        "tokens_per_microbatch": 64,
        "minibatches_per_step": 2,
        "step_seconds": 300.0,
        "advantage": {"credit": {"kind": "uncertainty"}, "erased_weight": 0.2},
        "optimizer": {
            "learning_rate": RATE,
            # Above the rounding noise of gradients that almost cancel, which AdamW else makes whole steps of.
            "epsilon": 1e-6,
            "warmup_steps": WARMUP,
            "schedule": "cosine",
            "max_gradient_norm": 0.05,
            "weight_decay": 0.01,
        },
    }
    return RunConfig.model_validate(
        {
            "name": run,
            "steps": STEPS + 1,
            "model": {"path": str(model), "max_length": 128},
            "rollout": {
                "groups_per_step": 4,
                "responses_per_group": 4,
                "max_prompt_tokens": 8,
                "max_response_tokens": 48,
                "erasure": {"segmentation": {"mode": "fixed", "length": 8}},
            },
            "learner": settings | learner,
            "sync": {"deadline_seconds": 30.0},
        }
    )


def rollouts(config: RunConfig, steps: int) -> list[list[Group]]:
    policy = load_policy(config.model)
    return [recorded_near(policy, random_groups(step, 4, 4), seed=step) for step in range(steps)]


@dataclass
class Reference:
    """What plain PyTorch got: losses, unclipped gradient norms and log-prob gaps by step, and the final model."""

    losses: list[float]
    norms: list[float]
    gaps: list[float]
    model: Any


def plain_training(config: RunConfig, batches: list[list[Group]]) -> Reference:
    """One process, no DeepSpeed, no micro-batches: AdamW, `clip_grad_norm_` and a schedule of torch's own."""
    settings = config.learner.optimizer
    policy: Any = load_policy(config.model)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=RATE, eps=settings.epsilon, weight_decay=settings.weight_decay
    )
    total = config.steps * config.learner.minibatches_per_step
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda k: (
            min((k + 1) / WARMUP, (1 + math.cos(math.pi * max(k - WARMUP, 0) / (total - WARMUP))) / 2)
            if k < WARMUP
            else (1 + math.cos(math.pi * (k - WARMUP) / (total - WARMUP))) / 2
        ),
    )
    reference = Reference([], [], [], policy)
    for step, groups in enumerate(batches):
        losses, norms = [], []
        parts = split_minibatches(
            groups, config.learner.advantage, config.learner.minibatches_per_step, config.seed, step
        )
        for index, part in enumerate(parts):
            batch = collate(part)
            inputs = ObjectiveInputs(
                response_logprobs(policy, batch), batch.behaviour_logprobs, batch.advantages, batch.mask
            )
            totals = MinibatchTotals(len(part), sum(s.response_length for s in part))
            loss, statistics = compute_objective(config.learner.objective, inputs, totals)
            if index == 0:
                reference.gaps.append(statistics.gap_sum / statistics.tokens)
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_gradient_norm)))
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        reference.losses.append(sum(losses) / len(losses))
        reference.norms.append(sum(norms) / len(norms))
    return reference


@dataclass
class Trained:
    config: RunConfig
    group: LearnerGroup
    steps: list[dict[str, float]]
    reference: Reference
    logs: Path


@pytest.fixture(scope="module", params=[(0, "tied"), (1, "untied"), (2, "untied"), (3, "tied")])
def trained(
    request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trained]:
    """Two ranks after three steps."""
    stage, family = request.param
    config = run_config(models[family], ranks=2, zero_stage=stage)
    batches = rollouts(config, STEPS)
    logs = tmp_path_factory.mktemp("log")
    group = LearnerGroup(config, logs)

    async def train() -> list[dict[str, float]]:
        await group.start()
        return [await group.train_step(groups, step) for step, groups in enumerate(batches)]

    steps = asyncio.run(train())
    yield Trained(config, group, steps, plain_training(config, batches), logs)
    asyncio.run(group.close())


def test_two_zero_ranks_train_as_plain_adamw_does(trained: Trained) -> None:
    reference = trained.reference
    norms = [step[metrics.GRADIENT_NORM] for step in trained.steps]
    assert min(norms) > trained.config.learner.optimizer.max_gradient_norm
    assert [step[metrics.LOSS] for step in trained.steps] == pytest.approx(reference.losses, abs=1e-5)
    assert norms == pytest.approx(reference.norms, rel=1e-4)
    gaps = [step[metrics.LOGPROB_GAP_MEAN] for step in trained.steps]
    assert gaps == pytest.approx(reference.gaps, abs=1e-5)
    assert all(step[metrics.LOGPROB_GAP_MAX] >= gap > 0.0 for step, gap in zip(trained.steps, gaps, strict=True))


def test_exported_weights_are_transformers_state_dict(trained: Trained, tmp_path: Path) -> None:
    async def export() -> dict[str, torch.Tensor]:
        update = await trained.group.export_weights(3)
        weights = load_file(update.path)
        assert (update.version, update.backend) == (3, "host")
        assert update.bytes == sum(w.numel() * w.element_size() for w in weights.values())
        assert update.checksum == weight_checksum(weights.values())
        name, tensor = next(iter(weights.items()))
        changed = tensor.clone()
        changed.view(-1)[7] += 1e-6
        assert update.checksum != weight_checksum((weights | {name: changed}).values())
        await trained.group.release_weights(update)
        assert not Path(update.path).exists()
        await trained.group.export_huggingface(tmp_path / "model")
        return weights

    weights = asyncio.run(export())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name
        torch.testing.assert_close(
            tensor, trained.reference.model.get_parameter(name).detach(), rtol=0, atol=2e-5, msg=name
        )


def test_exported_model_gives_the_same_logits_and_keeps_its_tokenizer(trained: Trained, tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "stale").write_text("an earlier export")
    asyncio.run(trained.group.export_huggingface(target))
    assert not (target / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    model = AutoModelForCausalLM.from_pretrained(target)
    tokens = torch.arange(1, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, trained.reference.model(tokens).logits, rtol=0, atol=1e-3)
    assert model.dtype == torch.float32
    assert GenerationConfig.from_pretrained(target).eos_token_id == 256
    text = "a+5=2\n"
    original = AutoTokenizer.from_pretrained(trained.config.model.path)
    assert AutoTokenizer.from_pretrained(target)(text)["input_ids"] == original(text)["input_ids"]


def test_what_ranks_print_is_in_the_run_s_log_directory(trained: Trained) -> None:
    for rank in range(2):
        log = (trained.logs / f"learner-rank{rank}.log").read_text()
        assert f"learner rank {rank} of 2: " in log


def impossible(group: Group) -> Group:
    """As if tokens had been sampled that had next to no chance: importance ratios overflow."""

    def spoilt(trajectory: Trajectory) -> Trajectory:
        attempts = [
            attempt.model_copy(update={"behaviour_logprobs": [-1000.0] * len(attempt.token_ids)})
            for attempt in trajectory.attempts
        ]
        return trajectory.model_copy(update={"attempts": attempts}, deep=True)

    return group.model_copy(update={"trajectories": [spoilt(t) for t in group.trajectories]})


def test_a_resumed_learner_continues_bit_for_bit(models: dict[str, Path], tmp_path: Path) -> None:
    """With a KL to the start policy, which is 0 before the first update and not the resumed policy's own after."""
    config = run_config(models["tied"], minibatches_per_step=1, objective={"kl_coefficient": 0.1})
    batches = rollouts(config, 4)
    checkpoint = tmp_path / "step_2"

    async def train(group: LearnerGroup, steps: range) -> list[dict[str, float]]:
        return [await group.train_step(batches[step], step) for step in steps]

    async def checksum(group: LearnerGroup) -> str:
        update = await group.export_weights(4)
        await group.release_weights(update)
        return update.checksum

    async def both() -> None:
        whole = LearnerGroup(config, tmp_path / "log")
        await whole.start()
        first, second = await train(whole, range(2))
        assert first[metrics.KL] == 0.0
        assert second[metrics.KL] > 1e-6
        await whole.save_checkpoint(checkpoint)
        expected, expected_sum = await train(whole, range(2, 4)), await checksum(whole)
        await whole.close()
        resumed = LearnerGroup(config, tmp_path / "log")
        await resumed.start()
        await resumed.load_checkpoint(checkpoint)
        assert await train(resumed, range(2, 4)) == expected
        assert await checksum(resumed) == expected_sum
        with pytest.raises(
            LearnerError,
            match=r"training step 4: minibatch 1 of 1: the loss is (inf|nan).*--resume does this step again",
        ):
            await resumed.train_step([impossible(group) for group in batches[0]], 4)
        await resumed.close()

    asyncio.run(both())
    assert not list(tmp_path.glob(".*"))
    other = LearnerGroup(run_config(models["tied"], ranks=2, zero_stage=1), tmp_path / "log")
    with pytest.raises(LearnerError, match="ranks 1 there, 2 here, zero_stage 2 there, 1 here"):
        asyncio.run(other.load_checkpoint(checkpoint))
    with pytest.raises(LearnerError, match=r"is not a learner checkpoint: it has no learner\.json"):
        asyncio.run(other.load_checkpoint(tmp_path))


def weight_files() -> set[Path]:
    directories = [Path("/dev/shm"), Path(tempfile.gettempdir())]
    return set(itertools.chain.from_iterable(d.glob("e3rl-learner-test-*") for d in directories))


def _all_alike(group: Group) -> Group:
    return group.model_copy(update={"trajectories": [t.model_copy(update={"reward": 1.0}) for t in group.trajectories]})


def test_a_dead_rank_is_named_at_once_and_leaves_no_files(models: dict[str, Path], tmp_path: Path) -> None:
    config = run_config(models["tied"], ranks=2, zero_stage=3)
    (groups,) = rollouts(config, 1)
    stale = Path(tempfile.gettempdir()) / "e3rl-learner-test-999999999-weights-v1.safetensors"
    stale.touch()

    async def lose_a_rank() -> None:
        group = LearnerGroup(config, tmp_path)
        await group.start()
        assert not stale.exists()
        update = await group.export_weights(1)
        assert Path(update.path) in weight_files()
        # Nothing to learn from: no rank runs a response, and all of them stay in step.
        metrics_of_nothing = await group.train_step([_all_alike(g) for g in groups], 0)
        assert metrics_of_nothing[metrics.LOSS] == metrics_of_nothing[metrics.GRADIENT_NORM] == 0.0
        assert metrics_of_nothing[metrics.SKIPPED_SHARE] == 1.0
        ray.kill(group._ranks[1], no_restart=True)
        started = asyncio.get_running_loop().time()
        with pytest.raises(LearnerError, match="training step 0: learner rank 1 died"):
            await group.train_step(groups, 0)
        assert asyncio.get_running_loop().time() - started < 20.0
        with pytest.raises(LearnerError, match="has failed before: training step 0: learner rank 1 died"):
            await group.save_checkpoint(tmp_path / "checkpoint")
        await group.close()
        await group.close()

    asyncio.run(lose_a_rank())
    assert not weight_files()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


class Silent:
    """A rank that never answers."""

    def export_weights(self, file_name: str) -> None:
        threading.Event().wait()


def test_a_wait_that_expires_names_what_it_waited_for_and_for_how_long(models: dict[str, Path], tmp_path: Path) -> None:
    config = run_config(models["tied"])
    config = config.model_copy(update={"sync": config.sync.model_copy(update={"deadline_seconds": 0.5})})
    group = LearnerGroup(config, tmp_path)

    async def wait() -> None:
        with pytest.raises(LearnerError, match="exporting weights version 1: the learner is not started"):
            await group.export_weights(1)
        group._ranks = [ray.remote(Silent).remote()]
        with pytest.raises(
            LearnerError, match=r"exporting weights version 1: no answer from learner rank 0 within 0\.5 s"
        ):
            await group.export_weights(1)
        await group.close()

    asyncio.run(wait())


def test_a_model_that_can_t_be_loaded_is_reported_with_its_reason(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "no_such_architecture"}))
    group = LearnerGroup(run_config(model), tmp_path / "log")

    async def start() -> None:
        with pytest.raises(LearnerError, match=r"(?s)^can't load model '.*/model' .*no_such_architecture"):
            await group.start()
        await group.close()

    asyncio.run(start())


def test_an_advantage_that_can_t_be_computed_is_raised_here_and_breaks_nothing(
    models: dict[str, Path], tmp_path: Path
) -> None:
    config = run_config(models["tied"])
    (groups,) = rollouts(config, 1)
    rewardless = groups[0].trajectories[0].model_copy(update={"reward": None})
    broken = groups[0].model_copy(update={"trajectories": [rewardless, *groups[0].trajectories[1:]]})
    group = LearnerGroup(config, tmp_path)
    with pytest.raises(ValueError, match="response 0 to prompt 'p0' has no reward"):
        asyncio.run(group.train_step([broken], 0))
    assert os.listdir(tmp_path) == []
    assert config.learner.advantage == AdvantageConfig(erased_weight=0.2)
