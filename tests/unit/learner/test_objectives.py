"""Loss and gradient against a float64 recomputation, against TRL, and under every way to split a minibatch."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from common.config.run import (
    AdvantageConfig,
    ClippedObjective,
    ModelConfig,
    OptimizerConfig,
    UncertaintyCredit,
    UniformCredit,
)
from common.packed import Group
from common.trajectory import Attempt, Trajectory, VersionSpan
from learner.objectives import (
    MinibatchTotals,
    ObjectiveInputs,
    ObjectiveStatistics,
    compute_objective,
)
from learner.policy.batching import collate, rank_batches, split_minibatches
from learner.policy.model import PolicyError, learning_rate, load_policy, response_logprobs
from learner.policy.samples import TrainingSample, response_samples
from tests.models import tiny_llama, tiny_qwen3
from tests.trajectories import changed, random_groups, recorded_near, unpacked, with_rewards

E3RL_AS_GRPO = AdvantageConfig(credit=UniformCredit(), normalise="sequence")
TOKEN_MEAN = ClippedObjective(aggregation="token_mean")
SEQUENCE_MEAN = ClippedObjective(aggregation="sequence_mean")
WITH_KL = ClippedObjective(aggregation="token_mean", kl_coefficient=0.3, clip_low=0.1, clip_high=0.4)

Gradients = dict[str, Tensor]


@pytest.fixture(scope="module", params=["tied qwen3", "untied llama"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("model")
    path = tiny_qwen3(directory) if request.param == "tied qwen3" else tiny_llama(directory)
    return load_policy(ModelConfig(path=str(path), max_length=256))


@pytest.fixture(scope="module")
def groups(policy: Any) -> list[Group]:
    return recorded_near(policy, random_groups(7, 4, 4))


def gradients_of(policy: Any, loss: Callable[[], Tensor]) -> tuple[float, Gradients]:
    policy.zero_grad()
    value = loss()
    value.backward()
    return float(value.detach()), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def learner_gradients(
    policy: Any,
    samples: Sequence[TrainingSample],
    objective: ClippedObjective,
    *,
    ranks: int = 1,
    tokens: int = 100_000,
    reference: Any = None,
    skip: bool = False,
) -> tuple[float, Gradients, ObjectiveStatistics, int]:
    """Loss, gradient and statistics summed over all micro-batches, and how many there were."""
    statistics = ObjectiveStatistics()
    policy.zero_grad()
    total, count = 0.0, 0
    batches = rank_batches(samples, ranks, tokens, skip)
    assert len({len(batch.microbatches) for batch in batches}) == 1
    for batch in batches:
        for microbatch in batch.microbatches:
            tensors = collate(microbatch)
            with torch.no_grad():
                anchor = None if reference is None else response_logprobs(reference, tensors)
            inputs = ObjectiveInputs(
                response_logprobs(policy, tensors),
                tensors.behaviour_logprobs,
                tensors.advantages,
                tensors.mask,
                anchor,
            )
            loss, part = compute_objective(objective, inputs, batch.totals)
            loss.backward()
            statistics.add(part)
            total += float(loss.detach())
            count += 1
    gradients = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    return total, gradients, statistics, count


def assert_same(one: tuple[float, Gradients], other: tuple[float, Gradients], tolerance: float = 1e-6) -> None:
    assert one[0] == pytest.approx(other[0], abs=tolerance)
    assert one[1].keys() == other[1].keys()
    assert max(float(g.abs().max()) for g in other[1].values()) > 1e-3
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient.double(), other[1][name].double(), rtol=tolerance, atol=tolerance, msg=name)


def without_signal(groups: Sequence[Group], which: Sequence[int]) -> list[Group]:
    """The same groups, the rewards of some of which are all equal."""
    return [
        with_rewards(group, [1.0] * len(group.trajectories)) if index in which else group
        for index, group in enumerate(groups)
    ]


@pytest.mark.parametrize("objective", [TOKEN_MEAN, SEQUENCE_MEAN], ids=["token_mean", "sequence_mean"])
@pytest.mark.parametrize(("ranks", "tokens"), [(1, 100_000), (2, 64), (3, 200)])
@pytest.mark.parametrize("erased_weight", [0.0, 0.5])
def test_skipping_what_has_no_signal_changes_neither_loss_nor_gradient(
    policy: Any, groups: list[Group], objective: ClippedObjective, ranks: int, tokens: int, erased_weight: float
) -> None:
    mixed = without_signal(groups, (0, 2))
    samples = all_samples(mixed, AdvantageConfig(credit=UniformCredit(), erased_weight=erased_weight))
    whole = learner_gradients(policy, samples, objective, ranks=ranks, tokens=tokens)
    skipped = learner_gradients(policy, samples, objective, ranks=ranks, tokens=tokens, skip=True)
    assert_same(skipped[:2], whole[:2])
    assert 0 < skipped[2].tokens <= 0.75 * whole[2].tokens
    # What no micro-batch holds is still in the divisors, so that the same samples alone would weigh more.
    alone = learner_gradients(policy, [s for s in samples if s.has_signal], objective, ranks=ranks, tokens=tokens)
    assert abs(alone[0] - whole[0]) > 1e-4


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_minibatch_without_any_signal_still_runs_every_rank_and_has_no_gradient(
    policy: Any, groups: list[Group], ranks: int
) -> None:
    samples = all_samples(without_signal(groups, range(4)), E3RL_AS_GRPO)
    loss, gradients, statistics, count = learner_gradients(policy, samples, TOKEN_MEAN, ranks=ranks, skip=True)
    assert (loss, statistics.tokens, count) == (0.0, 0, ranks)
    # Every parameter took part, as ZeRO expects.
    assert gradients.keys() == {name for name, _ in policy.named_parameters()}
    assert not any(bool(gradient.any()) for gradient in gradients.values())


def all_samples(groups: Sequence[Group], advantage: AdvantageConfig) -> list[TrainingSample]:
    return [s for group in groups for own in response_samples(group.trajectories, advantage) for s in own]


def float64_grpo(policy: Any, groups: Sequence[Group], objective: ClippedObjective) -> tuple[float, Gradients]:
    """GRPO from its definition, one response at a time, in float64, with nothing of the learner's code."""
    double = type(policy)(policy.config).double()
    double.load_state_dict({k: v.double() for k, v in policy.state_dict().items()})

    def loss() -> Tensor:
        per_response = []
        for group in groups:
            rewards = [t.reward or 0.0 for t in group.trajectories]
            mean = math.fsum(rewards) / len(rewards)
            deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
            for member, reward in zip(unpacked(group), rewards, strict=True):
                advantage = (reward - mean) / (deviation + 1e-4)
                prompt, response = member.prompt_token_ids, member.token_ids
                logits = double(input_ids=torch.tensor([prompt + response])).logits[0].double()
                surrogate = []
                for place, token in enumerate(response):
                    row = logits[len(prompt) + place - 1] / member.token_temperatures[place]
                    ratio = torch.exp(row[token] - row.logsumexp(0) - member.behaviour_logprobs[place])
                    bounded = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
                    surrogate.append(torch.minimum(ratio * advantage, bounded * advantage))
                per_response.append(torch.stack(surrogate))
        if objective.aggregation == "token_mean":
            return -torch.cat(per_response).mean()
        return -torch.stack([s.mean() for s in per_response]).mean()

    return gradients_of(double, loss)


