"""Importance weights and the ratio against recomputed log-probs: against float64, TRL, and however a batch is split."""

import inspect
import math
import textwrap
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.config import ConfigError
from common.config.off_policy import (
    NO_IMPORTANCE_SAMPLING,
    ImportanceSampling,
    SequenceImportanceSampling,
    TokenImportanceSampling,
)
from common.config.run import AdvantageConfig, ClippedObjective, LearnerConfig, ModelConfig, UniformCredit
from common.packed import Group
from learner.objectives import (
    GapHistogram,
    MinibatchTotals,
    ObjectiveInputs,
    ObjectiveStatistics,
    WeightStatistics,
    compute_objective,
    importance_weights,
)
from learner.policy.batching import collate, rank_batches
from learner.policy.model import load_policy, response_logprobs
from learner.policy.samples import TrainingSample, response_samples
from tests.configs import run_config
from tests.models import tiny_qwen3
from tests.trajectories import random_groups, recorded_near, unpacked

OBJECTIVE = ClippedObjective(aggregation="token_mean", clip_low=0.1, clip_high=0.3)
WEIGHTS: list[ImportanceSampling] = [
    TokenImportanceSampling(cap=1.2),
    TokenImportanceSampling(cap=1.3, floor=0.8),
    TokenImportanceSampling(cap=1.3, floor=0.8, outliers="mask"),
    SequenceImportanceSampling(cap=1.5),
    SequenceImportanceSampling(cap=1.5, outliers="mask"),
    SequenceImportanceSampling(cap=1.5, floor=0.5, outliers="mask"),
]


def named(value: ImportanceSampling) -> str:
    return " ".join(str(part) for part in value.model_dump().values())


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The policy at the step's start."""
    path = tiny_qwen3(tmp_path_factory.mktemp("model"))
    return load_policy(ModelConfig(path=str(path), max_length=256)).requires_grad_(False)


@pytest.fixture(scope="module")
def policy(start: Any) -> Any:
    """The policy after an update or two: near the one at the start, and not it."""
    moved = type(start)(start.config)
    moved.load_state_dict(start.state_dict())
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1.01)
    return moved


@pytest.fixture(scope="module")
def groups(start: Any) -> list[Group]:
    return recorded_near(start, random_groups(7, 4, 4))


def samples_of(groups: Sequence[Group], erased_weight: float = 0.0) -> list[TrainingSample]:
    advantage = AdvantageConfig(credit=UniformCredit(), normalise="sequence", erased_weight=erased_weight)
    return [s for group in groups for own in response_samples(group.trajectories, advantage) for s in own]


def learner_result(
    policy: Any, start: Any, samples: Sequence[TrainingSample], sampling: ImportanceSampling, ranks: int, tokens: int
) -> tuple[float, dict[str, Tensor], ObjectiveStatistics]:
    """Loss, gradient and statistics, summed over micro-batches and ranks, with the old log-probs recomputed."""
    statistics, total = ObjectiveStatistics(), 0.0
    policy.zero_grad()
    for batch in rank_batches(samples, ranks, tokens):
        for microbatch in batch.microbatches:
            tensors = collate(microbatch)
            with torch.no_grad():
                old = response_logprobs(start, tensors)
            logprobs = response_logprobs(policy, tensors)
            inputs = ObjectiveInputs(
                logprobs, tensors.behaviour_logprobs, tensors.advantages, tensors.mask, old_logprobs=old
            )
            loss, part = compute_objective(OBJECTIVE, inputs, batch.totals, sampling)
            loss.backward()
            statistics.add(part)
            total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}, statistics


