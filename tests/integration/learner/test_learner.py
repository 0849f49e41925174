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
from common.packed import Group
from common.trajectory import Trajectory
from common.weights import HostUpdate, weights_checksum
from learner.objectives import GapHistogram, MinibatchTotals, ObjectiveInputs, compute_objective
from learner.policy.batching import collate, split_minibatches
from learner.policy.group import LearnerError, LearnerGroup
from learner.policy.model import load_policy, response_logprobs
from tests.models import tiny_llama, tiny_qwen3
from tests.trajectories import changed, random_groups, recorded_near, with_rewards

STEPS = 3
WARMUP = 2
RATE = 2e-3


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
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
        learner, gaps = config.learner, GapHistogram()
        parts = split_minibatches(groups, learner.advantage, learner.minibatches_per_step, config.seed, step)
        recomputes = learner.old_logprobs == "recomputed"
        with torch.no_grad():
            starts = [response_logprobs(policy, collate(part)) if recomputes else None for part in parts]
        for index, (part, old) in enumerate(zip(parts, starts, strict=True)):
            batch = collate(part)
            inputs = ObjectiveInputs(
                response_logprobs(policy, batch),
                batch.behaviour_logprobs,
                batch.advantages,
                batch.mask,
                old_logprobs=old,
            )
            totals = MinibatchTotals(len(part), sum(s.response_length for s in part))
            loss, statistics = compute_objective(learner.objective, inputs, totals, learner.importance_sampling)
            if index == 0 or recomputes:
                gaps.add(statistics.gaps)
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_gradient_norm)))
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        reference.gaps.append(gaps.mean)
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


TOKEN_WEIGHTS = {"importance_sampling": {"kind": "token", "cap": 1.1}}
SEQUENCE_WEIGHTS = {"importance_sampling": {"kind": "sequence", "cap": 1.2, "outliers": "mask"}}


@pytest.fixture(
    scope="module",
    params=[(0, "tied", {}), (1, "untied", SEQUENCE_WEIGHTS), (2, "untied", {}), (3, "tied", TOKEN_WEIGHTS)],
    ids=["0-tied", "1-untied-sequence", "2-untied", "3-tied-token"],
)
def trained(
    request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trained]:
    """Two ranks after three steps."""
    stage, family, weights = request.param
    config = run_config(models[family], ranks=2, zero_stage=stage, **weights)
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
    if trained.config.learner.importance_sampling.kind != "none":
        assert all(0.0 < step[metrics.IMPORTANCE_OUTLIER_SHARE] < 1.0 for step in trained.steps)


def test_exported_weights_are_transformers_state_dict(trained: Trained, tmp_path: Path) -> None:
    async def export() -> dict[str, torch.Tensor]:
        async with trained.group.publishing(2) as before:
            assert isinstance(before, HostUpdate)
        async with trained.group.publishing(3) as update:
            assert isinstance(update, HostUpdate)
            weights = load_file(update.path)
            # Not every replica holds the newer one yet.
            assert load_file(before.path).keys() == weights.keys()
        assert update.version == 3
        assert update.bytes == sum(w.numel() * w.element_size() for w in weights.values())
        assert update.checksum == weights_checksum(weights)
        # A replica that restarts reads it once more.
        assert Path(update.path).exists()
        assert not Path(before.path).exists()
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
        return trajectory.model_copy(update={"attempts": attempts})

    return changed(group, spoilt)


def test_a_resumed_learner_continues_bit_for_bit(models: dict[str, Path], tmp_path: Path) -> None:
    """With a KL to the start policy, which is 0 before the first update and not the resumed policy's own after."""
    config = run_config(models["tied"], minibatches_per_step=1, objective={"kl_coefficient": 0.1})
    batches = rollouts(config, 4)
    checkpoint = tmp_path / "step_2"

    async def train(group: LearnerGroup, steps: range) -> list[dict[str, float]]:
        results = [await group.train_step(batches[step], step) for step in steps]
        # The machine's, not the training's: a process that has done more has once held more.
        assert all(result.pop(metrics.LEARNER_MEMORY) > 0.0 for result in results)
        return results

    async def checksum(group: LearnerGroup) -> str:
        async with group.publishing(4) as update:
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
    return set(itertools.chain.from_iterable(d.glob("e3rl-weights-*/*") for d in directories))


def _all_alike(group: Group) -> Group:
    return with_rewards(group, [1.0] * len(group.trajectories))


def test_a_dead_rank_is_named_at_once_and_leaves_no_files(models: dict[str, Path], tmp_path: Path) -> None:
    config = run_config(models["tied"], ranks=2, zero_stage=3)
    (groups,) = rollouts(config, 1)
    abandoned = Path(tempfile.gettempdir()) / "e3rl-weights-abandoned"
    abandoned.mkdir(exist_ok=True)
    before = weight_files()

    async def lose_a_rank() -> None:
        group = LearnerGroup(config, tmp_path)
        await group.start()
        async with group.publishing(1) as update:
            assert isinstance(update, HostUpdate)
            assert Path(update.path) in weight_files()
        assert not abandoned.exists()
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
    assert weight_files() <= before
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


class Silent:
    """A rank that never answers."""

    def begin_publishing(self, version: int) -> None:
        threading.Event().wait()


def test_a_wait_that_expires_names_what_it_waited_for_and_for_how_long(models: dict[str, Path], tmp_path: Path) -> None:
    config = run_config(models["tied"])
    config = config.model_copy(update={"sync": config.sync.model_copy(update={"deadline_seconds": 0.5})})
    group = LearnerGroup(config, tmp_path)

    async def wait() -> None:
        with pytest.raises(LearnerError, match="publishing weights version 1: the learner is not started"):
            await group.publishing(1).__aenter__()
        group._ranks = [ray.remote(Silent).remote()]
        with pytest.raises(
            LearnerError, match=r"publishing weights version 1: no answer from learner rank 0 within 0\.5 s"
        ):
            await group.publishing(1).__aenter__()
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
    broken = with_rewards(groups[0], [None, *(t.reward for t in groups[0].trajectories[1:])])
    group = LearnerGroup(config, tmp_path)
    with pytest.raises(ValueError, match="response 0 to prompt 'p0' has no reward"):
        asyncio.run(group.train_step([broken], 0))
    assert os.listdir(tmp_path) == []
    assert config.learner.advantage == AdvantageConfig(erased_weight=0.2)