def joined(trajectory: Trajectory) -> Trajectory:
    """The same response as a plain rollout records it: one segment, nothing erased."""
    (temperature,) = set(trajectory.token_temperatures)
    length = len(trajectory.token_ids)
    whole = Attempt(
        segment=0,
        attempt=0,
        start=0,
        end=length,
        token_ids=trajectory.token_ids,
        logprobs=trajectory.logprobs,
        behaviour_logprobs=trajectory.behaviour_logprobs,
        signal=[],
        temperature=temperature,
        versions=[VersionSpan(start=0, end=length, version=0)],
        verdict="accepted",
    )
    return trajectory.model_copy(update={"attempts": [whole]})


@pytest.mark.parametrize("objective", [TOKEN_MEAN, SEQUENCE_MEAN], ids=lambda o: o.aggregation)
def test_grpo_equals_a_float64_recomputation(policy: Any, groups: list[Group], objective: ClippedObjective) -> None:
    loss, gradients, statistics, _ = learner_gradients(policy, all_samples(groups, E3RL_AS_GRPO), objective)
    assert statistics.clipped_tokens > 0
    assert_same((loss, gradients), float64_grpo(policy, groups, objective))


@pytest.mark.parametrize("objective", [TOKEN_MEAN, SEQUENCE_MEAN], ids=lambda o: o.aggregation)
def test_e3rl_with_uniform_sequence_credit_equals_grpo(
    policy: Any, groups: list[Group], objective: ClippedObjective
) -> None:
    plain = [changed(group, joined) for group in groups]
    assert any(t.erasures for g in groups for t in g.trajectories)
    e3rl = learner_gradients(policy, all_samples(groups, E3RL_AS_GRPO), objective)
    grpo = learner_gradients(policy, all_samples(plain, E3RL_AS_GRPO), objective)
    assert_same(e3rl[:2], grpo[:2])