def float64_result(
    policy: Any, start: Any, groups: Sequence[Group], sampling: ImportanceSampling
) -> tuple[float, dict[str, Tensor], list[float]]:
    """The loss by its definition, a response at a time, in float64, and the weights: nothing of the learner's code."""
    current, old = (type(model)(model.config).double() for model in (policy, start))
    current.load_state_dict({k: v.double() for k, v in policy.state_dict().items()})
    old.load_state_dict({k: v.double() for k, v in start.state_dict().items()})

    def logprob(model: Any, member: Any) -> Tensor:
        sequence = torch.tensor([member.prompt_token_ids + member.token_ids])
        rows = model(input_ids=sequence).logits[0, len(member.prompt_token_ids) - 1 : -1].double()
        rows = rows / torch.tensor(member.token_temperatures).double()[:, None]
        return torch.stack([row[t] - row.logsumexp(0) for row, t in zip(rows, member.token_ids, strict=True)])

    def bounded(weight: float) -> float:
        low = -math.inf if sampling.floor is None else sampling.floor
        if low <= weight <= sampling.cap:
            return weight
        return 0.0 if sampling.outliers == "mask" else min(max(weight, low), sampling.cap)

    losses, weights = [], []
    for group in groups:
        rewards = [t.reward or 0.0 for t in group.trajectories]
        mean = math.fsum(rewards) / len(rewards)
        deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        for member, reward in zip(unpacked(group), rewards, strict=True):
            advantage = (reward - mean) / (deviation + 1e-4)
            before = logprob(old, member).detach()
            ratios = torch.exp(logprob(current, member) - before)
            shifts = (before - torch.tensor(member.behaviour_logprobs).double()).tolist()
            if sampling.kind == "sequence":
                own = [bounded(math.exp(math.fsum(shifts)))]
                each = own * len(shifts)
            else:
                each = own = [bounded(math.exp(shift)) for shift in shifts]
            weights += own
            for ratio, weight in zip(ratios, each, strict=True):
                clipped = ratio.clamp(1 - OBJECTIVE.clip_low, 1 + OBJECTIVE.clip_high)
                losses.append(-weight * torch.minimum(ratio * advantage, clipped * advantage))
    loss = torch.stack(losses).mean()
    current.zero_grad()
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in current.named_parameters() if p.grad is not None}, weights


@pytest.mark.parametrize("sampling", WEIGHTS, ids=named)
def test_weighted_losses_and_gradients_equal_a_float64_recomputation_however_they_are_split(
    policy: Any, start: Any, groups: list[Group], sampling: ImportanceSampling
) -> None:
    expected, expected_gradients, weights = float64_result(policy, start, groups, sampling)
    for ranks, tokens in ((1, 100_000), (3, 40)):
        loss, gradients, statistics = learner_result(policy, start, samples_of(groups), sampling, ranks, tokens)
        assert loss == pytest.approx(expected, abs=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient.double(), expected_gradients[name], rtol=1e-5, atol=1e-6, msg=name)
        found = statistics.weights
        assert 0 < found.outliers < found.count == len(weights)
        assert found.mean == pytest.approx(np.mean(weights), rel=1e-5)
        effective = sum(weights) ** 2 / (len(weights) * np.square(weights).sum())
        assert found.effective_share == pytest.approx(effective, rel=1e-5)
    plain, _, _ = learner_result(policy, start, samples_of(groups), NO_IMPORTANCE_SAMPLING, 1, 100_000)
    assert abs(plain - loss) > 1e-4