@pytest.mark.parametrize(("objective", "loss_type"), [(SEQUENCE_MEAN, "grpo"), (TOKEN_MEAN, "bnpo"), (WITH_KL, "bnpo")])
def test_loss_and_gradient_equal_trl_s(groups: list[Group], objective: ClippedObjective, loss_type: str) -> None:
    """TRL's own `_compute_loss` on the same log-probs; its trainer is stood in for by what that function reads."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    tensors = collate(all_samples(groups, E3RL_AS_GRPO))
    generator = torch.Generator().manual_seed(0)
    noise = 0.3 * torch.randn(tensors.mask.shape, generator=generator)
    start = torch.where(tensors.mask, tensors.behaviour_logprobs + noise, 0.0)
    reference = torch.where(tensors.mask, start - 0.5 * noise.abs(), 0.0)
    logprobs = [start.clone().requires_grad_() for _ in range(2)]

    inputs = ObjectiveInputs(
        logprobs[0],
        tensors.behaviour_logprobs,
        tensors.advantages,
        tensors.mask,
        reference if objective.kl_coefficient else None,
    )
    totals = MinibatchTotals(len(tensors.mask), int(tensors.mask.sum()))
    ours, statistics = compute_objective(objective, inputs, totals)
    trainer = trl_stand_in(objective, loss_type, logprobs[1])
    prompt = tensors.token_ids[:, : tensors.first + 1]
    compute_loss: Any = GRPOTrainer._compute_loss
    theirs = compute_loss(
        trainer,
        None,
        {
            "prompt_ids": prompt,
            "prompt_mask": torch.ones_like(prompt),
            "completion_ids": tensors.targets,
            "completion_mask": tensors.mask.int(),
            "advantages": tensors.advantages,
            "old_per_token_logps": tensors.behaviour_logprobs,
            "ref_per_token_logps": reference,
        },
    )
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-6)
    gradients = [torch.autograd.grad(loss, x)[0] for loss, x in zip((ours, theirs), logprobs, strict=True)]
    torch.testing.assert_close(*gradients, rtol=0.0, atol=1e-6)
    recorded = trainer._metrics["train"]
    assert statistics.clipped_tokens / statistics.tokens == pytest.approx(
        recorded["clip_ratio/region_mean"][0], abs=1e-6
    )
    if objective.kl_coefficient:
        assert statistics.kl_sum / statistics.tokens == pytest.approx(recorded["kl"][0], abs=1e-6)


def trl_stand_in(objective: ClippedObjective, loss_type: str, logprobs: Tensor) -> SimpleNamespace:
    """What TRL 1.16's `_compute_loss` reads of its trainer."""
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        aux_loss_enabled=False,
        beta=objective.kl_coefficient,
        current_gradient_accumulation_steps=1,
        epsilon_high=objective.clip_high,
        epsilon_low=objective.clip_low,
        importance_sampling_level="token",
        loss_type=loss_type,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )


@pytest.mark.parametrize("objective", [TOKEN_MEAN, SEQUENCE_MEAN, WITH_KL], ids=["token", "sequence", "kl"])
@pytest.mark.parametrize(("ranks", "tokens"), [(1, 64), (2, 100_000), (3, 40)])
def test_the_gradient_does_not_depend_on_micro_batches_or_ranks(
    policy: Any,
    groups: list[Group],
    objective: ClippedObjective,
    ranks: int,
    tokens: int,
) -> None:
    reference = None
    if objective.kl_coefficient:
        reference = copy.deepcopy(policy).requires_grad_(False)
        for parameter in reference.parameters():
            parameter.mul_(1.02)
    advantage = AdvantageConfig(credit=UncertaintyCredit(), erased_weight=0.3)
    samples = all_samples(groups, advantage)
    one = learner_gradients(policy, samples, objective, reference=reference)
    many = learner_gradients(policy, samples, objective, ranks=ranks, tokens=tokens, reference=reference)
    assert many[3] > 1
    assert many[2].tokens == one[2].tokens == sum(s.response_length for s in samples)
    assert many[2].clipped_tokens == one[2].clipped_tokens
    assert many[2].kl_sum == pytest.approx(one[2].kl_sum, rel=1e-5)
    assert_same(many[:2], one[:2])


def test_an_empty_micro_batch_changes_no_gradient_and_touches_every_parameter(policy: Any) -> None:
    tensors = collate([])
    policy.zero_grad()
    loss, statistics = compute_objective(
        TOKEN_MEAN,
        ObjectiveInputs(
            response_logprobs(policy, tensors), tensors.behaviour_logprobs, tensors.advantages, tensors.mask
        ),
        MinibatchTotals(3, 30),
    )
    loss.backward()
    assert statistics.tokens == 0
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


def test_minibatches_together_hold_every_sample(groups: list[Group]) -> None:
    parts = split_minibatches(groups, E3RL_AS_GRPO, 2, 0, 0)
    assert sum(len(part) for part in parts) == len(all_samples(groups, E3RL_AS_GRPO))


def test_padding_never_reaches_the_loss() -> None:
    mask = torch.tensor([[True, False]])
    values = torch.tensor([[-1.0, -math.inf]])
    inputs = ObjectiveInputs(values, torch.tensor([[-1.0, 0.0]]), torch.ones(1, 2), mask)
    loss, statistics = compute_objective(TOKEN_MEAN, inputs, MinibatchTotals(1, 1))
    assert float(loss) == -1.0
    assert (statistics.ratio_min, statistics.ratio_max) == (1.0, 1.0)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_warms_up_and_follows_its_schedule(schedule: str) -> None:
    config = OptimizerConfig.model_validate({"learning_rate": 0.5, "warmup_steps": 4, "schedule": schedule})
    rates = [learning_rate(config, step, 20) for step in range(21)]
    assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    shapes: dict[str, Callable[[float], float]] = {
        "constant": lambda x: 1.0,
        "linear": lambda x: 1.0 - x,
        "cosine": lambda x: (1.0 + math.cos(math.pi * x)) / 2.0,
    }
    assert rates[4:] == pytest.approx([0.5 * shapes[schedule](k / 16) for k in range(17)], abs=1e-7)


def test_a_directory_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_architecture"}')
    with pytest.raises(PolicyError, match=r"(?s)can't load model .*no_such_architecture"):
        load_policy(ModelConfig(path=str(tmp_path), max_length=64))