@pytest.mark.parametrize("sampling", WEIGHTS, ids=named)
@pytest.mark.parametrize(("aggregation", "loss_type"), [("sequence_mean", "grpo"), ("token_mean", "bnpo")])
@pytest.mark.parametrize("kl_coefficient", [0.0, 0.3])
def test_weighted_loss_and_gradient_equal_trl_s(
    groups: list[Group], sampling: ImportanceSampling, aggregation: str, loss_type: str, kl_coefficient: float
) -> None:
    """TRL's own weights and its own `_compute_loss`, on the same log-probs."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    from tests.unit.learner.test_objectives import trl_stand_in

    objective = OBJECTIVE.model_copy(update={"aggregation": aggregation, "kl_coefficient": kl_coefficient})
    tensors = collate(samples_of(groups))
    generator = torch.Generator().manual_seed(0)
    noise = [0.1 * torch.randn(tensors.mask.shape, generator=generator) for _ in range(3)]
    old = torch.where(tensors.mask, tensors.behaviour_logprobs + 3.0 * noise[0], 0.0)
    now = torch.where(tensors.mask, old + noise[1], 0.0)
    reference = torch.where(tensors.mask, now + noise[2], 0.0)
    logprobs = [now.clone().requires_grad_() for _ in range(2)]

    inputs = ObjectiveInputs(
        logprobs[0],
        tensors.behaviour_logprobs,
        tensors.advantages,
        tensors.mask,
        reference if kl_coefficient else None,
        old,
    )
    totals = MinibatchTotals(len(tensors.mask), int(tensors.mask.sum()))
    ours, statistics = compute_objective(objective, inputs, totals, sampling)
    trainer = trl_stand_in(objective, loss_type, logprobs[1])
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    prompt = tensors.token_ids[:, : tensors.first + 1]
    weights = trl_weights(sampling, old, tensors.behaviour_logprobs, tensors.mask.int())
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
            "old_per_token_logps": old,
            "ref_per_token_logps": reference,
            "importance_sampling_ratio": weights,
        },
    )
    assert statistics.weights.outliers > 0
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-6)
    gradients = [torch.autograd.grad(loss, x)[0] for loss, x in zip((ours, theirs), logprobs, strict=True)]
    torch.testing.assert_close(*gradients, rtol=0.0, atol=1e-6)


def trl_weights(sampling: ImportanceSampling, old: Tensor, behaviour: Tensor, mask: Tensor) -> Tensor:
    """The lines of TRL's trainer that make the weights, which are in the middle of a function that also generates."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    begin = source.index("if self.use_vllm", source.index("# Compute the importance sampling ratio when using vLLM"))
    end = source.index("# Compute the per-token log probabilities for the reference model")
    indented = source[source.rindex("\n", 0, begin) + 1 : source.rindex("\n", 0, end)]
    names = {
        "torch": torch,
        "math": math,
        "self": SimpleNamespace(
            use_vllm=True,
            vllm_importance_sampling_correction=True,
            vllm_importance_sampling_mode=f"{sampling.kind}_{sampling.outliers}",
            vllm_importance_sampling_clip_max=sampling.cap,
            vllm_importance_sampling_clip_min=sampling.floor,
        ),
        "completion_mask": mask,
        "tool_mask": None,
        "old_per_token_logps": old,
        "sampling_per_token_logps": behaviour,
    }
    exec(textwrap.dedent(indented), names)
    return names["vllm_importance_sampling_ratio"]


def test_recomputed_log_probs_of_the_same_policy_give_a_ratio_of_exactly_one(start: Any, groups: list[Group]) -> None:
    tensors = collate(samples_of(groups))
    logprobs = response_logprobs(start, tensors)
    inputs = ObjectiveInputs(
        logprobs, tensors.behaviour_logprobs, tensors.advantages, tensors.mask, old_logprobs=logprobs.detach()
    )
    _, statistics = compute_objective(OBJECTIVE, inputs, MinibatchTotals(1, 1))
    assert (statistics.ratio_min, statistics.ratio_max, statistics.clipped_tokens) == (1.0, 1.0, 0)
    assert statistics.gaps.mean > 0.1


def test_without_old_log_probs_weights_are_refused() -> None:
    values = torch.zeros(1, 2)
    inputs = ObjectiveInputs(values, values, values, values == 0.0)
    with pytest.raises(ValueError, match="needs the old log-probs"):
        compute_objective(OBJECTIVE, inputs, MinibatchTotals(1, 2), TokenImportanceSampling())


@pytest.mark.parametrize("sampling", WEIGHTS, ids=named)
def test_padding_and_empty_rows_have_no_weight_and_reach_no_other(sampling: ImportanceSampling) -> None:
    mask = torch.tensor([[True, True, False], [False, False, False]])
    old = torch.tensor([[-1.0, -2.0, math.inf], [math.nan, -math.inf, 5.0]])
    weights, statistics = importance_weights(sampling, old, torch.where(mask, old, 0.0), mask)
    assert weights is not None
    assert weights[0, :2].tolist() == [1.0] * weights.shape[1] if sampling.kind == "sequence" else [1.0, 1.0]
    units = 1 if sampling.kind == "sequence" else 2
    assert statistics == WeightStatistics(count=units, outliers=0, sum=units, sum_of_squares=units)


def test_a_weight_beyond_all_limits_is_bounded() -> None:
    old, behaviour = torch.tensor([[-1.0, 0.0]]), torch.tensor([[-900.0, -900.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    for kind in (TokenImportanceSampling, SequenceImportanceSampling):
        for outliers, expected in (("truncate", 3.0), ("mask", 0.0)):
            sampling = kind(cap=3.0, outliers=outliers)
            weights, statistics = importance_weights(sampling, old, behaviour, mask)
            assert weights is not None
            assert set(weights.flatten().tolist()) == {expected}
            assert statistics.outlier_share == 1.0
            assert statistics.effective_share == (1.0 if expected else 0.0)


FLOATS = st.floats(0.0, 200.0, width=32)


@settings(max_examples=200, deadline=None)
@given(gaps=st.lists(FLOATS | st.floats(0.0, 2.0**-10, width=32), min_size=1, max_size=80), data=st.data())
def test_a_histogram_of_parts_is_that_of_the_whole_and_its_quantiles_are_within_a_sixteenth(
    gaps: list[float], data: st.DataObject
) -> None:
    values = torch.tensor(gaps, dtype=torch.float32)
    signs = torch.where(torch.arange(len(gaps)) % 2 == 0, 1.0, -1.0)
    whole = GapHistogram.of(values * signs, torch.zeros_like(values))
    cut = data.draw(st.integers(0, len(gaps)))
    parts = GapHistogram()
    for part in (slice(cut, None), slice(0, cut)):
        parts.add(GapHistogram.of((values * signs)[part], torch.zeros_like(values)[part]))
    assert (parts.counts == whole.counts).all()
    assert (parts.tokens, parts.max) == (len(gaps), float(values.max()))
    assert parts.mean == pytest.approx(float(values.double().mean()), rel=1e-12)
    for share in (0.0, 0.5, 0.9, 0.999, 1.0):
        exact = float(np.quantile(values.numpy(), share, method="inverted_cdf"))
        found = parts.quantile(share)
        if exact < 2.0**-40:
            assert found == 0.0
        elif exact < 128.0:
            assert exact <= found <= exact * (1.0 + 1.0 / 16.0)
        else:
            assert found == parts.max


def test_a_gap_that_is_not_finite_shows_as_such() -> None:
    for strange in (math.inf, math.nan):
        gaps = GapHistogram.of(torch.tensor([0.0, strange]), torch.zeros(2))
        assert gaps.tokens == 2
        assert not math.isfinite(gaps.mean)
    assert all(math.isnan(value) for value in (GapHistogram().mean, GapHistogram().kl, GapHistogram().quantile(0.5)))


def test_the_kl_to_the_behaviour_is_that_of_the_distributions() -> None:
    """The estimate's mean over tokens drawn from the behaviour, against the sum over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 50, generator=generator).double()
    behaviour, policy = logits.log_softmax(-1)
    drawn = torch.multinomial(behaviour.exp(), 400_000, replacement=True, generator=generator)
    gaps = GapHistogram.of(policy[drawn], behaviour[drawn])
    exact = float((behaviour.exp() * (behaviour - policy)).sum())
    assert gaps.kl == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_weights_bring_recomputed_log_probs_along(kind: str) -> None:
    learner = run_config(learner={"importance_sampling": {"kind": kind, "cap": 4.0}}).learner
    assert (learner.old_logprobs, learner.importance_sampling.cap) == ("recomputed", 4.0)
    # As a run writes it down and reads it again.
    assert LearnerConfig.model_validate(learner.model_dump(mode="json")) == learner
    assert run_config().learner.old_logprobs == "behaviour"
    assert LearnerConfig(importance_sampling=TokenImportanceSampling()).old_logprobs == "recomputed"


@pytest.mark.parametrize(
    ("learner", "message"),
    [
        (
            {"importance_sampling": {"kind": "token"}, "old_logprobs": "behaviour"},
            r"learner: importance_sampling 'token' needs old_logprobs: recomputed",
        ),
        ({"importance_sampling": {"kind": "none", "cap": 2.0}}, r"importance_sampling\.none\.cap: unknown setting"),
        ({"importance_sampling": {"kind": "token", "cap": 0.5}}, r"importance_sampling\.token\.cap"),
        ({"importance_sampling": {"kind": "token", "floor": 1.5}}, r"importance_sampling\.token\.floor"),
        ({"importance_sampling": {"kind": "token", "outliers": "drop"}}, "'truncate' or 'mask'"),
        ({"importance_sampling": {"kind": "geometric"}}, "'none', 'token', 'sequence'"),
        ({"old_logprobs": "new"}, "'behaviour' or 'recomputed'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(learner: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_config(learner=learner)
